"""Whole models, in and out: the standard folder (diffusers' layout), a single file (LDM's layout), a VAE, a CLIP.

A single file holds the networks and nothing else: no tokenizer and no noise schedule. All published ones share theirs,
CLIP's vocabulary and the default `NoiseSchedule`, so these are taken. A file written here for a model with another
tokenizer has it in its metadata.
"""

import copy
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffusion_model import UNet, UNetConfig
from noise_schedule import NoiseSchedule
from published.diffusers_layout import noise_schedule, schedule_dict, unet_config, unet_dict, vae_config, vae_dict
from published.ldm_checkpoint import LDMCheckpoint, read_ldm, read_ldm_vae, write_ldm
from published.weight_files import (
    first_line,
    load_strict,
    locate,
    read_checkpoint,
    read_folder_weights,
    read_json,
    write_safetensors,
)
from text_encoder import TextEncoder
from vae_model import VAE, VAEConfig

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

STEM = "diffusion_pytorch_model"  # the base name of weight files in the folders of U-Net and VAE …
TEXT_STEM = "model"  # … and of a text encoder
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")  # the other parts of a whole CLIP
CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the hub model whose vocabulary SD 1.x and 2.x read
CLIP_VOCABULARY = 49_408  # how many tokens it has


class ModelParts(NamedTuple):
    """What a `StableDiffusion` is made of, in the order of its arguments."""

    text_encoder: TextEncoder
    unet: UNet
    vae: VAE
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any] | None  # the folder's scheduler_config.json; a single file has none
    name: str


def load_model(path_or_hub_id: str | os.PathLike, dtype: torch.dtype | None = torch.float32) -> ModelParts:
    """Read the standard folder, a hub id of SD 1.x or 2.x, or a single file in the LDM layout; on the CPU.

    The U-Net, by far the largest, in `dtype`, or with None as it lies in the file (see `load_strict`); VAE and text
    encoder in float32. ValueError or FileNotFoundError, in one sentence, for what is not such a model.
    """
    path = locate(path_or_hub_id, "the model")
    if path.is_file():
        return load_single_file(path, dtype=dtype)
    given = Path(path_or_hub_id)  # a run keeps its model in RUN/model
    return load_folder(path, given.parent.name if given.name == "model" else given.name, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# The standard folder
# ----------------------------------------------------------------------------------------------------------------------


def load_folder(folder: Path, name: str, dtype: torch.dtype | None = torch.float32) -> ModelParts:
    """Read `model_index.json`, `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`."""
    kind = read_json(folder / "model_index.json").get("_class_name", "StableDiffusionPipeline")
    if not kind.startswith("StableDiffusion") or "XL" in kind or "3" in kind:
        raise ValueError(f"{folder}: a {kind} is not supported, only Stable Diffusion 1.x and 2.x.")
    unet = _without_numbers(unet_config(read_json(folder / "unet" / "config.json")))
    load_strict(unet, read_folder_weights(folder / "unet", STEM), folder / "unet", dtype=dtype)
    text_encoder = TextEncoder(load_tokenizer(folder / "tokenizer"), load_text_model(folder / "text_encoder"))
    scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
    vae = _load_vae_folder(folder / "vae")
    return ModelParts(text_encoder, unet.eval(), vae, noise_schedule(scheduler_config), scheduler_config, name)


def _without_numbers(config: UNetConfig) -> UNet:
    """For `load_strict`, which brings them: random ones would take seconds, and memory."""
    with torch.device("meta"):
        return UNet(config)


def save_folder(folder: Path, parts: ModelParts, dtype: torch.dtype) -> None:
    """Write the standard folder, the weights in `dtype`."""
    scheduler_config = parts.scheduler_config | schedule_dict(parts.schedule)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.30.0",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler_config["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", index)
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config)
    _write_json(folder / "unet" / "config.json", unet_dict(parts.unet.config))
    _write_json(folder / "vae" / "config.json", vae_dict(parts.vae.config))
    for name, network in {"unet": parts.unet, "vae": parts.vae}.items():
        weights = {key: tensor.to(dtype) for key, tensor in network.state_dict().items()}
        write_safetensors(folder / name / f"{STEM}.safetensors", weights)
    save_text_encoder(parts.text_encoder, folder / "text_encoder", folder / "tokenizer", dtype)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# A single file
# ----------------------------------------------------------------------------------------------------------------------


def load_single_file(
    path: Path, prediction_type: str | None = None, dtype: torch.dtype | None = torch.float32
) -> ModelParts:
    """Read a `.safetensors` or `.ckpt` in the LDM layout; `prediction_type`: see `read_ldm`, `dtype`: `load_model`.

    The tokenizer is the file's own if it has one, else that of a folder `tokenizer` beside it, else the hub's.
    """
    file = read_ldm(path, prediction_type)
    for part in ("unet", "vae", "text_encoder"):
        if getattr(file, part) is None:
            raise ValueError(f"{path} holds no {part}; pass a checkpoint with all of U-Net, VAE and text encoder.")
    unet, vae = _without_numbers(file.unet_config), VAE(file.vae_config)
    load_strict(unet, file.unet, path, dtype=dtype)
    load_strict(vae, file.vae, path)
    text_model = make_text_model(file.text_config, file.text_encoder, path)

    beside = path.parent / "tokenizer"
    if file.tokenizer is not None:
        tokenizer = _tokenizer_of(file.tokenizer, path)
    elif beside.is_dir():
        tokenizer = load_tokenizer(beside)
    else:
        tokenizer = load_tokenizer(locate(CLIP_TOKENIZER, f"the tokenizer for {path}", weights=False))
    if (
        file.text_config["hidden_act"] == "gelu" and file.tokenizer is None
    ):  # OpenCLIP pads with token 0, CLIP with the end of the text
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    schedule = NoiseSchedule(prediction_type=file.prediction_type, zero_terminal_snr=file.zero_terminal_snr)
    return ModelParts(TextEncoder(tokenizer, text_model), unet.eval(), vae.eval(), schedule, None, path.stem)


def save_single_file(path: str | os.PathLike, parts: ModelParts) -> None:
    """Write one `.safetensors` in the LDM layout; ValueError if the layout cannot hold the noise schedule."""
    schedule = parts.schedule
    if schedule != NoiseSchedule(
        prediction_type=schedule.prediction_type, zero_terminal_snr=schedule.zero_terminal_snr
    ):
        raise ValueError(
            f"{path}: the readers of single files know one noise schedule, Stable Diffusion's; save a folder instead."
        )
    checkpoint = LDMCheckpoint(
        unet_config=parts.unet.config,
        unet=parts.unet.state_dict(),
        vae_config=parts.vae.config,
        vae=parts.vae.state_dict(),
        text_config=parts.text_encoder.model.config.to_dict(),
        text_encoder=parts.text_encoder.model.state_dict(),
        prediction_type=schedule.prediction_type,
        zero_terminal_snr=schedule.zero_terminal_snr,
        tokenizer=_tokenizer_files(parts.text_encoder),
    )
    write_ldm(path, checkpoint)


def _tokenizer_files(encoder: TextEncoder) -> dict[str, str] | None:
    """The files of a tokenizer, name → content; None for CLIP's own, which every reader of single files has."""
    if encoder.model.config.vocab_size == CLIP_VOCABULARY:
        return None
    with tempfile.TemporaryDirectory() as folder:
        encoder.tokenizer.save_pretrained(folder)
        return {file.name: file.read_text(encoding="utf-8") for file in sorted(Path(folder).iterdir())}


def _tokenizer_of(files: dict[str, str], path: Path) -> "PreTrainedTokenizerBase":
    """The inverse of `_tokenizer_files`; ValueError names the file that it came from."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, content in files.items():
                Path(folder, Path(name).name).write_text(content, encoding="utf-8")
            return load_tokenizer(Path(folder))
        except (AttributeError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: the tokenizer in its metadata is damaged; export it again.") from error


# ----------------------------------------------------------------------------------------------------------------------
# A VAE
# ----------------------------------------------------------------------------------------------------------------------


def load_vae(path_or_hub_id: str | os.PathLike, what: str = "the VAE") -> VAE:
    """Read a VAE from anything that holds one: in float32, on the CPU, in eval mode.

    That is a `vae_model.pth`, a VAE's folder in diffusers' layout or a pipeline's with `vae/` in it, a file in the LDM
    layout (a whole checkpoint or a VAE alone), or a hub id. `what` opens the error, such as "--vae". Wrong or damaged
    files raise a one-sentence ValueError, missing ones FileNotFoundError.
    """
    path = locate(path_or_hub_id, what)
    if path.is_dir():
        return _load_vae_folder(path / "vae" if (path / "vae").is_dir() else path)
    tensors, rest = read_checkpoint(path)
    if isinstance(rest.get("config"), dict):  # written by `VAE.save`
        try:
            config = VAEConfig(**rest["config"])
        except TypeError as error:
            raise ValueError(f"{path} is damaged or was not written by VAE.save ({error}).") from error
    else:
        config, tensors = read_ldm_vae(path)
    vae = VAE(config)
    load_strict(vae, tensors, path)
    return vae.eval()


def _load_vae_folder(folder: Path) -> VAE:
    vae = VAE(vae_config(read_json(folder / "config.json")))
    load_strict(vae, read_folder_weights(folder, STEM), folder)
    return vae.eval()


# ----------------------------------------------------------------------------------------------------------------------
# A text encoder: CLIP's text half and its tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def load_text_encoder(path_or_hub_id: str | os.PathLike, what: str = "the text encoder") -> TextEncoder:
    """Read a pipeline's folder (`text_encoder/` and `tokenizer/`), a CLIP folder, or a hub id.

    A CLIP folder may hold the whole model, as `openai/clip-vit-large-patch14` does: its vision half is left out.
    `what` opens the error, such as "--text_encoder". Wrong or damaged files raise a one-sentence ValueError, missing
    ones FileNotFoundError.
    """
    folder = locate(path_or_hub_id, what)
    if (folder / "text_encoder").is_dir():
        return TextEncoder(load_tokenizer(folder / "tokenizer"), load_text_model(folder / "text_encoder"))
    return TextEncoder(load_tokenizer(folder), load_text_model(folder))


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Read a tokenizer from `vocab.json` and `merges.txt` (older folders) or `tokenizer.json` (newer ones)."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise FileNotFoundError(f"{folder}: there is no tokenizer here (tokenizer.json, or vocab.json and merges.txt).")
    from transformers import AutoTokenizer  # loads for seconds

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{folder}: the tokenizer cannot be read ({first_line(error)}).") from error


def load_text_model(folder: Path) -> "CLIPTextModel":
    """Read the text half of a CLIP folder, whichever version of `transformers` wrote it."""
    config = read_json(folder / "config.json")
    config = config.get("text_config") or config
    if config.get("model_type", "clip_text_model") not in ("clip", "clip_text_model"):
        raise ValueError(f"{folder}: its model type is {config['model_type']!r}, but the text encoder must be CLIP's.")
    return make_text_model(config, read_folder_weights(folder, TEXT_STEM), folder)


def make_text_model(config: dict[str, Any], tensors: dict[str, Tensor], source: str | Path) -> "CLIPTextModel":
    """CLIP's text model of this configuration with these weights; `source` opens the error."""
    from transformers import CLIPTextConfig, CLIPTextModel  # loads for seconds

    model = CLIPTextModel(CLIPTextConfig(**config))
    load_strict(model, tensors, source, ignore=NOT_TEXT)
    return model


def save_text_encoder(encoder: TextEncoder, model_folder: Path, tokenizer_folder: Path, dtype: torch.dtype) -> None:
    """Write the two folders as `transformers` does, the weights in `dtype`."""
    state = {name: tensor.to(dtype) for name, tensor in encoder.model.state_dict().items()}
    # On disk the names keep the prefix that older versions of transformers gave the module.
    state = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in state.items()}
    # Readers compute in the config's type unless they choose one; float16 beside a float32 U-Net would not run.
    config = copy.copy(encoder.model.config)
    config.dtype = torch.float32
    config.save_pretrained(model_folder)
    write_safetensors(model_folder / f"{TEXT_STEM}.safetensors", state)
    encoder.tokenizer.save_pretrained(tokenizer_folder)
