"""Finding and reading weight files: every published layout is read, and every bad file is refused in one sentence."""

import os
import pickle
import sys
import types

import huggingface_hub
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import errors
from safetensors.torch import save_file
from torch import nn

from published.weight_files import (
    choose_weight_files,
    load_strict,
    locate,
    read_checkpoint,
    read_folder_weights,
    read_json,
    read_weights,
    write_safetensors,
)

TENSORS = {"a.weight": torch.randn(50, 40), "b": torch.arange(3)}


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def one_sentence(error: BaseException, *words: str) -> bool:
    text = str(error)
    return "\n" not in text and text.endswith(".") and len(text) < 500 and all(word in text for word in words)


class Malice:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# ----------------------------------------------------------------------------------------------------------------------
# Single files
# ----------------------------------------------------------------------------------------------------------------------


def save(path, kind: str) -> None:
    if kind == "safetensors":
        save_file(TENSORS, path)
    elif kind == "nested":
        torch.save({"state_dict": TENSORS, "global_step": 7}, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=kind == "zip")


KINDS = ["safetensors", "zip", "legacy", "nested"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["right.ckpt", "renamed.pth", "no_suffix"])
def test_the_content_tells_the_format_not_the_name(tmp_path, kind, name):
    save(tmp_path / name, kind)
    assert same(read_weights(tmp_path / name), TENSORS)
    assert read_checkpoint(tmp_path / name)[1].get("global_step") == (7 if kind == "nested" else None)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_pickle_that_calls_itself_safetensors_is_refused(tmp_path, kind):
    save(tmp_path / "model.safetensors", kind)
    with pytest.raises(ValueError, match="pickle under a false name") as error:
        read_weights(tmp_path / "model.safetensors")
    assert one_sentence(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_files_are_refused(tmp_path, kind):
    save(tmp_path / "whole", kind)
    content = (tmp_path / "whole").read_bytes()
    for size in [0, 1, 7, 9, 64, 300, len(content) // 2, len(content) - 40, len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError) as error:
            read_weights(tmp_path / "cut")
        assert one_sentence(error.value, str(tmp_path / "cut")), error.value


def test_corrupted_files_are_refused(tmp_path):
    save(tmp_path / "zip", "zip")
    content = bytearray((tmp_path / "zip").read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one weight, which PyTorch itself would not notice
    (tmp_path / "zip").write_bytes(content)
    with pytest.raises(ValueError, match="checksum") as error:
        read_weights(tmp_path / "zip")
    assert one_sentence(error.value)
    save(tmp_path / "header", "safetensors")
    content = bytearray((tmp_path / "header").read_bytes())
    content[12] = 0
    (tmp_path / "header").write_bytes(content)
    with pytest.raises(ValueError, match="damaged") as error:
        read_weights(tmp_path / "header")
    assert one_sentence(error.value)


def test_nothing_in_a_pickle_is_executed(tmp_path):
    trap = tmp_path / "executed"
    torch.save({"a": Malice(trap)}, tmp_path / "zip.ckpt")
    torch.save({"a": Malice(trap)}, tmp_path / "legacy.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": TENSORS, "callbacks": Malice(trap)}, tmp_path / "beside.ckpt")
    for protocol in (2, 4):
        (tmp_path / f"plain{protocol}.ckpt").write_bytes(pickle.dumps({"a": Malice(trap)}, protocol))
    for path in sorted(tmp_path.glob("*.ckpt")):
        with pytest.raises(ValueError) as error:
            read_weights(path)
        assert one_sentence(error.value, str(path)), error.value
        if path.name != "plain4.ckpt":
            assert "mkdir" in str(error.value)
    assert not trap.exists()


def test_what_is_no_state_dict_is_refused(tmp_path):
    cases = {
        "list": ([TENSORS["b"]], "holds a list"),
        "module": (nn.Linear(2, 2), "Linear"),
        "numbers": ({"epoch": 3}, "holds no tensors"),
        "empty": ({"state_dict": {}}, "holds no tensors"),
    }
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=words) as error:
            read_weights(tmp_path / name)
        assert one_sentence(error.value)
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        read_weights(tmp_path / "pointer")
    (tmp_path / "page").write_text("<!DOCTYPE html><html>not found</html>")
    with pytest.raises(ValueError, match="download it again"):
        read_weights(tmp_path / "page")
    with pytest.raises(FileNotFoundError):
        read_weights(tmp_path / "absent.safetensors")


def test_sd1_checkpoints_open_without_their_trainer(tmp_path, monkeypatch):
    """They name Lightning's callback class as a dictionary key; it is neither needed nor imported."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    callback = type("ModelCheckpoint", (), {"__module__": name})
    sys.modules[name].ModelCheckpoint = callback
    torch.save({"state_dict": TENSORS, "callbacks": {callback: {"best": 1.0}}}, tmp_path / "sd-v1-4.ckpt")
    monkeypatch.undo()
    assert same(read_weights(tmp_path / "sd-v1-4.ckpt"), TENSORS)
    assert "pytorch_lightning" not in sys.modules


def test_json_is_read_or_refused_in_one_sentence(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="missing"):
        read_json(path)
    path.write_text('{"a": [1]}')
    assert read_json(path) == {"a": [1]}
    for content in (b'{"a": ', b"[1]", b"\xff\xfe\x00", b"", b"[" * 200_000):
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            read_json(path)
        assert one_sentence(error.value, str(path))


# ----------------------------------------------------------------------------------------------------------------------
# Folders
# ----------------------------------------------------------------------------------------------------------------------

ORDER = [  # best first; each must win over all that follow
    "model.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
    "model.non_ema.safetensors",
    "pytorch_model.non_ema.bin",
]


def test_the_best_of_several_weight_files_is_chosen():
    others = ["config.json", "model.onnx", "model.ckpt", "tf_model.h5", "flax_model.msgpack", "openvino_model.bin"]
    for i, name in enumerate(ORDER):
        assert choose_weight_files([*ORDER[i:], *others], "model") == [name]
    assert choose_weight_files(others, "model") == []
    unet = ["diffusion_pytorch_model.bin", "diffusion_pytorch_model.fp16.safetensors"]
    assert choose_weight_files(unet, "diffusion_pytorch_model") == unet[:1]
    for pattern in ("model-{}.safetensors", "model.fp16-{}.safetensors", "model-{}.fp16.safetensors"):
        shards = [pattern.format(f"0000{i}-of-00002") for i in (1, 2)]
        assert choose_weight_files([*reversed(shards), "model.safetensors.index.json"], "model") == shards


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(32,), layers_per_block=1)


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("size", ["10GB", "100KB"])
@pytest.mark.parametrize("safe", [True, False])
def test_all_that_diffusers_writes_is_read(tmp_path, vae, variant, size, safe):
    vae.save_pretrained(tmp_path, variant=variant, max_shard_size=size, safe_serialization=safe)
    assert len(list(tmp_path.glob("*-of-*"))) > 1 if size == "100KB" else not list(tmp_path.glob("*-of-*"))
    assert same(read_folder_weights(tmp_path, "diffusion_pytorch_model"), vae.state_dict())


def test_incomplete_folders_are_refused(tmp_path, vae):
    with pytest.raises(FileNotFoundError) as error:
        read_folder_weights(tmp_path, "model")
    assert one_sentence(error.value, "holds no weights")
    with pytest.raises(FileNotFoundError) as error:
        read_folder_weights(tmp_path / "absent", "model")
    assert one_sentence(error.value)
    vae.save_pretrained(tmp_path, max_shard_size="100KB")
    next(tmp_path.glob("*00002-of*")).unlink()
    with pytest.raises(FileNotFoundError, match="shards") as error:
        read_folder_weights(tmp_path, "diffusion_pytorch_model")
    assert one_sentence(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Into a module
# ----------------------------------------------------------------------------------------------------------------------


def test_weights_are_cast_to_the_modules_type_by_copy():
    module, tensors = nn.Linear(3, 2, dtype=torch.bfloat16), {"weight": torch.randn(2, 3).half(), "bias": torch.ones(2)}
    load_strict(module, tensors, "file")
    assert module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(module.weight, tensors["weight"].bfloat16())
    tensors["bias"].zero_()
    assert (module.bias == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None])
def test_a_module_without_numbers_gets_copies_or_what_is_in_the_file(dtype):
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    tensors = {"weight": torch.randn(2, 3).half(), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match="NaN"):
        load_strict(module, tensors | {"bias": torch.full((2,), torch.nan)}, "file", dtype=dtype)
    load_strict(module, tensors, "file", dtype=dtype)
    for name, tensor in tensors.items():
        own = getattr(module, name)
        assert isinstance(own, nn.Parameter) and own.requires_grad
        assert torch.equal(own, tensor.to(dtype or tensor.dtype)) and own.dtype == (dtype or tensor.dtype)
        assert (own.data_ptr() == tensor.data_ptr()) == (dtype is None)


def test_a_sum_beyond_what_half_precision_holds_is_no_damage():
    module = nn.Linear(70_000, 1, bias=False)
    load_strict(module, {"weight": torch.ones(1, 70_000).half()}, "file")
    assert (module.weight == 1).all()


def test_what_does_not_fit_is_refused_whole():
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    cases = {
        "lacks 1 of 2 tensors, first 'bias'": {"weight": good["weight"]},
        "1 tensors too many, first 'colour'": good | {"colour": torch.ones(1)},
        r"'bias' with the shape \(3,\) where \(2,\)": good | {"bias": torch.ones(3)},
        "not quantised": good | {"bias": torch.ones(2, dtype=torch.int8)},
        "NaN": good | {"bias": torch.tensor([1.0, float("nan")])},
    }
    for words, tensors in cases.items():
        module = nn.Linear(3, 2)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        with pytest.raises(ValueError, match=words) as error:
            load_strict(module, tensors, "some/file")
        assert one_sentence(error.value, "some/file")
        assert same(before, module.state_dict())
    load_strict(nn.Linear(3, 2), good | {"vision_model.x": torch.ones(1)}, "file", ignore=("vision_model.",))


def test_old_attention_names_of_the_vae_are_understood(vae):
    """SD 1.x was published with diffusers 0.3, whose attention had other names and, for a while, 1×1 convolutions."""
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in vae.state_dict().items():
        if new := next((new for new in names if f".attentions.0.{new}." in name), None):
            name = name.replace(new, names[new])
            tensor = tensor[:, :, None, None] if name.endswith("key.weight") else tensor
        old[name] = tensor
    other = AutoencoderKL(block_out_channels=(32,), layers_per_block=1)
    load_strict(other, old, "file")
    assert same(other.state_dict(), vae.state_dict())


@pytest.mark.parametrize("there", ["", "text_model."])
@pytest.mark.parametrize("here", ["", "text_model."])
def test_clips_text_model_is_read_with_its_prefix_and_without(here, there):
    text_model = nn.ModuleDict({"final_layer_norm": nn.LayerNorm(4)})
    module = nn.ModuleDict({"text_model": text_model}) if here else text_model
    stored = {there + "final_layer_norm.weight": torch.full((4,), 2.0), there + "final_layer_norm.bias": torch.ones(4)}
    load_strict(module, stored | {there + "embeddings.position_ids": torch.arange(77)[None]}, "file")
    assert (text_model["final_layer_norm"].weight == 2).all()


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def test_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "model.safetensors"
    base = torch.randn(4, 6)
    tensors = {"turned": base.T, "tied": base, "part": base[1:3]}  # none of them is memory of its own
    write_safetensors(path, tensors, {"note": "x"})
    ours, metadata = read_checkpoint(path)
    assert same(ours, tensors) and metadata == {"format": "pt", "note": "x"}

    def disk_full(own, temporary, metadata):
        temporary.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    with pytest.raises(OSError, match="No space"):
        write_safetensors(path, {"other": torch.ones(2)})
    assert same(read_weights(path), tensors)
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]


# ----------------------------------------------------------------------------------------------------------------------
# The hub
# ----------------------------------------------------------------------------------------------------------------------


class Hub:
    """A hub with one model, in the layout of SD 1.5 with everything that was ever added to it."""

    files = """
        model_index.json README.md v1-5-pruned.ckpt v1-5-pruned.safetensors unet/config.json
        unet/diffusion_pytorch_model.safetensors unet/diffusion_pytorch_model.bin
        unet/diffusion_pytorch_model.fp16.bin unet/diffusion_pytorch_model.non_ema.safetensors
        vae/config.json vae/diffusion_pytorch_model.fp16.safetensors
        text_encoder/config.json text_encoder/model.safetensors text_encoder/pytorch_model.bin
        tokenizer/merges.txt tokenizer/vocab.json scheduler/scheduler_config.json
        safety_checker/config.json safety_checker/model.safetensors feature_extractor/preprocessor_config.json
    """.split()

    def __init__(self, monkeypatch, cache) -> None:
        self.cache, self.asked, self.error = cache, None, None
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self.model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot_download)

    def model_info(self, repository, timeout=None):
        if self.error:
            raise self.error
        return types.SimpleNamespace(siblings=[types.SimpleNamespace(rfilename=name) for name in self.files])

    def snapshot_download(self, repository, allow_patterns=None, local_files_only=False):
        if local_files_only and not self.cache.exists():
            raise errors.LocalEntryNotFoundError("not in the cache\nat all")
        self.asked = allow_patterns
        return str(self.cache)


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Hub:
    return Hub(monkeypatch, tmp_path / "cache")


def test_only_the_files_that_are_read_are_downloaded(hub):
    assert locate("owner/sd", "--pretrained") == hub.cache
    assert sorted(hub.asked) == [
        "model_index.json", "scheduler/scheduler_config.json", "text_encoder/config.json",
        "text_encoder/model.safetensors", "tokenizer/merges.txt", "tokenizer/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors",
    ]  # fmt: skip


def test_a_local_path_never_asks_the_hub(hub, tmp_path, monkeypatch):
    hub.error = AssertionError("asked the hub")
    (tmp_path / "owner" / "sd").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert locate("owner/sd", "--vae").is_dir()
    for name in [
        "./owner/none", "/owner/none", "a/b/c", "owner/none.ckpt", "none.safetensors", "none.pth", "", "a b", "a\0b",
        "~nosuchuser/sd", "~nosuchuser", "x" * 260 + ".pth",
    ]:  # fmt: skip
        with pytest.raises(FileNotFoundError) as error:
            locate(name, "--vae")
        assert one_sentence(error.value, "--vae", repr(name), "does not exist")


def test_without_a_network_the_cache_answers(hub):
    hub.error = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(FileNotFoundError) as error:
        locate("owner/sd", "--vae")
    assert one_sentence(error.value, "--vae", "owner/sd", "HF_HUB_OFFLINE")
    hub.error = TimeoutError("no answer\nafter 10 s")
    with pytest.raises(FileNotFoundError) as error:
        locate("owner/sd", "--vae")
    assert one_sentence(error.value, "--vae", "owner/sd", "no answer")
    hub.cache.mkdir()
    assert locate("owner/sd", "--vae") == hub.cache


@pytest.mark.parametrize("stem", ["adapter_model", "pytorch_lora_weights"])
def test_a_lora_is_downloaded_with_the_options_that_peft_keeps_beside_it(hub, monkeypatch, stem):
    monkeypatch.setattr(
        Hub, "files", ["README.md", "adapter_config.json", f"{stem}.safetensors", f"{stem}.bin", "a.png"]
    )
    locate("owner/lora", "the LoRA")
    assert sorted(hub.asked) == ["adapter_config.json", f"{stem}.safetensors"]


def test_the_only_file_of_a_lora_may_have_any_name(hub, monkeypatch):
    monkeypatch.setattr(Hub, "files", ["README.md", "pokemon-style-v2.safetensors", "a.png"])
    locate("owner/lora", "the LoRA", any_name=True)
    assert hub.asked == ["pokemon-style-v2.safetensors"]
    with pytest.raises(FileNotFoundError, match="no weights in the layout"):
        locate("owner/lora", "--vae")  # may be a whole model of many GB
    monkeypatch.setattr(Hub, "files", ["one.safetensors", "two.safetensors"])
    with pytest.raises(FileNotFoundError, match="no weights in the layout"):
        locate("owner/lora", "the LoRA", any_name=True)


def test_a_model_without_readable_weights_is_refused(hub, monkeypatch):
    monkeypatch.setattr(Hub, "files", ["README.md", "sd.ckpt", "config.json"])
    with pytest.raises(FileNotFoundError) as error:
        locate("owner/sd", "--vae")
    assert one_sentence(error.value, "no weights in the layout of diffusers")


def test_the_real_client_is_offline_in_tests():
    with pytest.raises(FileNotFoundError) as error:
        locate("owner/never-published", "--text_encoder")
    assert one_sentence(error.value, "--text_encoder", "owner/never-published")
