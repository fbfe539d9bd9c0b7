"""What a number from a few images is worth: intervals, and distances between two sets of features.

Papers: KID (Bińkowski et al. 2018, arXiv:1801.01401), precision and recall (Kynkäänniemi et al. 2019,
arXiv:1904.06991), coverage (Naeem et al. 2020, arXiv:2002.09797).
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import torch
from torch import Tensor

HALVES = 200  # random halves of both sets, whose KIDs give its interval
NEIGHBOURS = 5
BOOTSTRAPS = 2000  # sets drawn with replacement, whose means give an interval

# ----------------------------------------------------------------------------------------------------------------------
# Interval of 95 %
# ----------------------------------------------------------------------------------------------------------------------


def share_interval(share: float, count: int) -> tuple[float, float]:
    """Holds the true share in 19 of 20 cases, if `share` was counted among `count` (Wilson 1927): 97 of 100 may well
    come from a model that is right in 92 or 99 % of all cases."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Holds the true mean in 19 of 20 cases, if these are independent: bootstrap, ends as in `bootstrap_interval`."""
    drawn = torch.randint(len(values), (BOOTSTRAPS, len(values)), generator=torch.Generator().manual_seed(0))
    return bootstrap_interval(torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1), len(values))


def bootstrap_interval(means: Tensor, count: int) -> tuple[float, float]:
    """Its ends are quantiles of `means` of sets drawn from `count` values, `expanded` for few; NaNs do not count."""
    low, high = means.nanquantile(torch.tensor([expanded(count), 1 - expanded(count)], dtype=means.dtype)).tolist()
    return low, high


def expanded(count: int, level: float = 0.025) -> float:
    """The lower end of a bootstrap interval: `level`, made smaller for few values (Hesterberg 2015, Section 5.4).

    Φ(-√(n/(n-1)) t), where t is Student's quantile by its series in 1/(n-1) (Abramowitz & Stegun, 26.7.5).
    """
    normal, free = NormalDist(), max(count - 1, 1)
    z = -normal.inv_cdf(level)
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
    return normal.cdf(-math.sqrt((free + 1) / free) * t)


def below_by_chance(count: int, level: float = 0.01) -> float:
    """The share of new values that fall below the `level` quantile of `count` old ones of the same distribution.

    The i-th smallest of them has i/(count + 1) of all below it on average, and the quantile is interpolated between two
    of them: 64 values give no better limit for 1 % than one that 2.5 % pass.
    """
    return ((count - 1) * level + 1) / (count + 1)


# ----------------------------------------------------------------------------------------------------------------------
# Two sets of features, (n, d) and (m, d)
# ----------------------------------------------------------------------------------------------------------------------


def kid(real: Tensor, made: Tensor, seed: int = 0) -> dict[str, float]:
    """Kernel inception distance: 0 if both sets come from one distribution; with its interval, from random halves.

    By chance it may be a little below 0. Pairs (i, i) count nowhere: a real image and the sample of its prompt do not
    meet by chance. Halves are drawn without replacement, since an image that is there twice would be its own neighbour;
    they vary about the whole as much as sets of this size vary about the truth.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = real.double(), made.double()
    xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))  # Section 4: the cubic kernel

    def half(features: Tensor) -> Tensor:
        return torch.randperm(len(features), generator=generator)[: max(len(features) // 2, 2)]

    def mean(kernel: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return kernel[i[:, None], j[None]][i[:, None] != j[None]].mean()

    def squared_distance(i: Tensor, j: Tensor) -> Tensor:  # Equation 4
        return mean(xx, i, i) + mean(yy, j, j) - 2 * mean(xy, i, j)

    parts = torch.stack([squared_distance(half(x), half(y)) for _ in range(HALVES)])
    low, high = parts.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    whole = squared_distance(torch.arange(len(x)), torch.arange(len(y)))
    return {"kid": whole.item(), "low": low, "high": high}


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
