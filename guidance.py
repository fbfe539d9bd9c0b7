"""Classifier-free guidance: call the U-Net with the prompt and without, and exaggerate the difference.

Papers: Ho & Salimans 2022 (arXiv:2207.12598); rescaled against over-exposure, Lin et al. 2024 (arXiv:2305.08891);
between two noise levels only, Kynkäänniemi et al. 2024 (arXiv:2404.07724).

Letters: N images, h × w the size of their latents, L text positions, D width of the text encoding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from noise_schedule import noise_level

Model = Callable[[Tensor, float, Tensor], Tensor]  # (x_t, t, context) -> the U-Net's prediction, ε or v


@dataclass(frozen=True)
class Guidance:
    """How strongly, how corrected and when images are pushed towards their prompts; ValueError out of range."""

    scale: float = 7.5  # 0 = unconditional, 1 = conditional, beyond = exaggerated
    rescale: float = 0.0  # φ in [0, 1]: how much of the conditional prediction's spread is restored
    interval: tuple[float, float] = (0.0, math.inf)  # of σ = √((1-ᾱ)/ᾱ); outside, the model is merely conditional

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Real) or not math.isfinite(self.scale):
            raise ValueError(f"guidance_scale must be a finite number, not {self.scale!r}.")
        if not isinstance(self.rescale, Real) or not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance_rescale must be a number from 0 to 1, not {self.rescale!r}.")
        ends = self.interval if isinstance(self.interval, tuple | list) else ()
        if len(ends) != 2 or not all(isinstance(end, Real) for end in ends) or not ends[0] <= ends[1]:
            raise ValueError(
                "guidance_interval must be two noise levels σ, the lower first, such as (0.3, 5), "
                f"not {self.interval!r}."
            )

    @property
    def needs_unconditional(self) -> bool:
        """Is the unconditional prediction used at all?"""
        return self.scale != 1

    @property
    def always(self) -> bool:
        """Is every noise level within the interval?"""
        return tuple(self.interval) == (0.0, math.inf)

    def combine(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """Two predictions (N, 4, h, w) → the guided one (Ho & Salimans 2022, Equation 6, where w = scale - 1)."""
        guided = unconditional + self.scale * (conditional - unconditional)
        if self.rescale == 0:
            return guided
        # Lin et al. 2024, Equations 14-16: a share φ of the way back to the conditional prediction's spread.
        spread, too_wide = (p.std(dim=(1, 2, 3), keepdim=True) for p in (conditional, guided))  # (N, 1, 1, 1)
        return guided * (self.rescale * spread / too_wide.clamp(min=1e-12) + 1 - self.rescale)

    def contexts(self, context: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Encodings of the prompts and of the negative prompts (N, L, D) → what `predict` takes, the same at all steps.

        That is what the model is told within the interval, (2N, L, D) where it takes both, and outside.
        """
        if not self.needs_unconditional:
            return context, context
        return (empty if self.scale == 0 else torch.cat([empty, context])), context

    def predict(self, model: Model, x_t: Tensor, inside: Tensor, outside: Tensor, t: float, alpha_bar: float) -> Tensor:
        """The guided prediction (N, 4, h, w) for x_t at timestep t, where ᾱ is `alpha_bar`; calls `model` once.

        `inside` and `outside` are what `contexts` gave.
        """
        low, high = self.interval
        sigma = noise_level(alpha_bar) if alpha_bar > 0 else math.inf
        if not low <= sigma <= high:
            return model(x_t, t, outside)
        if self.scale in (0, 1):
            return model(x_t, t, inside)
        both = model(torch.cat([x_t, x_t]), t, inside)  # one batch of 2N
        return self.combine(*both.chunk(2))
