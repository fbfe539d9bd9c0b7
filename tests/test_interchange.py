"""Published layouts in, ours out: folders and single files as diffusers and transformers write them, random and narrow.

Every folder here is made by the libraries that publish them, opened by ours, and must give what diffusers' own pipeline
gives for the same prompt, noise and scheduler.
"""

import dataclasses
import json
import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

from diffusion_model import UNet
from noise_schedule import NoiseSchedule
from published import load_model, load_text_encoder, load_vae
from published.weight_files import read_folder_weights, read_json
from samplers import timestep_grid
from stable_diffusion_model import StableDiffusion
from tests.tiny import tiny_unet, tiny_vae

PROMPT, NEGATIVE = "a small red fox", "blue water"
SCHEDULERS = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler, "dpm++2m": DPMSolverMultistepScheduler}
# scheduler/scheduler_config.json of runwayml/stable-diffusion-v1-5 and of stabilityai/stable-diffusion-2-1
SD1_SCHEDULER = {
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
    "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
    "trained_betas": None, "clip_sample": False,
}  # fmt: skip
SD2_SCHEDULER = SD1_SCHEDULER | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}


# ----------------------------------------------------------------------------------------------------------------------
# Folders as they are published
# ----------------------------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer that knows letters, a few pairs of them and its two marks; returns its number of words."""
    letters = list(string.ascii_lowercase + string.digits + ",.-'!")
    merges = ["r e", "re d</w>", "o x</w>", "f ox</w>"]
    words = ["!", *[c for c in letters if c != "!"], *[c + "</w>" for c in letters]]
    words += [merge.replace(" ", "") for merge in merges] + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(words)


def make_folder(folder: Path, version: int, full_size: bool = False, **save_options) -> Path:
    """A folder in the layout of SD 1.5 or 2.1 with everything but the size, or with that as well."""
    torch.manual_seed(version)
    words = write_tokenizer(folder / "tokenizer")
    if version == 2:
        path = folder / "tokenizer" / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"'))
    text_config = CLIPTextConfig(
        vocab_size=words, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1,
        hidden_act=["quick_gelu", "gelu"][version - 1], bos_token_id=words - 2, eos_token_id=words - 1,
    )  # fmt: skip
    unet_config = {
        "block_out_channels": (64, 128), "layers_per_block": 1, "cross_attention_dim": 64, "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": [8, [1, 2]][version - 1], "use_linear_projection": version == 2,
        "upcast_attention": version == 2,
    }  # fmt: skip
    vae_config = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
    if full_size:
        width, layers, heads = [(768, 12, 12), (1024, 23, 16)][version - 1]
        text_config.hidden_size, text_config.intermediate_size = width, 4 * width
        text_config.num_hidden_layers, text_config.num_attention_heads = layers, heads
        text_config.vocab_size = 49408  # the table is CLIP's, though the little tokenizer reaches only its start
        unet_config = {"cross_attention_dim": width, "attention_head_dim": [8, [5, 10, 20, 20]][version - 1]}
        unet_config |= {"use_linear_projection": version == 2, "upcast_attention": version == 2}
        vae_config = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    unet = UNet2DConditionModel(**unet_config)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)  # so that the prediction is as large as a trained one's
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **vae_config
    )
    pipe = StableDiffusionPipeline(
        vae, CLIPTextModel(text_config).eval(), AutoTokenizer.from_pretrained(folder / "tokenizer"), unet,
        DDIMScheduler.from_config(SD1_SCHEDULER), None, None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder, **save_options)
    set_scheduler(folder, [SD1_SCHEDULER, SD2_SCHEDULER][version - 1])
    return folder


def set_scheduler(folder: Path, config: dict) -> None:
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", config["_class_name"]]
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def sd1(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd1"), 1)


@pytest.fixture(scope="module")
def sd2(tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sd2"), 2)


@pytest.fixture
def folder(sd1, tmp_path) -> Path:
    """A copy of the SD 1 folder to change."""
    return Path(shutil.copytree(sd1, tmp_path / "copy"))


# ----------------------------------------------------------------------------------------------------------------------
# The same image here and there
# ----------------------------------------------------------------------------------------------------------------------


def ours(model: StableDiffusion, sampler: str, **options) -> tuple[torch.Tensor, np.ndarray]:
    """(latents after the last step, image) of our own sampling."""
    seen = []
    (image,) = model.sample(
        [PROMPT], negative_prompts=[NEGATIVE], steps=5, sampler=sampler, guidance_scale=6.0, seeds=3, height=64,
        width=64, progress=False, callback=lambda step, t, x, x0: seen.append(x), **options,
    )  # fmt: skip
    return seen[-1], np.asarray(image).astype(int)


def theirs(pipe: StableDiffusionPipeline, sampler: str) -> tuple[torch.Tensor, np.ndarray]:
    """The same of diffusers' pipeline with the sampler it calls by another name, configured by the folder."""
    pipe.set_progress_bar_config(disable=True)
    config = dict(pipe.scheduler.config) | {"clip_sample": False}
    pipe.scheduler = SCHEDULERS[sampler].from_config(config)
    seen = []

    def look(pipe, step, t, values):
        seen.append(values["latents"])
        return values

    image = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=5, guidance_scale=6.0, height=64, width=64,
        generator=torch.Generator("cpu").manual_seed(3), callback_on_step_end=look,
    ).images[0]  # fmt: skip
    return seen[-1], np.asarray(image).astype(int)


def assert_same(here: tuple[torch.Tensor, np.ndarray], there: tuple[torch.Tensor, np.ndarray]) -> None:
    relative = (here[0] - there[0]).norm() / there[0].norm()
    assert relative < 1e-3, f"latents differ by {relative:.2g}"
    assert (np.abs(here[1] - there[1]) <= 1).mean() >= 0.999
    assert here[1].std() > 5  # an image, not a plain grey


def open_both(folder: Path) -> tuple[StableDiffusion, StableDiffusionPipeline]:
    return StableDiffusion.from_pretrained(folder, device="cpu"), StableDiffusionPipeline.from_pretrained(folder)


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_a_published_folder_gives_the_same_image_as_in_diffusers(request, version, sampler):
    model, pipe = open_both(request.getfixturevalue(version))
    assert model.schedule.prediction_type == {"sd1": "epsilon", "sd2": "v_prediction"}[version]
    assert_same(ours(model, sampler), theirs(pipe, sampler))


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_the_full_size_gives_the_same_image_as_in_diffusers(tmp_path, version):
    """860 M parameters and more, twice, in float32: about 10 GB of memory and 5 GB of disk."""
    model, pipe = open_both(make_folder(tmp_path / "sd", version, full_size=True))
    count = sum(parameter.numel() for parameter in model.unet.parameters())
    assert count == {1: 859_520_964, 2: 865_910_724}[version]
    for sampler in SCHEDULERS:
        assert_same(ours(model, sampler), theirs(pipe, sampler))


CONFIGS = {
    "zero terminal SNR": ("sd2", SD2_SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}),
    "DDIM ends at one": ("sd1", SD1_SCHEDULER | {"_class_name": "DDIMScheduler", "set_alpha_to_one": True}),
    "Karras": ("sd1", SD1_SCHEDULER | {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}),
    "ends at sigma_min": ("sd1", SD1_SCHEDULER | {"_class_name": "DPMSolverMultistepScheduler",
                                                  "final_sigmas_type": "sigma_min", "timestep_spacing": "linspace"}),
    "linear": ("sd1", {"_class_name": "DDIMScheduler", "beta_start": 0.0001, "beta_end": 0.02,
                       "beta_schedule": "linear", "num_train_timesteps": 1000, "clip_sample": True, "steps_offset": 0}),
    "silent": ("sd1", {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear", "steps_offset": 1}),
}  # fmt: skip


@pytest.mark.parametrize("sampler", SCHEDULERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_scheduler_config_is_honoured_as_diffusers_would(request, tmp_path, name, sampler):
    version, config = CONFIGS[name]
    folder = Path(shutil.copytree(request.getfixturevalue(version), tmp_path / "copy"))
    set_scheduler(folder, config)
    model, pipe = open_both(folder)
    assert_same(ours(model, sampler), theirs(pipe, sampler))


def test_unknown_options_of_a_foreign_config_are_refused(folder):
    path = folder / "unet" / "config.json"
    good = json.loads(path.read_text())
    for option, value in {"class_embed_type": "timestep", "resnet_time_scale_shift": "scale_shift", "new": 1}.items():
        path.write_text(json.dumps(good | {option: value}))
        with pytest.raises(ValueError, match=option):
            StableDiffusion.from_pretrained(folder, device="cpu")


# ----------------------------------------------------------------------------------------------------------------------
# The many ways to store the same weights
# ----------------------------------------------------------------------------------------------------------------------


def weights(model: StableDiffusion) -> dict[str, torch.Tensor]:
    parts = {"unet": model.unet, "vae": model.vae, "text": model.text_encoder.model}
    return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]


@pytest.mark.parametrize(
    "options",
    [{"max_shard_size": "300KB"}, {"safe_serialization": False}, {"variant": "fp16"},
     {"variant": "fp16", "max_shard_size": "300KB"}],
    ids=["sharded", "pickled", "fp16", "fp16 in shards"],
)  # fmt: skip
def test_every_way_to_store_a_folder_is_read(sd1, tmp_path, options):
    make_folder(tmp_path / "sd", 1, **options)
    if "variant" not in options:
        assert not (tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors").exists()
    here, there = (StableDiffusion.from_pretrained(path, device="cpu") for path in (tmp_path / "sd", sd1))
    assert_equal(weights(here), weights(there))


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_the_text_encoder_is_read_with_its_old_prefix_and_without(sd1, folder, prefix):
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {prefix + name.removeprefix("text_model."): tensor for name, tensor in load_file(path).items()}
    tensors[prefix + "embeddings.position_ids"] = torch.arange(77)[None]  # in old folders
    save_file(tensors, path)
    here, there = (StableDiffusion.from_pretrained(path, device="cpu") for path in (folder, sd1))
    assert_equal(weights(here), weights(there))


def test_what_a_folder_need_not_hold(folder):
    """A safety checker that was not downloaded, and files nobody reads."""
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("hello")
    StableDiffusion.from_pretrained(folder, device="cpu")


def test_a_model_is_read_in_the_type_that_it_is_to_have(folder, tmp_path, monkeypatch):
    """As if it were read in float32 and cast, which takes three times the memory."""
    asked = []
    monkeypatch.setattr(
        "stable_diffusion_model.load_model", lambda path, dtype: load_model(path, asked.append(dtype) or dtype)
    )
    whole = StableDiffusion.from_pretrained(folder, "cpu")
    whole.export(tmp_path / "model.safetensors")
    whole.to("cpu", torch.bfloat16)
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    for source in (folder, tmp_path / "model.safetensors"):
        parts = load_model(source, torch.bfloat16)
        assert {p.dtype for p in parts.unet.parameters()} == {torch.bfloat16}
        assert_equal(parts.vae.state_dict(), load_model(source).vae.state_dict())  # which computes in float32
        assert {p.dtype for p in parts.vae.parameters()} == {torch.float32}
        assert_equal(weights(StableDiffusion.from_pretrained(source, "cpu", torch.bfloat16)), weights(whole))
    assert asked == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_a_model_is_read_as_it_lies_in_the_file(folder, tmp_path, monkeypatch):
    """For those that make copies of their own: here there are none yet."""
    read = []
    monkeypatch.setattr(
        "published.whole_models.read_folder_weights", lambda *at: read.append(read_folder_weights(*at)) or read[-1]
    )
    StableDiffusion.from_pretrained(folder, "cpu").save_pretrained(tmp_path, torch.float16)
    read.clear()
    for dtype in (None, torch.float16):
        state = load_model(tmp_path, dtype).unet.state_dict()
        in_file = next(tensors for tensors in read if tensors.keys() == state.keys())
        assert {p.dtype for p in state.values()} == {torch.float16}
        assert all((state[name].data_ptr() == t.data_ptr()) == (dtype is None) for name, t in in_file.items())
        read.clear()


# ----------------------------------------------------------------------------------------------------------------------
# Ours, elsewhere
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_what_is_saved_here_opens_in_diffusers_and_gives_the_same_image(request, tmp_path, version):
    model = StableDiffusion.from_pretrained(request.getfixturevalue(version), device="cpu")
    model.save_pretrained(tmp_path / "ours")
    again, pipe = open_both(tmp_path / "ours")
    assert pipe.safety_checker is None
    assert_equal(weights(model), weights(again))
    assert_same(ours(again, "ddim"), theirs(pipe, "ddim"))
    assert_same(ours(again, "euler"), theirs(pipe, "euler"))


@pytest.mark.parametrize("version", ["sd1", "sd2"])
def test_one_file_gives_the_same_image_here_and_in_diffusers(request, tmp_path, version):
    source = request.getfixturevalue(version)
    model = StableDiffusion.from_pretrained(source, device="cpu")
    path = tmp_path / "model.safetensors"
    model.export(path)
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    again = StableDiffusion.from_pretrained(path, device="cpu")
    assert_equal(weights(model), weights(again))
    assert again.schedule == model.schedule
    pipe = StableDiffusionPipeline.from_single_file(
        path, config=str(source), local_files_only=True, safety_checker=None
    )
    pipe.scheduler = DDIMScheduler.from_config([SD1_SCHEDULER, SD2_SCHEDULER][version == "sd2"])
    assert_same(ours(again, "ddim"), theirs(pipe, "ddim"))


def own_model():
    """As trained here: the CLIP that ships, whose tokenizer is its own, and the default scale."""
    torch.manual_seed(0)
    text_encoder = load_text_encoder(Path(__file__).parent.parent / "stable_diffusion_results" / "clip")
    unet = UNet(dataclasses.replace(tiny_unet().config, context_dim=text_encoder.width)).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return StableDiffusion(text_encoder, unet, tiny_vae(), NoiseSchedule(), name="own")


def test_a_model_with_a_tokenizer_of_its_own_is_one_file_and_the_same_in_diffusers(tmp_path):
    """The file alone is enough here; diffusers takes the tokenizer from the model's folder, and the scale is right."""
    model = own_model()
    model.save_pretrained(tmp_path / "model")
    _, pipe = open_both(tmp_path / "model")
    wanted = ours(model, "ddim")
    assert_same(wanted, theirs(pipe, "ddim"))
    model.export(tmp_path / "alone" / "model.safetensors")
    again = StableDiffusion.from_pretrained(tmp_path / "alone" / "model.safetensors", device="cpu")
    assert_equal(weights(model), weights(again))
    assert again.text_encoder.tokenizer("a red fox").input_ids == model.text_encoder.tokenizer("a red fox").input_ids
    assert_same(wanted, ours(again, "ddim"))
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "alone" / "model.safetensors", config=str(tmp_path / "model"), local_files_only=True,
        safety_checker=None,
    )  # fmt: skip
    pipe.scheduler = DDIMScheduler.from_config(read_json(tmp_path / "model" / "scheduler" / "scheduler_config.json"))
    assert_same(wanted, theirs(pipe, "ddim"))


def test_a_file_with_a_damaged_tokenizer_says_so(tmp_path):
    own_model().export(tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["ldm_checkpoint"])
    for damaged in ({"tokenizer.json": "{"}, {}, "text", {"tokenizer.json": None}):
        text = json.dumps(metadata | {"tokenizer": damaged})
        save_file(tensors, tmp_path / "damaged.safetensors", {"ldm_checkpoint": text})
        refused(tmp_path / "damaged.safetensors", "tokenizer", "damaged.safetensors")


def test_a_model_on_latents_of_another_mean_starts_above_it_and_says_so(tmp_path):
    """The model that ships: no single file, which would be another model; a folder with a warning."""
    folder = Path(__file__).parent.parent / "stable_diffusion_results" / "monsters" / "model"
    model = StableDiffusion.from_pretrained(folder, device="cpu")
    refused(tmp_path / "model.safetensors", "_latents_mean", "latents=", load=model.export)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.warns(UserWarning, match="diffusers does not read _latents_mean"):
        model.save_pretrained(tmp_path / "model")
    noise = torch.randn(1, 4, 8, 8)
    grid = timestep_grid("ddim", model.schedule, 10)
    a, mean = grid.levels[0], torch.tensor(model.scheduler_config["_latents_mean"])[None, :, None, None]
    torch.testing.assert_close(model._start(grid, noise), a**0.5 * mean + (1 - a) ** 0.5 * noise)
    model.scheduler_config.pop("_latents_mean")
    torch.testing.assert_close(model._start(grid, noise), noise)  # as all others do


def test_a_vae_is_taken_from_wherever_there_is_one(sd1, tmp_path):
    wanted = load_vae(sd1).state_dict()
    model = StableDiffusion.from_pretrained(sd1, device="cpu")
    model.export(tmp_path / "model.safetensors")
    whole = load_file(tmp_path / "model.safetensors")
    prefix = "first_stage_model."
    alone = {name.removeprefix(prefix): t for name, t in whole.items() if name.startswith(prefix)}
    save_file(alone, tmp_path / "vae-ft-mse.safetensors")
    torch.save({"state_dict": alone}, tmp_path / "vae-ft-mse.ckpt")
    for path in (sd1 / "vae", tmp_path / "model.safetensors", *tmp_path.glob("vae-ft-mse.*")):
        assert_equal(load_vae(path).state_dict(), wanted)

    command = [sys.executable, "-m", "published", tmp_path / "vae-ft-mse.safetensors", tmp_path / "vae_model.pth"]
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True)
    assert_equal(load_vae(tmp_path / "vae_model.pth").state_dict(), {n: t.half().float() for n, t in wanted.items()})


def test_a_file_without_a_tokenizer_beside_it_says_what_it_misses(sd1, tmp_path):
    model = StableDiffusion.from_pretrained(sd1, device="cpu")
    model.text_encoder.model.config.vocab_size = 49408  # as if it were CLIP's
    model.export(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "tokenizer", "openai/clip-vit-large-patch14")


def test_a_schedule_that_single_files_cannot_hold_is_not_exported(folder, tmp_path):
    set_scheduler(folder, SD1_SCHEDULER | {"beta_schedule": "linear"})
    model = StableDiffusion.from_pretrained(folder, device="cpu")
    refused(tmp_path / "model.safetensors", "schedule", load=model.export)
    assert not (tmp_path / "model.safetensors").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Refused
# ----------------------------------------------------------------------------------------------------------------------


def refused(path, *words: str, load=lambda path: StableDiffusion.from_pretrained(path, device="cpu")) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        load(path)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and len(text) < 600, text
    assert all(word in text for word in words), text


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


def test_bad_weights_are_refused(folder, tmp_path):
    file = folder / UNET_FILE
    whole = file.read_bytes()
    for content in (b"", whole[:4], whole[:1000], whole[: len(whole) // 2], whole[:-1], b"\xff" * 100, b"<html>"):
        file.write_bytes(content)
        refused(folder, UNET_FILE)
    file.unlink()
    refused(folder, "unet")

    trap = tmp_path / "executed"
    torch.save({"conv_in.weight": Malice(trap)}, folder / "unet" / "diffusion_pytorch_model.bin")
    refused(folder, "diffusion_pytorch_model.bin", "mkdir")
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.bin", file)  # under a name that promises safety
    refused(folder, UNET_FILE)
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.bin", tmp_path / "model.ckpt")
    refused(tmp_path / "model.ckpt", "mkdir")
    refused(tmp_path / "model.ckpt", "mkdir", load=load_vae)
    assert not trap.exists()


def test_weights_of_another_architecture_are_refused(folder, sd2):
    file = folder / UNET_FILE
    shutil.copy(sd2 / UNET_FILE, file)  # SD 2's linear projections under SD 1's config
    refused(folder, "proj_in.weight")
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", file)
    refused(folder, "unet")


def test_other_pipelines_are_refused(folder):
    path = folder / "model_index.json"
    good = json.loads(path.read_text())
    for kind in ("StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"):
        path.write_text(json.dumps(good | {"_class_name": kind}))
        refused(folder, kind)
    path.write_text(json.dumps(good))
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps(config | {"in_channels": 9}))
    tensors = load_file(folder / UNET_FILE)
    save_file(tensors | {"conv_in.weight": torch.randn(64, 9, 3, 3)}, folder / UNET_FILE)
    refused(folder, "9 channels")


@pytest.mark.parametrize(
    "name", ["model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json",
             "text_encoder/config.json"],
)  # fmt: skip
def test_damaged_and_missing_configs_are_refused(folder, name):
    path = folder / name
    path.write_text('{"half": ')
    refused(folder, name)
    path.unlink()
    refused(folder, name)


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer"])
def test_missing_parts_are_refused(folder, name):
    shutil.rmtree(folder / name)
    refused(folder, name)
