"""Does a model copy its training images? The nearest one of each sample, mirrored or not, by the RMS of thumbnails.

Carlini et al. 2023, arXiv:2301.13188, Section 5.1. How near an image comes that cannot be a copy says what is near.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from evaluation.statistics import below_by_chance
from images import captioned_sheet, pixels_to_images, to_pixels

THUMBNAIL = 64  # pixels a side at which images are compared
CROWD = 50  # nearest training images that calibrate the distance to the very nearest
MEASURES = ("distance", "calibrated")


@dataclass
class Nearest:
    """Of each image (n,): RMS distance to the nearest training image, which that is, and whether mirrored.

    `calibrated`: that distance over the mean distance to the 50 nearest (Carlini et al. 2023, arXiv:2301.13188, Section
    5.1). An image with much white is near to many; a copy is near to one and far from the others.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor
    calibrated: Tensor


def nearest(queries: Tensor, training: Tensor, but: Tensor | None = None) -> Nearest:
    """For thumbnails (n, 3, s, s) among `training` and mirrors.

    `but` (n,): of each, one that does not count, nor does any that is equal to it within a level of 255. Where none is
    left that counts, the distance is inf, and calibrated nan.
    """
    flat, n = queries.flatten(1), len(training)
    both = torch.cat([training, training.flip(-1)]).flatten(1)
    distances = torch.cdist(flat, both) / flat.shape[1] ** 0.5  # (n, 2·training)
    if but is not None:
        distances[torch.arange(len(flat)), but] = distances[torch.arange(len(flat)), but + n] = torch.inf
        distances[distances < 2 / 255] = torch.inf
    several, indices = distances.topk(min(CROWD, max(n - 1, 1)), dim=1, largest=False)  # (n, 50), rising
    crowd = several.masked_fill(several.isinf(), torch.nan).nanmean(dim=1)  # (n,), of those that count
    distance, index = several[:, 0], indices[:, 0]
    return Nearest(distance, index % n, index >= n, distance / crowd.clamp(min=1e-12))


def thumbnails(made: list[Image.Image]) -> Tensor:
    return torch.stack([to_pixels(image, THUMBNAIL) for image in made])


def measure_copying(of_samples: Nearest, of_others: Nearest) -> dict:
    """How near samples come to training images, against images that cannot be copies (`of_others`).

    Copies by either measure are counted, too: of an image that stands many times in the data, a copy is no nearer to it
    than to its crowd, and only the distance as it is finds it. If none of the others has a distance, as where all
    training images are equal, there are no "limits", and shares and means that need them are None.
    """
    report: dict = {}
    for name, found in (("samples", of_samples), ("images_that_are_no_copies", of_others)):
        values = {measure: _finite(getattr(found, measure)) for measure in MEASURES}
        report[name] = {
            measure: {"mean": v.mean().item(), "smallest": v.min().item()}
            if len(v)
            else {"mean": None, "smallest": None}
            for measure, v in values.items()
        }
    report["limits"] = limits = limits_of(of_others)
    called = {name: getattr(of_samples, name) < limit for name, limit in limits.items()}
    if called:
        called["either"] = called["distance"] | called["calibrated"]
    for name in (*MEASURES, "either"):
        report[f"share_of_copies_by_{name}"] = called[name].float().mean().item() if called else None
    report["share_by_chance"] = below_by_chance(len(_finite(of_others.distance))) if called else None
    return report


def limits_of(of_others: Nearest) -> dict[str, float]:
    """Below these, a sample is called a copy; {} if none of the others has a distance."""
    values = {name: _finite(getattr(of_others, name)) for name in MEASURES}
    return {name: v.quantile(0.01).item() for name, v in values.items() if len(v)}


def _finite(values: Tensor) -> Tensor:
    return values[values.isfinite()]


def sheet_of_nearest(
    made: list[Image.Image],
    prompts: list[str],
    pixels: Callable[[list[int], int], Tensor],
    found: Nearest,
    limits: dict[str, float],
) -> Image.Image:
    """The 16 samples that are most like copies, by either measure, the worst first, each beside its training image.

    `pixels` (indices, size) gives training images, (n, 3, size, size) in [-1, 1].
    """
    of_limits = [getattr(found, name) / max(limit, 1e-12) for name, limit in limits.items()] or [found.distance]
    worst = torch.stack(of_limits).amin(dim=0).argsort()[:16].tolist()
    twins = pixels_to_images(pixels([found.index[i].item() for i in worst], 256) / 2 + 0.5)
    pairs, captions = [], []
    for i, twin in zip(worst, twins, strict=True):
        pairs += [made[i], twin.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if found.mirrored[i] else twin]
        captions += [prompts[i], f"nearest: distance {found.distance[i]:.3f}, calibrated {found.calibrated[i]:.2f}"]
    return captioned_sheet(pairs, captions, columns=8, side=160)
