"""LoRA: layers, files of all layouts, and parity with diffusers and peft, which read and write the same files."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora
from published import lora_file, lora_files, read_lora, write_lora
from published.lora_files import fits
from stable_diffusion_model import StableDiffusion
from tests.test_interchange import assert_same, make_folder, open_both, ours, theirs
from tests.tiny import tiny_unet

INPUTS = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([10, 700]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("lora") / "sd1", 1)


def predict(unet: nn.Module) -> Tensor:
    context = torch.randn(2, 77, unet.config.context_dim, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(*INPUTS, context)


def with_changes(unet: nn.Module, which: str = "all", rank: int = 4, alpha: float = 6.0, seed: int = 0) -> nn.Module:
    """The U-Net with low-rank changes that are not zero."""
    torch.manual_seed(seed)
    for change in lora.add(unet, lora.targets(unet, which), rank, alpha):
        nn.init.normal_(change.up.weight, std=0.1)
    return unet


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm()).detach())


# ----------------------------------------------------------------------------------------------------------------------
# Layers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", list(lora.TARGETS))
def test_it_begins_as_the_model_that_it_changes(which: str) -> None:
    unet = tiny_unet()
    before, names = predict(unet), list(unet.state_dict())
    lora.add(unet, lora.targets(unet, which), 4, 4.0)
    assert torch.equal(predict(unet), before)
    assert [name for name in unet.state_dict() if ".changes." not in name] == names


def test_down_is_drawn_as_pytorch_draws_a_layer() -> None:
    torch.manual_seed(0)
    for layer, inputs in ((nn.Linear(256, 8), 256), (nn.Conv2d(32, 8, 3), 32 * 9)):
        (change,) = lora.add(nn.Sequential(layer), ["0"], 64, 1.0)
        assert float(change.down.weight.detach().std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.05)


def test_equation_3() -> None:
    """Both kinds of layer: beside the weight, and W + α/r · B A in its place."""
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(6, 5), torch.randn(3, 6)),
        (nn.Conv2d(6, 5, 3, stride=2, padding=1), torch.randn(3, 6, 8, 8)),
    ):
        network = nn.Sequential(layer)
        (change,) = lora.add(network, ["0"], 2, 3.0)
        nn.init.normal_(change.up.weight)
        lora.set_scale(network, "default", 0.5)
        low_rank = change.up.weight.flatten(1) @ change.down.weight.flatten(1)  # B A
        assert torch.linalg.matrix_rank(low_rank) == 2
        plain = copy.deepcopy(layer)
        plain.__class__ = lora.PLAIN[type(layer)]
        plain.weight = nn.Parameter(layer.weight + 0.5 * 3 / 2 * low_rank.view_as(layer.weight))
        del plain.changes
        assert relative_error(network(x), plain(x)) < 1e-5


def test_which_layers_are_changed() -> None:
    unet = tiny_unet()
    attention, more, most = (set(lora.targets(unet, which)) for which in ("attention", "feed_forward", "all"))
    assert attention < more < most
    assert {name.split(".attn")[1][2:] for name in attention} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {name.split(".ff.")[1] for name in more - attention} == {"net.0.proj", "net.2"}
    matrices = {name for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert {name.split(".")[-1] for name in matrices - most} == {
        "linear_1",
        "linear_2",
        "conv_in",
        "conv_out",
        "time_emb_proj",
    }
    with_changes(unet)  # they may have another beside the first
    assert [set(lora.targets(unet, which)) for which in lora.TARGETS] == [attention, more, most]
    assert len(lora.add(unet, lora.targets(unet), 2, 2.0, "second")) == len(attention)
    with pytest.raises(ValueError, match="the LoRA 'third' would change no layer"):
        lora.add(unet, [], 2, 2.0, "third")


def test_merged_or_beside_it_is_the_same() -> None:
    unet = with_changes(tiny_unet())
    weights = {name: p.clone() for name, p in unet.named_parameters()}
    beside = predict(unet)
    lora.merge(unet)
    assert relative_error(predict(unet), beside) < 2e-5
    lora.merge(unet)  # once is enough
    assert relative_error(predict(unet), beside) < 2e-5
    lora.set_scale(unet, "default", 0.5)  # stays merged
    assert all(layer.unmerged for layer in lora.adapted(unet).values())
    half = predict(unet)
    lora.unmerge(unet)
    assert relative_error(predict(unet), half) < 2e-5 < relative_error(half, beside)
    lora.set_scale(unet, "default", 1.0)
    assert torch.equal(predict(unet), beside)
    assert all(torch.equal(p, weights[name]) for name, p in unet.named_parameters())


@pytest.mark.parametrize("merged", [False, True])
def test_scale_0_and_removing_give_the_model_as_it_was(merged: bool) -> None:
    unet = tiny_unet()
    before, names = predict(unet), list(unet.state_dict())
    with_changes(unet)
    if merged:
        lora.merge(unet)
    assert not torch.equal(predict(unet), before)
    lora.set_scale(unet, "default", 0.0)
    assert torch.equal(predict(unet), before)
    lora.remove(unet)
    assert torch.equal(predict(unet), before)
    assert list(unet.state_dict()) == names
    assert not lora.adapted(unet)


def test_several_add_up() -> None:
    unet = tiny_unet()
    layers = lora.targets(unet)
    for name in ("first", "second"):
        for change in lora.add(unet, layers, 2, 2.0, name):
            nn.init.normal_(change.up.weight, std=0.1)
    layer = lora.adapted(unet)[layers[0]]
    own = layer.weight.clone()
    lora.merge(unet)
    total = sum(change.change() for change in layer.changes.values())
    torch.testing.assert_close(layer.weight, own + total)
    lora.add(unet, layers, 2, 2.0, "third")
    assert not any(layer.unmerged for layer in lora.adapted(unet).values())
    assert torch.equal(layer.weight, own)
    with pytest.raises(ValueError, match="there is a LoRA 'first' already"):
        lora.add(unet, layers, 2, 2.0, "first")
    with pytest.raises(ValueError, match="a GroupNorm cannot have low-rank changes"):
        lora.add(unet, ["conv_norm_out"], 2, 2.0)


@pytest.mark.parametrize("merged", [False, True])
def test_one_of_several_is_removed(merged: bool) -> None:
    unet = with_changes(tiny_unet(), "attention")
    alone = predict(unet)
    for change in lora.add(unet, lora.targets(unet, "all"), 2, 2.0, "other"):
        nn.init.normal_(change.up.weight, std=0.1)
    if merged:
        lora.merge(unet)
    lora.remove(unet, "other")
    assert lora.adapted(unet).keys() == set(lora.targets(tiny_unet(), "attention"))
    assert all(bool(layer.unmerged) == merged for layer in lora.adapted(unet).values())
    lora.unmerge(unet)
    assert torch.equal(predict(unet), alone)


@pytest.mark.parametrize("merged", [False, True])
def test_as_one_network_it_is_plain_and_afterwards_what_it_was(merged: bool) -> None:
    unet = tiny_unet()
    names = list(unet.state_dict())
    with_changes(unet)
    if merged:
        lora.merge(unet)
    out = predict(unet)
    with pytest.raises(RuntimeError, match="inside"), lora.as_one_network(unet):
        assert list(unet.state_dict()) == names
        assert not lora.adapted(unet)
        assert relative_error(predict(unet), out) < 2e-5
        raise RuntimeError("inside")
    assert torch.equal(predict(unet), out)
    assert all(bool(layer.unmerged) == merged for layer in lora.adapted(unet).values())


def test_negative_scales_and_low_precision_are_merged_as_they_are() -> None:
    unet = with_changes(tiny_unet())
    lora.set_scale(unet, "default", -0.5)
    beside = predict(unet)
    lora.merge(unet)
    assert relative_error(predict(unet), beside) < 2e-5
    low = with_changes(tiny_unet()).to(torch.bfloat16)
    layer = next(iter(lora.adapted(low).values()))
    expected = (layer.weight.float() + layer.changes["default"].change()).bfloat16()  # rounded once
    lora.merge(low)
    assert torch.equal(layer.weight, expected)


def test_it_is_unmerged_where_the_network_has_moved_meanwhile() -> None:
    unet = with_changes(tiny_unet())
    lora.merge(unet)
    unet.to(torch.bfloat16)
    lora.unmerge(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------------------------------------
# Files, and parity
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", list(lora.TARGETS))
def test_a_file_of_ours_gives_the_same_image_in_diffusers(folder: Path, tmp_path: Path, which: str) -> None:
    model, pipe = open_both(folder)
    base = ours(model, "ddim")
    write_lora(tmp_path / "fox.safetensors", with_changes(copy.deepcopy(model.unet), which))
    assert model.load_lora(tmp_path / "fox.safetensors", 0.8) == "fox"
    pipe.load_lora_weights(tmp_path / "fox.safetensors", adapter_name="fox")
    pipe.set_adapters("fox", 0.8)
    assert len(pipe.unet.peft_config["fox"].target_modules) > 0
    taken = sum(hasattr(module, "lora_A") for module in pipe.unet.modules())
    assert taken == len(lora.targets(tiny_like(model), which))  # every key is taken up
    image = ours(model, "ddim")
    assert_same(image, theirs(pipe, "ddim"))
    with pytest.raises(AssertionError):
        assert_same(base, image)

    context = torch.randn(2, 77, 64)
    with torch.no_grad():
        expected = pipe.unet(*INPUTS, context).sample
        assert relative_error(model.unet(*INPUTS, context), expected) < 2e-5
        lora.unmerge(model.unet)
        assert relative_error(model.unet(*INPUTS, context), expected) < 2e-5


def tiny_like(model: StableDiffusion) -> nn.Module:
    """Its U-Net without changes."""
    unet = copy.deepcopy(model.unet)
    lora.remove(unet)
    return unet


def their_file(pipe: StableDiffusionPipeline, path: Path, with_alpha: bool) -> dict[str, Tensor]:
    """A LoRA on U-Net and text encoder, as diffusers' training scripts write it; stays loaded in `pipe`."""
    torch.manual_seed(0)
    layers = {
        "unet": (pipe.unet, ["to_q", "to_out.0", "ff.net.2", "conv1"]),
        "text_encoder": (pipe.text_encoder, ["q_proj", "k_proj", "v_proj", "out_proj"]),
    }
    tensors, metadata = {}, {}
    for name, (network, which) in layers.items():
        alpha = 6 if with_alpha else 4
        inject_adapter_in_model(LoraConfig(r=4, lora_alpha=alpha, target_modules=which), network)
        for key, parameter in network.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
        tensors |= {f"{name}.{key}": t.detach().contiguous() for key, t in get_peft_model_state_dict(network).items()}
        metadata |= {f"{name}.r": 4, f"{name}.lora_alpha": alpha}
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if with_alpha else {"format": "pt"})
    return tensors


@pytest.mark.parametrize("with_alpha", [False, True])
def test_a_file_of_theirs_gives_their_image(folder: Path, tmp_path: Path, with_alpha: bool) -> None:
    model, pipe = open_both(folder)
    base = ours(model, "ddim")
    their_file(pipe, tmp_path / "pytorch_lora_weights.safetensors", with_alpha)
    model.load_lora(tmp_path)
    assert_same(ours(model, "ddim"), theirs(pipe, "ddim"))
    with pytest.raises(AssertionError):
        assert_same(base, ours(model, "ddim"))


@pytest.mark.parametrize(
    "options",
    [
        {"lora_alpha": 6},
        {"lora_alpha": 3, "use_rslora": True},
        {"lora_alpha": 6, "alpha_pattern": {"to_q": 1}},
        {"lora_alpha": 6, "alpha_pattern": {"conv2|conv1": 1}, "init_lora_weights": "gaussian"},
    ],
)
def test_a_folder_of_peft_gives_its_image(folder: Path, tmp_path: Path, options: dict) -> None:
    """peft keeps α in adapter_config.json alone."""
    model, pipe = open_both(folder)
    torch.manual_seed(0)
    network = get_peft_model(pipe.unet, LoraConfig(r=4, target_modules=["to_q", "to_out.0", "conv1"], **options))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path)
    model.load_lora(tmp_path)
    assert_same(ours(model, "ddim"), theirs(pipe, "ddim"))
    (tmp_path / "adapter_config.json").unlink()  # then α = r: another image
    other, _ = open_both(folder)
    other.load_lora(tmp_path)
    with pytest.raises(AssertionError):
        assert_same(ours(other, "ddim"), theirs(pipe, "ddim"))


def test_a_folder_of_peft_may_be_of_the_text_encoder(folder: Path, tmp_path: Path) -> None:
    model, pipe = open_both(folder)
    plain = model.encode_prompts(["a fox"])
    torch.manual_seed(0)
    network = get_peft_model(pipe.text_encoder, LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "fc1"]))
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    network.save_pretrained(tmp_path)
    model.load_lora(tmp_path)
    assert not torch.equal(model.encode_prompts(["a fox"]), plain)
    assert_same(ours(model, "ddim"), theirs(pipe, "ddim"))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_what_changed_the_base_weights_as_well_is_refused(tmp_path: Path, start: str) -> None:
    """peft's file is then half of what was learned. Other beginnings leave the base weights alone."""
    write_lora(tmp_path / "plain.safetensors", with_changes(tiny_unet()))
    tensors = load_file(tmp_path / "plain.safetensors")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for of_diffusers in (True, False):
        for value, refused in ((start, True), ("gaussian", False), ("eva", False), (True, False), (None, False)):
            if of_diffusers:
                path = tmp_path / "metadata.safetensors"
                config = json.dumps({"unet.init_lora_weights": value})
                save_file(tensors, path, {"lora_adapter_metadata": config})
            else:
                path = tmp_path / "adapter_model.safetensors"
                (tmp_path / "adapter_config.json").write_text(json.dumps({"init_lora_weights": value}))
            if not refused:
                assert read_lora(path)["unet"]
                continue
            with pytest.raises(ValueError, match=f"init_lora_weights='{start}', which changes the base weights") as e:
                read_lora(path)
            assert str(path) in str(e.value)


PATTERNS = (
    *("conv1|conv2", "conv2|conv1", "to_[qk]", "to_[^qk]", "to_.*", "attn1", "attn1.to_q", r"attn1\.to_q", "to_out.0"),
    *("^down_blocks.0.conv1", "^conv1", "conv1$", r".*\.attn\d\.to_k", r".*attn1.*to_(q|k)", "(to_q|to_out.0)"),
    *("attn2?.to_q", "a(ttn)", "to_(q|v|)", "", "|conv1", "conv1|", "[a-z]+1", r"\w+", r"[\w.]+q", "t*o*_*q*"),
    *("down_blocks.*", "own_blocks.*", ".*", "to", "to_q.", r"mid_block\..*|.*\.conv\d", "(^conv1|to_v$)"),
    *("x|(c(o|a)nv(1))", "(mid|down)_blocks?.*"),
)
LAYERS = (
    *("down_blocks.0.conv1", "conv1", "mid_block.resnets.1.conv2", "conv12", "a.attn.to_q", "a.attn2.to_q"),
    *(f"down_blocks.1.attentions.0.attn1.to_{end}" for end in ("q", "k", "v", "out.0", "")),
)


def test_patterns_of_alpha_mean_what_they_mean_to_peft() -> None:
    for pattern in PATTERNS:
        for layer in LAYERS:
            by_peft = get_pattern_key([pattern, ".*"], layer) == pattern
            assert fits(pattern, layer) == by_peft, (pattern, layer)


@pytest.mark.parametrize(
    "pattern", ["([a-z_0-9.]+)+X", "(a*)*", "((", "a)", ")(", "a{99999999999}", "(?:a)", "a**", "\\1", "["]
)
def test_patterns_that_would_take_years_are_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"is no simple pattern|has a bracket without"):
        fits(pattern, "a.b_a")
    assert not fits("(.|.)" * 40 + ".*" * 40 + "X", "a" * 80)  # `re` would need longer than there is


@pytest.mark.parametrize(
    "config",
    [
        {"unet.lora_alpha": 3, "unet.alpha_pattern": {"to_[qk]": 8.0}},
        {"unet.lora_alpha": 3},
        {"unet.lora_alpha": 3, "unet.use_rslora": "false"},
        {"unet.lora_alpha": 3, "unet.alpha_pattern": None},
    ],
)
def test_alpha_by_diffusers_metadata(tmp_path: Path, config: dict) -> None:
    write_lora(tmp_path / "a.safetensors", with_changes(tiny_unet(), rank=4, alpha=4.0))
    metadata = {"lora_adapter_metadata": json.dumps(config)}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    found = read_lora(tmp_path / "b.safetensors")["unet"]
    patterned = config.get("unet.alpha_pattern") is not None
    assert {name: change.alpha for name, change in found.items()} == {
        name: 8.0 if patterned and name.endswith(("to_q", "to_k")) else 3.0 for name in found
    }


def test_each_network_has_its_own_alpha(folder: Path, tmp_path: Path) -> None:
    """By diffusers' metadata; of several patterns, the first that fits."""
    _, pipe = open_both(folder)
    tensors = their_file(pipe, tmp_path / "a.safetensors", with_alpha=False)
    config = {
        "unet.lora_alpha": 3,
        "text_encoder.lora_alpha": 5,
        "unet.use_rslora": False,
        "text_encoder.use_rslora": True,
    }
    config |= {"unet.alpha_pattern": {"to_q": 8.0, "to_.*": 9.0}, "text_encoder.alpha_pattern": {"layers.0.*": 7.0}}
    save_file(tensors, tmp_path / "b.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    found = read_lora(tmp_path / "b.safetensors")
    for name, change in found["unet"].items():
        assert change.alpha == (8.0 if name.endswith("to_q") else 9.0 if "to_" in name else 3.0), name
    assert {("layers.0" in name, change.alpha) for name, change in found["text_encoder"].items()} <= {
        (True, 7.0 * 2), (False, 5.0 * 2),  # times the root of the rank
    }  # fmt: skip
    deep = {"lora_adapter_metadata": "[" * 200_000}
    save_file(tensors, tmp_path / "c.safetensors", deep)
    assert {change.alpha for change in read_lora(tmp_path / "c.safetensors")["unet"].values()} == {4.0}


def kohya(name: str) -> str:
    """diffusers' name in kohya's layout."""
    network, _, layer = name.partition(".")
    layer, end = layer.rsplit(".lora_", 1)
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[network]
    layer = layer.removeprefix("text_model.").replace(".", "_")
    return f"{prefix}{layer}.lora_{'down' if end[0] == 'A' else 'up'}.weight"


def kohya_with_ldm_names(name: str) -> str:
    numbered = kohya(name)
    for ours_, ldm in {
        "down_blocks_0_attentions_0": "input_blocks_1_1", "mid_block_attentions_0": "middle_block_1",
        "up_blocks_1_attentions_0": "output_blocks_2_1", "up_blocks_1_attentions_1": "output_blocks_3_1",
    }.items():  # fmt: skip
        numbered = numbered.replace(ours_, ldm)
    return numbered


def first_diffusers(name: str) -> str:
    if name.startswith("text_encoder."):
        for theirs_, first in (("q_proj", "to_q"), ("k_proj", "to_k"), ("v_proj", "to_v"), ("out_proj", "to_out")):
            name = name.replace(f".{theirs_}.lora_A", f".{first}_lora.down").replace(
                f".{theirs_}.lora_B", f".{first}_lora.up"
            )
        return name
    if not (".attn" in name and ".to_" in name):
        return old_diffusers(name)
    return (
        old_diffusers(name).replace(".to_", ".processor.to_").replace("to_out.0", "to_out").replace(".lora.", "_lora.")
    )


def old_diffusers(name: str) -> str:
    return name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")


def linear_layers(name: str) -> str:
    return name.replace(".lora_A.", ".lora_linear_layer.down.").replace(".lora_B.", ".lora_linear_layer.up.")


def kohya_of_sdxl_tools(name: str) -> str:
    return kohya(name).replace("lora_te_", "lora_te1_")


def without_prefix(name: str) -> str:
    return name.removeprefix("unet.")


def default_of_peft(name: str) -> str:
    prefix = "base_model.model." if name.startswith("unet.") else "text_encoder."
    return prefix + name.split(".", 1)[1].replace(".weight", ".default.weight")


def peft_in_front(name: str) -> str:
    return "base_model.model." + name.replace(".weight", ".default_0.weight")


def peft_behind(name: str) -> str:
    network, _, layer = name.partition(".")
    return f"{network}.base_model.model.{layer}"


@pytest.mark.parametrize(
    "layout",
    [
        *(kohya, kohya_of_sdxl_tools, kohya_with_ldm_names, first_diffusers, old_diffusers, linear_layers),
        *(default_of_peft, peft_in_front, peft_behind, without_prefix),
    ],
)
def test_every_layout_says_the_same(folder: Path, tmp_path: Path, layout: Callable[[str], str]) -> None:
    model, pipe = open_both(folder)
    tensors = their_file(pipe, tmp_path / "diffusers.safetensors", with_alpha=False)
    renamed = {layout(name): tensor for name, tensor in tensors.items()}
    assert len(renamed) == len(tensors)
    assert layout == without_prefix or not renamed.keys() & tensors.keys()
    alphas = {kohya: torch.float32, kohya_of_sdxl_tools: torch.int64, kohya_with_ldm_names: torch.float16}
    by_kohya = layout in alphas
    if by_kohya:
        ends = [name for name in renamed if name.endswith(".lora_down.weight")]
        half = torch.tensor(2, dtype=alphas[layout])  # of the rank
        renamed |= {name.replace("lora_down.weight", "alpha"): half.clone() for name in ends}
    save_file(renamed, tmp_path / "other.safetensors")
    model.load_lora(tmp_path / "diffusers.safetensors", 0.5 if by_kohya else 1.0)
    expected = ours(model, "ddim")
    model, _ = open_both(folder)
    model.load_lora(tmp_path / "other.safetensors")
    assert_same(ours(model, "ddim"), expected)


def test_alpha_may_be_a_number_in_a_pickle(tmp_path: Path) -> None:
    matrices = {"lora_unet_a.lora_down.weight": torch.ones(4, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 4)}
    for alpha in (1, 0.5, torch.tensor(2.0)):
        torch.save(matrices | {"lora_unet_a.alpha": alpha}, tmp_path / "a.pt")
        assert read_lora(tmp_path / "a.pt")["unet"]["a"].alpha == float(alpha)
    torch.save(matrices | {"lora_unet_a.alpha": "much"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="the α of lora_unet_a cannot be read"):
        read_lora(tmp_path / "a.pt")


def test_writing_multiplies_alpha_in_and_reading_gives_it_back(tmp_path: Path) -> None:
    unet = with_changes(tiny_unet(), rank=4, alpha=6.0)
    write_lora(tmp_path / "a.safetensors", unet)
    found = read_lora(tmp_path / "a.safetensors")
    layers = lora.adapted(unet)
    assert found["unet"].keys() == layers.keys()
    assert not found["text_encoder"]
    for name, (down, up, alpha) in found["unet"].items():
        assert alpha == len(down) == 4
        change = layers[name].changes["default"]
        torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).flatten(), change.change().flatten())


def test_of_several_one_is_written(tmp_path: Path) -> None:
    """Where it is: another one may change other layers."""
    unet = with_changes(tiny_unet(), "attention")
    layers = [name for name in lora.targets(unet, "all") if "conv1" in name]
    lora.add(unet, layers, 2, 2.0, "other")
    for name, changed in (("other", layers), ("default", lora.targets(tiny_unet()))):
        write_lora(tmp_path / "a.safetensors", unet, name)
        assert read_lora(tmp_path / "a.safetensors")["unet"].keys() == set(changed)
    with pytest.raises(ValueError, match="the U-Net has no LoRA 'third'"):
        write_lora(tmp_path / "b.safetensors", unet, "third")
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("alpha", "written"),
    [(4.0, torch.float16), (0.04, torch.float16), (4e7, torch.float32), (4e-5, torch.float32), (4e-9, torch.float32)],
)
def test_what_half_precision_cannot_hold_is_written_in_float32(
    tmp_path: Path, alpha: float, written: torch.dtype
) -> None:
    """Times `up`, which is about 0.1: above 65,504; below 6e-5, where digits are lost; below 6e-8, where all are."""
    unet = with_changes(tiny_unet(), rank=4, alpha=alpha)
    write_lora(tmp_path / "a.safetensors", unet, dtype=torch.float16)
    layers = lora.adapted(unet)
    for name, (down, up, _) in read_lora(tmp_path / "a.safetensors")["unet"].items():
        assert (down.dtype, up.dtype) == (torch.float16, written)
        expected = layers[name].changes["default"].up.weight * alpha / 4
        assert relative_error(up.float(), expected) < 1e-3
    write_lora(tmp_path / "b.safetensors", with_changes(tiny_unet()), dtype=torch.bfloat16)
    assert {up.dtype for _, up, _ in read_lora(tmp_path / "b.safetensors")["unet"].values()} == {torch.bfloat16}


def test_a_model_with_loras(folder: Path, tmp_path: Path) -> None:
    """Two at once, turned up and down, written as one model, named in the image's text."""
    model, _ = open_both(folder)
    base = ours(model, "ddim")
    paths = [tmp_path / "a b.safetensors", tmp_path / "update.safetensors"]
    for seed, path in enumerate(paths):
        write_lora(path, with_changes(copy.deepcopy(tiny_like(model)), seed=seed))
    one, other = (model.load_lora(path, 0.5) for path in paths)
    assert model.load_lora(paths[0], 0) not in (one, other)  # once more, under another name
    changed = ours(model, "ddim")
    (image,) = model.sample(["a fox"], steps=1, height=64, width=64, progress=False)
    assert f"LoRA: {one}:0.5, {other}:0.5, a_b_:0" in image.info["parameters"].replace('"', "")
    model.save_pretrained(tmp_path / "whole")
    model.export(tmp_path / "whole.safetensors")
    assert_same(ours(model, "ddim"), changed)
    assert_same(ours(StableDiffusion.from_pretrained(tmp_path / "whole", "cpu"), "ddim"), changed)
    assert not any("changes" in name for name in load_file(tmp_path / "whole.safetensors"))
    for name in (one, other):
        model.set_lora_scale(name, 0)
    assert torch.equal(ours(model, "ddim")[0], base[0])
    with pytest.raises(ValueError, match="loaded are a_b"):
        model.set_lora_scale("c", 1)
    with pytest.raises(ValueError, match="scale must be finite"):
        model.set_lora_scale(one, float("nan"))
    loaded = dict(model.loras)
    with pytest.raises(ValueError, match="must be a finite number, not inf"):
        model.load_lora(paths[0], float("inf"))
    assert model.loras == loaded


def test_a_lora_is_unloaded(folder: Path, tmp_path: Path) -> None:
    model, pipe = open_both(folder)
    base = ours(model, "ddim")
    weights = {name: t.clone() for name, t in model.unet.state_dict().items()}
    their_file(pipe, tmp_path / "both.safetensors", with_alpha=True)
    write_lora(tmp_path / "fox.safetensors", with_changes(copy.deepcopy(model.unet)))
    model.load_lora(tmp_path / "fox.safetensors", 0.5)
    fox = ours(model, "ddim")
    model.load_lora(tmp_path / "both.safetensors")
    with pytest.raises(ValueError, match="LoRA 'wolf' is not loaded; loaded are fox, both"):
        model.unload_lora("wolf")
    model.unload_lora("both")
    assert torch.equal(ours(model, "ddim")[0], fox[0])
    assert not lora.adapted(model.text_encoder.model)
    (image,) = model.sample(["a fox"], steps=1, height=64, width=64, progress=False)
    assert "LoRA: fox:0.5" in image.info["parameters"].replace('"', "")
    assert "both" not in image.info["parameters"]
    model.unload_lora("fox")
    assert model.unet.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[name]) for name, t in model.unet.state_dict().items())
    assert torch.equal(ours(model, "ddim")[0], base[0])
    with pytest.raises(ValueError, match="loaded are none"):
        model.unload_lora("fox")
    assert model.load_lora(tmp_path / "fox.safetensors", 0.5) == "fox"
    assert torch.equal(ours(model, "ddim")[0], fox[0])


def test_what_is_loaded_has_the_models_precision_and_is_not_trained(folder: Path, tmp_path: Path) -> None:
    model = StableDiffusion.from_pretrained(folder, "cpu", torch.bfloat16)
    write_lora(tmp_path / "a.safetensors", with_changes(tiny_like(model).float()))
    model.load_lora(tmp_path / "a.safetensors")
    for layer in lora.adapted(model.unet).values():
        assert {(p.dtype, p.requires_grad) for p in layer.changes.parameters()} == {(torch.bfloat16, False)}


def test_a_lora_of_which_one_half_fits_changes_nothing(folder: Path, tmp_path: Path) -> None:
    model, pipe = open_both(folder)
    tensors = their_file(pipe, tmp_path / "a.safetensors", with_alpha=False)
    tensors = {name.replace("q_proj", "no_such_layer"): t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="which the text encoder of this model does not have"):
        model.load_lora(tmp_path / "a.safetensors")
    assert not lora.adapted(model.unet)
    assert not model.loras


@pytest.mark.parametrize("stopped_in", ["add_to", "merge"])
def test_a_lora_whose_loading_was_interrupted_leaves_nothing(
    folder: Path, tmp_path: Path, stopped_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, pipe = open_both(folder)
    write_lora(tmp_path / "fox.safetensors", with_changes(copy.deepcopy(model.unet), "attention"))
    their_file(pipe, tmp_path / "all.safetensors", with_alpha=True)
    model.load_lora(tmp_path / "fox.safetensors")
    before, calls = ours(model, "ddim"), []

    def interrupted(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3 - (stopped_in == "merge"):
            raise KeyboardInterrupt
        return function(*arguments)

    owner = lora_files if stopped_in == "add_to" else lora
    function = getattr(owner, stopped_in)
    monkeypatch.setattr(owner, stopped_in, interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.load_lora(tmp_path / "all.safetensors")
    monkeypatch.undo()
    assert list(model.loras) == ["fox"]
    assert torch.equal(ours(model, "ddim")[0], before[0])
    assert model.load_lora(tmp_path / "all.safetensors") == "all"


def test_the_text_encoders_changes_are_saved_with_the_model(folder: Path, tmp_path: Path) -> None:
    model, pipe = open_both(folder)
    tensors = their_file(pipe, tmp_path / "both.safetensors", with_alpha=False)
    only = {name: tensor for name, tensor in tensors.items() if name.startswith("text_encoder.")}
    save_file(only, tmp_path / "text.safetensors")
    plain = model.encode_prompts(["a fox"])
    model.load_lora(tmp_path / "text.safetensors")
    changed = model.encode_prompts(["a fox"])
    assert not torch.equal(changed, plain)
    model.save_pretrained(tmp_path / "whole")
    saved = StableDiffusion.from_pretrained(tmp_path / "whole", "cpu")
    assert relative_error(saved.encode_prompts(["a fox"]), changed) < 1e-6


def test_a_1x1_convolution_may_be_written_with_its_ones(folder: Path, tmp_path: Path) -> None:
    model, _ = open_both(folder)
    name = next(n for n, layer in model.unet.named_modules() if n.endswith("proj_in") and layer.weight.ndim == 4)
    outputs, inputs = model.unet.get_submodule(name).weight.shape[:2]
    down, up = torch.randn(2, inputs), torch.randn(outputs, 2)
    for file, shape in (("flat", ()), ("square", (1, 1))):
        tensors = {"lora_A": down.reshape(*down.shape, *shape), "lora_B": up.reshape(*up.shape, *shape)}
        save_file({f"unet.{name}.{k}.weight": t for k, t in tensors.items()}, tmp_path / f"{file}.safetensors")
        model.load_lora(tmp_path / f"{file}.safetensors")
    changes = [*model.unet.get_submodule(name).changes.values()]
    assert torch.equal(changes[0].change(), changes[1].change())


# ----------------------------------------------------------------------------------------------------------------------
# Bad files
# ----------------------------------------------------------------------------------------------------------------------


def spoil(tensors: dict[str, Tensor], how: str, path: Path) -> None:
    name = next(iter(tensors))
    if how == "other base":
        tensors = {k: torch.randn(4, 2 * t.shape[1], *t.shape[2:]) if "lora_A" in k else t for k, t in tensors.items()}
    elif how == "other layers":
        tensors = {k.replace("mid_block", "mid_blocks"): t for k, t in tensors.items()}
    elif how == "other rank":
        tensors[name] = tensors[name][:2].clone()
    elif how == "rank 0":
        tensors = {k: (t[:0] if "lora_A" in k else t[:, :0]).clone() for k, t in tensors.items()}
    elif how in ("nan", "nan in up"):
        name = name if how == "nan" else name.replace("lora_A", "lora_B")
        tensors[name] = tensors[name] * float("nan")
    elif how == "integers":
        tensors = {k: t.to(torch.int8) for k, t in tensors.items()}
    elif how == "half is missing":
        del tensors[name]
    elif how == "up of 3x3":
        name = next(k for k in tensors if tensors[k].ndim == 4 and "lora_B" in k)
        tensors[name] = tensors[name].expand(-1, -1, 3, 3).contiguous()
    elif how == "one layer twice":
        key = name.partition(".lora_")[0]
        for old, new in ((".lora_A.weight", ".lora_down.weight"), (".lora_B.weight", ".lora_up.weight")):
            tensors["lora_unet_" + key.removeprefix("unet.").replace(".", "_") + new] = tensors[key + old].clone()
    elif how == "one name twice":
        key = name.partition(".lora_")[0]
        for old, new in ((".lora_A.weight", ".lora.down.weight"), (".lora_B.weight", ".lora.up.weight")):
            tensors[key + new] = tensors[key + old].clone()
    elif how == "complex":
        tensors = {k: t.to(torch.complex64) for k, t in tensors.items()}
    elif how in ("alpha of nan", "alpha of two", "alpha of none"):
        alpha = {"nan": torch.tensor(float("nan")), "two": torch.ones(2), "none": torch.ones(0)}[how.split()[-1]]
        tensors[name.partition(".lora_")[0] + ".alpha"] = alpha
    elif how == "dora":
        tensors[name.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(4)
    elif how == "a whole model":
        tensors = {"unet.conv_in.weight": torch.ones(2)}
    elif how == "nothing":
        tensors = {"x.alpha": torch.ones(())}
    if how == "a pickle":
        torch.save(nn.Linear(2, 2), path)
    else:
        options = {"alpha of infinity": {"unet.lora_alpha": math.inf}, "alpha of a list": {"unet.lora_alpha": [1]}}
        options |= {"pattern": {"unet.alpha_pattern": {"(": 1}}, "options in a list": []}
        options |= {"nested pattern": {"unet.alpha_pattern": {"([a-z_0-9.]+)+X": 1}}}
        options |= {"a huge repetition": {"unet.alpha_pattern": {"a{99999999999}": 1}}}
        options |= {"a huge alpha": {"unet.lora_alpha": 10**400}, "pissa": {"unet.init_lora_weights": "pissa"}}
        save_file(tensors, path, {"lora_adapter_metadata": json.dumps(options[how])} if how in options else None)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("other base", "it was made for another base model"),
        ("other layers", "does not have: it was made for another base model"),
        ("other rank", "do not fit each other"),
        ("rank 0", "do not fit each other"),
        ("nan", "not finite"),
        ("nan in up", "not finite"),
        ("integers", "complex or integer"),
        ("up of 3x3", "do not fit each other"),
        ("one layer twice", "twice, under two names"),
        ("one name twice", "twice, in two layouts"),
        ("complex", "are sparse, empty, complex or integer"),
        ("alpha of nan", "is nan, not a finite number"),
        ("alpha of infinity", "is inf, not a finite number"),
        ("alpha of two", "cannot be read"),
        ("alpha of none", "cannot be read"),
        ("alpha of a list", "cannot be read"),
        ("pattern", "cannot be read"),
        ("nested pattern", "is no simple pattern of names"),
        ("a huge repetition", "is no simple pattern of names"),
        ("a huge alpha", "cannot be read"),
        ("pissa", "changes the base weights, too"),
        ("options in a list", "cannot be read"),
        ("half is missing", "is not \\(only\\) a LoRA"),
        ("dora", "lora_magnitude_vector"),
        ("a whole model", "unet.conv_in.weight"),
        ("nothing", "x.alpha"),
        ("a pickle", "pickle under a false name"),
        ("truncated", "cut short or damaged"),
    ],
)
def test_bad_files_are_one_sentence_and_change_nothing(folder: Path, tmp_path: Path, how: str, message: str) -> None:
    model = StableDiffusion.from_pretrained(folder, "cpu")
    write_lora(tmp_path / "good.safetensors", with_changes(copy.deepcopy(model.unet)))
    spoil(load_file(tmp_path / "good.safetensors"), how, tmp_path / "bad.safetensors")
    before = {name: t.clone() for name, t in model.unet.state_dict().items()}
    with pytest.raises(ValueError, match=message) as raised:
        model.load_lora(tmp_path / "bad.safetensors")
    assert "\n" not in str(raised.value)
    assert "bad.safetensors" in str(raised.value)
    after = model.unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not model.loras


def test_where_a_file_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the LoRA '\./nowhere' does not exist"):
        lora_file("./nowhere")
    with pytest.raises(FileNotFoundError, match="holds no LoRA; pass the file"):
        lora_file(tmp_path)
    for name in ("~nosuchuser/lora", "/dev/null", "./" + "x" * 300 + ".safetensors"):
        with pytest.raises(FileNotFoundError, match=r"the LoRA '.*' (does not exist|is no file and no folder)"):
            lora_file(name)
    save_file({"a": torch.ones(1)}, tmp_path / "any.safetensors")
    assert lora_file(tmp_path)[0].name == "any.safetensors"
    save_file({"a": torch.ones(1)}, tmp_path / "another.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"holds 2 \.safetensors files \(another.safetensors, any.safetensors\)"
    ):
        lora_file(tmp_path)
    for name in ("adapter_model.bin", "pytorch_lora_weights.bin", "pytorch_lora_weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
        assert lora_file(tmp_path)[0].name == name


def test_a_lora_is_called_by_what_says_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not all of a user's are called "lora", nor by a commit of the hub."""
    for name, called in {
        "foxes/lora/pytorch_lora_weights.safetensors": "foxes",
        "foxes/best_lora/pytorch_lora_weights.safetensors": "foxes_best",
        "my foxes/pytorch_lora_weights.bin": "my_foxes",
        "of peft/adapter_model.safetensors": "of_peft",
        "fox.v2.safetensors": "fox_v2",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        assert lora_file(path) == (path, called)
        if path.parent != tmp_path:
            assert lora_file(path.parent) == (path, called)
        if path.parent.name == "lora":
            assert lora_file(path.parent.parent) == (path, called)  # the run's folder
        monkeypatch.chdir(path.parent)
        assert lora_file(f"./{path.name}")[1] == called
    monkeypatch.setattr("published.lora_files.locate", lambda *_, **how: tmp_path / "foxes" / "lora")
    assert lora_file("somebody/foxes-of-old")[1] == "somebody_foxes_of_old"
    assert lora_files._name_of("/", Path("/lora/pytorch_lora_weights.safetensors")) == "lora"  # a disk's own folder
