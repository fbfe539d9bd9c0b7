"""3×3 convolutions of large feature maps on a CPU, in half the multiplications.

Paper: Lavin & Gray 2016, arXiv:1509.09308, Section 4, after Winograd 1980: F(4, 3) makes four outputs of a filter of
three numbers with six multiplications instead of twelve. Both are polynomials, their product is one of degree five, and
six of its values say what it is; the values at 0, ±1, ±2 and ∞ need hardly anything but additions.

Here it goes down the rows: four rows of outputs come of six rows of inputs. Sums of rows are convolved with filters of
one row (1×3), which is the work, and sums of these are the outputs. In float32 on two cores, a convolution of 128
channels and more takes 0.5 to 0.7 of the time, and differs from the direct one in its last bits: both are exact to
about 10⁻⁵ of the output's size. In bfloat16, whose eight bits such sums would halve, nothing is done.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS_FROM = 1024  # of a feature map; making the six filters takes longer than it saves on smaller ones
CHANNELS_FROM = 32
ROWS_OF = 2**20  # numbers that a sum of rows may hold; more do not fit into a CPU's cache


class Conv3x3(nn.Conv2d):
    """(N, C_in, h, w) → (N, C_out, h, w), padded with zeros; for inference in float32 on a CPU by F(4, 3)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x, weight, bias) if self.is_faster_by_winograd(x) else super()._conv_forward(x, weight, bias)

    def is_faster_by_winograd(self, x: Tensor) -> bool:
        """By the size of the map, not of the batch, so that an image has the same bits in any batch."""
        return (
            x.device.type == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
            and x.ndim == 4
            and x.shape[-2] * x.shape[-1] >= PIXELS_FROM
            and min(self.in_channels, self.out_channels) >= CHANNELS_FROM
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.padding_mode == "zeros"  # some make images that can be tiled by another one
        )


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3×3 convolution, padded with zeros, by F(4, 3) down the rows.

    (N, C_in, h, w), (C_out, C_in, 3, 3) → (N, C_out, h, w), channels-last. Some rows at a time, as a cache holds.
    """
    filters, (h, w) = filters_of(weight), x.shape[-2:]
    fours, at_once = -(-h // 4), max(1, ROWS_OF // (w * max(weight.shape[:2])))
    y = x.new_empty(len(x), fours, 4, w, len(weight))
    for start in range(0, fours, at_once):
        end = min(start + at_once, fours)
        top, bottom = 4 * start - 1, 4 * end + 1  # with the row above and the one below
        rows = x[:, :, max(top, 0) : bottom]
        if top < 0 or bottom > h:
            rows = F.pad(rows, (0, 0, max(-top, 0), max(bottom - h, 0)))
        _four_rows(rows, filters, bias, y[:, start:end])
    return y.flatten(1, 2)[:, :h].contiguous().movedim(-1, 1)


def filters_of(weight: Tensor) -> list[Tensor]:
    """Filters of three rows → the values of g₀ + g₁z + g₂z² at 0, ±1, ±2 and ∞, with the factors of interpolation.

    (C_out, C_in, 3, 3) → six of (C_out, C_in, 1, 3).
    """
    g0, g1, g2 = weight.unbind(2)
    one, four = g0 + g2, torch.add(g0, g2, alpha=4)
    values = [
        g0,
        (one + g1).mul_(-1 / 6),
        (one - g1).mul_(-1 / 6),
        torch.add(four, g1, alpha=2).mul_(1 / 24),
        torch.sub(four, g1, alpha=2).mul_(1 / 24),
        g2,
    ]
    return [value[:, :, None].contiguous(memory_format=torch.channels_last) for value in values]


def _four_rows(x: Tensor, filters: list[Tensor], bias: Tensor | None, y: Tensor) -> None:
    """4k + 2 rows (N, C_in, 4k + 2, w) → `y`, k times four rows (N, k, 4, w, C_out)."""
    k = y.shape[1]
    x0, x1, x2, x3, x4, x5 = (x[:, :, i : i + 4 * k - 3 : 4] for i in range(6))
    even, odd = torch.sub(x4, x2, alpha=4), torch.sub(x3, x1, alpha=4)
    inputs = [torch.sub(x0, x2, alpha=1.25).add_(x4, alpha=0.25), even + odd, even - odd]
    even, odd = x4 - x2, x3 - x1
    inputs += [torch.add(even, odd, alpha=2), torch.sub(even, odd, alpha=2)]
    inputs += [torch.sub(x5, x3, alpha=5).add_(x1, alpha=4)]
    del even, odd
    products = []
    for filter in filters:
        # The second one is part of all four outputs, with factor 1, so it takes the bias there.
        b = bias if len(products) == 1 else None
        products.append(F.conv2d(inputs.pop(0), filter, b, padding=(0, 1)).movedim(1, -1))  # (N, k, w, C_out)
    m0, m1, m2, m3, m4, m5 = products
    one, minus_one, two, minus_two = m1 + m2, m1 - m2, m3 + m4, m3 - m4
    torch.add(m0.add_(one), two, out=y[:, :, 0])
    torch.add(minus_one, minus_two, alpha=2, out=y[:, :, 1])
    torch.add(one, two, alpha=4, out=y[:, :, 2])
    torch.add(m5.add_(minus_one), minus_two, alpha=8, out=y[:, :, 3])
