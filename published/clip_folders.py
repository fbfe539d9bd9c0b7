"""CLIP in the hub's layout, in and out: its text encoder, its tokenizer, and the whole model.

`transformers` loads for seconds, so each function here imports what it needs of it.
"""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from published.weight_files import first_line, load_strict, locate, read_folder_weights, read_json, write_safetensors
from text_encoder import TextEncoder

if TYPE_CHECKING:
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

STEM = "model"  # the base name of weight files in such folders
NOT_TEXT = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")  # the other parts of a whole CLIP


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
    from transformers import AutoTokenizer

    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise FileNotFoundError(f"{folder}: there is no tokenizer here (tokenizer.json, or vocab.json and merges.txt).")
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
    return make_text_model(config, read_folder_weights(folder, STEM), folder)


def make_text_model(config: dict[str, Any], tensors: dict[str, Tensor], source: str | Path) -> "CLIPTextModel":
    """CLIP's text model of this configuration with these weights; `source` opens the error."""
    from transformers import CLIPTextConfig, CLIPTextModel

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
    write_safetensors(model_folder / f"{STEM}.safetensors", state)
    encoder.tokenizer.save_pretrained(tokenizer_folder)
