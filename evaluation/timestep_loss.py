"""The loss by timestep: fixed noise, spread evenly over all timesteps, and its means over tenths of them.

One number hides most of what a U-Net learns. Near t = 0 the noise is a thousandth of the variance and hard to tell from
the image; near t = 999 there is hardly anything but noise, and to predict it is easy. So the loss of one image differs
a hundredfold with its timestep. With the same images, noise and timesteps every time (evenly spread, as in Kingma et
al. 2021, arXiv:2107.00630), the numbers can be compared along a run and between runs, and each tenth for itself.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

BINS = 10
AT_LEAST = 64  # predictions in all, and four of each image


def spread(images: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which image at which timestep, (n,) each: t rises evenly over 0…T-1, and images take turns."""
    count = images * max(4, math.ceil(AT_LEAST / images))
    place = torch.arange(count, device=device)
    return place % images, ((place + 0.5) / count * T).long()


def by_tenths(losses: Sequence[float]) -> list[float]:
    """The means of the ten parts of losses that are in the order of their timesteps, as `spread` has them."""
    edges = [round(i * len(losses) / BINS) for i in range(BINS + 1)]
    parts = [losses[start:end] for start, end in itertools.pairwise(edges)]
    return [math.fsum(part) / len(part) for part in parts]
