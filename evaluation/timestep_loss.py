"""The loss by timestep: fixed noise, spread evenly over all timesteps, and its means over tenths of them.

One number hides most of what a U-Net learns. Near t = 0 the noise is a thousandth of the variance and hard to tell from
the image; near t = 999 there is hardly anything but noise, and to predict it is easy: in the shipped model, the first
tenth's loss is thirty times the last one's. With the same images, noise and timesteps every time (evenly spread, as in
Kingma et al. 2021, arXiv:2107.00630), numbers can be compared along a run and between runs, each tenth for itself.
"""

import itertools
import math
from collections.abc import Sequence
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.statistics import BOOTSTRAPS, bootstrap_interval
from stable_diffusion_model import StableDiffusion

BINS = 10
VALIDATED_AT_ONCE = 8  # images; with another number, the fixed noise of a validation would be other noise
AT_LEAST = 64  # predictions in all, and four of each image, rounded up to as many in each tenth


def spread(images: int, T: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which image at which timestep, (n,) each: t rises evenly, as often in each tenth; images take turns."""
    count = math.ceil(max(4 * images, AT_LEAST) / BINS) * BINS
    place = torch.arange(count, device=device)
    return place % images, ((place + 0.5) / count * T).long()


@torch.no_grad()
def prediction_errors(model: StableDiffusion, pixels: Tensor, captions: list[str], seed: int = 0) -> list[float]:
    """Squared errors of the U-Net on images (n, 3, H, W) in [-1, 1], in the order of their timesteps (`spread`).

    They are means over the latents of what it should predict, ε or v; chunks of 8 at fixed noise.
    """
    generator, device, schedule = torch.Generator().manual_seed(seed), model.device, model.schedule
    latents = torch.cat([model.encode_images(part, generator) for part in pixels.split(8)])
    context = model.encode_prompts(captions)
    errors: list[float] = []
    which, timesteps = spread(len(pixels), schedule.num_timesteps, device)
    for indices, t in zip(which.split(8), timesteps.split(8), strict=True):
        x0 = latents[indices]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        x_t = schedule.add_noise(x0, noise, t)
        prediction = model.unet(x_t.to(model.dtype), t, context[indices]).float()
        errors += (prediction - schedule.target(x0, noise, t)).square().mean(dim=(1, 2, 3)).tolist()
    return errors


def tenths(losses: Sequence[float]) -> list[Sequence[float]]:
    """The ten parts of losses that are in the order of their timesteps, as `spread` has them."""
    edges = [round(i * len(losses) / BINS) for i in range(BINS + 1)]
    return [losses[start:end] for start, end in itertools.pairwise(edges)]


def by_tenths(losses: Sequence[float]) -> list[float]:
    """The means of the `tenths`."""
    return [fmean(part) for part in tenths(losses)]


def intervals(errors: Sequence[float], which: Tensor) -> tuple[tuple[float, float], list[tuple[float, float]]]:
    """They hold the true mean, and each tenth's, in 19 of 20 cases; `which` (n,) says of which image each error is.
    Where errors are strongly skewed (log-normal, σ = 0.8) and those of a few images, in 17.

    Bootstrap: images are drawn, 2,000 times as many with replacement, and each brings all of its errors; they are no
    evidence independent of each other. Timesteps stay as they are, so that the tenths weigh equally in each mean. Ends
    are `expanded` for few images, those of a tenth for the images that it has; of fewer than eight, no interval of this
    kind is wide enough.
    """
    images, part = int(which.max()) + 1, [i for i, some in enumerate(tenths(range(len(errors)))) for _ in some]
    place = which.cpu(), torch.tensor(part)
    sums, counts = (torch.zeros(images, BINS, dtype=torch.float64) for _ in range(2))
    sums.index_put_(place, torch.tensor(errors, dtype=torch.float64), accumulate=True)
    counts.index_put_(place, torch.ones(len(errors), dtype=torch.float64), accumulate=True)
    drawn = torch.randint(images, (BOOTSTRAPS, images), generator=torch.Generator().manual_seed(0))
    times = F.one_hot(drawn, images).sum(dim=1).double()  # (2000, images)
    means = (times @ sums) / (times @ counts)  # (2000, 10); NaN where a tenth has no image that was drawn
    of_tenths = [bootstrap_interval(means[:, i], int((counts[:, i] > 0).sum())) for i in range(BINS)]
    return bootstrap_interval(means.nanmean(dim=1), images), of_tenths
