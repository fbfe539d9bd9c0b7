"""CLIP's text encoder: prompts in, (N, 77, D) out; words can be weighted, long prompts are truncated with a warning.

Paper: CLIP (Radford et al. 2021, arXiv:2103.00020). Tokenizer and network are those of `transformers`; `published`
reads and writes them. Stable Diffusion reads the last hidden state of all 77 positions, so that every pixel may attend
to every word.

Letters: N prompts, L positions (77), D width of the encoding.
"""

import re
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # `transformers` loads for seconds, and these are only names of types here
    from transformers import CLIPTextModel, PreTrainedTokenizerBase

# ----------------------------------------------------------------------------------------------------------------------
# Prompt weighting: "(red:1.3) fox" gives "red" more weight, "(tail:0.5) fox" gives "tail" less
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


# ----------------------------------------------------------------------------------------------------------------------
# The encoder
# ----------------------------------------------------------------------------------------------------------------------


class TextEncoder:
    """A CLIP tokenizer and text model that belong together."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", model: "CLIPTextModel") -> None:
        self.tokenizer = tokenizer
        self.model = model.eval().requires_grad_(False)
        self.length = model.config.max_position_embeddings  # 77

    @property
    def width(self) -> int:
        """D, the width of the encodings."""
        return self.model.config.hidden_size

    def tokens(self, prompt: str) -> tuple[list[int], list[float]]:
        """Token ids and weights of a prompt, with start and end, padded to L; truncated with a warning if too long."""
        ids, weights = [], []
        for text, weight in split_weights(prompt):
            piece = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            ids += piece
            weights += [weight] * len(piece)
        limit = self.length - 2  # start and end take two
        if len(ids) > limit:
            dropped = self.tokenizer.decode(ids[limit:]).strip()
            warnings.warn(f"The prompt is longer than {limit} tokens; this was dropped: {dropped!r}", stacklevel=3)
        weights = [1.0, *weights[:limit]]
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
        # Scale each token's vector, then the whole prompt back to its norm, so that attention's logits keep their size.
        scaled = context * torch.tensor(weights, device=device, dtype=dtype)[..., None]
        norm, scaled_norm = (
            x.float().pow(2).mean(dim=(1, 2), keepdim=True).sqrt() for x in (context, scaled)
        )  # (N, 1, 1)
        changed = torch.tensor([any(w != 1.0 for w in row) for row in weights], device=device)[:, None, None]
        return torch.where(changed, scaled * (norm / scaled_norm).to(dtype), context)
