"""CLIP's text encoder: prompts in, (N, 77, D) out, with words weighted and long prompts cut in the open.

Paper: CLIP (Radford et al. 2021, arXiv:2103.00020). Tokenizer and network are those of `transformers`; here is how they
are found on disk, and what happens to a prompt on its way. Stable Diffusion reads the last hidden state of all 77
positions, so that every pixel may attend to every word.

Letters: N prompts, L positions (77), D width of the encoding.
"""

import copy
import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase

from pretrained_files import load_strict, locate, read_folder_weights, read_json, write_safetensors

# ----------------------------------------------------------------------------------------------------------------------
# Prompt weighting: "(red:1.3) fox" asks for more red, "(tail:0.5)" for less tail
# ----------------------------------------------------------------------------------------------------------------------

_WEIGHTED = re.compile(r"(?<!\\)\(((?:[^()\\]|\\.)*?):\s*(-?\d*\.?\d+)\s*\)")


def split_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Pieces of a prompt with their weights: "a (red:1.3) fox" → [("a", 1), ("red", 1.3), ("fox", 1)].

    Parentheses without a number are text; `\(` and `\)` always are.
    """
    pieces, end = [], 0
    for match in _WEIGHTED.finditer(prompt):
        pieces += [(prompt[end : match.start()], 1.0), (match[1], float(match[2]))]
        end = match.end()
    pieces.append((prompt[end:], 1.0))
    unescaped = [(re.sub(r"\\([()])", r"\1", text).strip(), weight) for text, weight in pieces]
    return [(text, weight) for text, weight in unescaped if text] or [("", 1.0)]


class TextEncoder:
    """A CLIP tokenizer and text model that belong together."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: CLIPTextModel) -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.length = model.config.max_position_embeddings  # 77

    @property
    def width(self) -> int:
        """D: how wide the encodings are."""
        return self.model.config.hidden_size

    def tokens(self, prompt: str) -> tuple[list[int], list[float]]:
        """Token ids and weights of a prompt, start and end included, padded to L; too long is cut, with a warning."""
        ids, weights = [], []
        for text, weight in split_weights(prompt):
            piece = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += piece
            weights += [weight] * len(piece)
        room = self.length - 2
        if len(ids) > room:
            dropped = self.tokenizer.decode(ids[room:]).strip()
            warnings.warn(f"The prompt is longer than {room} tokens; this was dropped: {dropped!r}", stacklevel=3)
        weights = [1.0, *weights[:room]]
        return self.framed(ids), weights + [1.0] * (self.length - len(weights))

    def framed(self, ids: list[int]) -> list[int]:
        """Token ids of a text → L ids: start, the text (truncated if it is too long), end, padding."""
        end = self.tokenizer.eos_token_id
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else end
        ids = [self.tokenizer.bos_token_id, *ids[: self.length - 2], end]
        return ids + [pad] * (self.length - len(ids))

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        """Prompts → (N, 77, D), in the model's type and on its device."""
        ids, weights = zip(*(self.tokens(prompt) for prompt in prompts), strict=True)
        device, dtype = self.model.device, self.model.dtype
        context = self.model(torch.tensor(ids, device=device)).last_hidden_state  # (N, L, D)
        if all(weight == 1.0 for row in weights for weight in row):
            return context
        # Scale each word's vector, then the whole back to its length: attention's logits keep their size.
        scaled = context * torch.tensor(weights, device=device, dtype=dtype)[..., None]
        length, now = (x.float().pow(2).mean(dim=(1, 2), keepdim=True).sqrt() for x in (context, scaled))  # (N, 1, 1)
        changed = torch.tensor([any(w != 1.0 for w in row) for row in weights], device=device)[:, None, None]
        return torch.where(changed, scaled * (length / now).to(dtype), context)

    def save(self, model_folder: str | os.PathLike, tokenizer_folder: str | os.PathLike, dtype: torch.dtype) -> None:
        """Writes the two folders as `transformers` does."""
        state = {name: tensor.to(dtype) for name, tensor in self.model.state_dict().items()}
        # On disk the names keep the prefix that older versions of transformers gave the module.
        state = {name if name.startswith("text_model.") else f"text_model.{name}": t for name, t in state.items()}
        # Readers take the type from the config where they are told none; halves beside a float32 U-Net would not run.
        config = copy.copy(self.model.config)
        config.dtype = torch.float32
        config.save_pretrained(model_folder)
        write_safetensors(Path(model_folder) / "model.safetensors", state)
        self.tokenizer.save_pretrained(tokenizer_folder)

    @classmethod
    def load(cls, path_or_hub_id: str | os.PathLike, what: str = "the text encoder") -> "TextEncoder":
        """Reads a pipeline's folder (`text_encoder/` and `tokenizer/`), a CLIP folder, or a hub id.

        A CLIP folder may hold the whole model, as `openai/clip-vit-large-patch14` does: its vision half is left out.
        Wrong or damaged files raise a one-sentence ValueError, missing ones FileNotFoundError.
        """
        folder = locate(path_or_hub_id, what)
        nested = (folder / "text_encoder").is_dir()
        model_folder, tokenizer_folder = (folder / "text_encoder", folder / "tokenizer") if nested else (folder, folder)
        return cls(load_tokenizer(tokenizer_folder), load_text_model(model_folder))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Reads a tokenizer from `vocab.json` and `merges.txt` (older folders) or `tokenizer.json` (newer ones)."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        raise FileNotFoundError(f"{folder}: there is no tokenizer here (tokenizer.json, or vocab.json and merges.txt).")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise ValueError(f"{folder}: the tokenizer cannot be read ({str(error).splitlines()[0]}).") from error


def load_text_model(folder: Path) -> CLIPTextModel:
    """Reads the text half of a CLIP folder, whichever version of `transformers` wrote it."""
    config = read_json(folder / "config.json")
    config = config.get("text_config") or config
    if config.get("model_type", "clip_text_model") not in ("clip", "clip_text_model"):
        raise ValueError(f"{folder}: its model type is {config['model_type']!r}, but the text encoder must be CLIP's.")
    model = CLIPTextModel(CLIPTextConfig(**config))
    tensors = read_folder_weights(folder, "model")
    load_strict(
        model, tensors, folder, ignore=("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    )
    return model
