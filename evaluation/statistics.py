"""What a number from a few images is worth: intervals, and distances between two sets of features.

Papers: KID (Bińkowski et al. 2018, arXiv:1801.01401), precision and recall (Kynkäänniemi et al. 2019,
arXiv:1904.06991), coverage (Naeem et al. 2020, arXiv:2002.09797).
"""

import math

import torch
from torch import Tensor

HALVES = 200  # random halves of both sets, whose KIDs give its interval
NEIGHBOURS = 5

# ----------------------------------------------------------------------------------------------------------------------
# Interval of 95 %
# ----------------------------------------------------------------------------------------------------------------------


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Of a share that was counted among `count` (Wilson 1927): 97 of 100 may well be 92 or 99 of another hundred."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# Two sets of features, (n, d) and (m, d)
# ----------------------------------------------------------------------------------------------------------------------


def kid(real: Tensor, made: Tensor, seed: int = 0) -> dict[str, float]:
    """Kernel inception distance: 0 if both sets come from one distribution; with its interval, from random halves.

    By chance it may be a little below 0. Halves are drawn without replacement, since an image that is there twice would
    be its own neighbour; they vary about the whole as much as sets of this size vary about the truth.
    """
    from torchmetrics.image.kid import poly_mmd  # imported when used: it is slow to load

    generator = torch.Generator().manual_seed(seed)

    def half(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[: max(len(features) // 2, 2)]]

    parts = torch.stack([poly_mmd(half(real), half(made)) for _ in range(HALVES)])
    low, high = parts.quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"kid": poly_mmd(real, made).item(), "low": low, "high": high}


def precision_recall_coverage(real: Tensor, made: Tensor, k: int = NEIGHBOURS) -> dict[str, float]:
    """Shares, 0…1, by balls around each image that reach to its k-th nearest of the same set.

    Precision: samples within a ball of a real image. Recall: real images within a ball of a sample. Coverage: real
    images whose ball holds a sample, which single odd samples with large balls cannot raise, as they can recall.
    """
    k = min(k, len(real) - 1, len(made) - 1)
    between = torch.cdist(real, made)  # (n, m)
    real_radius, made_radius = (torch.cdist(x, x).kthvalue(k + 1, dim=1).values for x in (real, made))  # 1st: itself
    return {
        "precision": (between < real_radius[:, None]).any(dim=0).float().mean().item(),
        "recall": (between < made_radius[None]).any(dim=1).float().mean().item(),
        "coverage": (between < real_radius[:, None]).any(dim=1).float().mean().item(),
    }
