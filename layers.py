"""What both networks are made of, faster on a CPU: 3×3 convolutions in half the multiplications, attention in blocks.

All of it is for inference, and equal to PyTorch's own up to the order of sums and the roundings of the dtype.

F(4, 3), in float32. Four outputs of a filter of three numbers need twelve multiplications, or six. This is the product
of two polynomials, of four coefficients and of three, transposed: six of its values, here those at 0, ±1, ±2 and ∞, say
all of it, and take hardly more than additions (Winograd 1980; Lavin & Gray 2016, arXiv:1509.09308, Section 4). It goes
down the rows: sums of six rows of the map are convolved with filters of one row (1×3), which is the work, and sums of
these are four rows of outputs. Where outputs are of size 1, it errs by up to 4·10⁻⁵, the direct one by up to 10⁻⁵; a
pixel that is a thousand times as large as the others adds a thousandth to the errors of the rows that share its sums.

Repeated pixels. An upsampling repeats each pixel 2×2, and a 3×3 filter over such a map sees only 2×2 pixels of the
small one; so four filters of 2×2, of weights added up, make the four pixels of the large one with four multiplications
each instead of nine (Aitken et al. 2017, arXiv:1707.02937, Section 2.2).

Filters are made of the weights in every call, so weights stay as they are. On one or two cores, most convolutions take
0.5 to 0.7 of the time, those of few channels 0.8; `python -m benchmarks.tricks` measures what that makes of a network.

Attention in bfloat16. PyTorch's fused kernel never has all scores at once, but its products are small and slow; in two
large ones with a softmax between them, some queries and heads at a time, it takes 0.5 to 0.8 of the time. Scores are
rounded to bfloat16 then, as all else is, so that outputs err more: twice as much where scores are of size 1, six times
where they are of size 4. What the networks that ship give errs as before.

All of this is more, and smaller, work for all threads at once. Beside a program that keeps one of the cores busy, each
piece waits for it: that takes 2 to 5 times as long as PyTorch's own, and as long if `OMP_WAIT_POLICY=passive` is set.
"""

import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PIXELS_FROM = 1024  # of a feature map; to make the filters takes longer than it saves on smaller ones
CHANNELS_FROM = 32
WORK_FROM = 2**25  # multiplications by one of the nine numbers of each filter; with less, so many calls take longer
ROWS_OF = 2**18  # numbers that a sum of rows may hold, so that some of them fit into a CPU's cache
QUERIES_FROM = 256  # of an attention
PRODUCTS_FROM = 5 * 2**20  # multiplications for the scores of an image; with less, the calls take longer than is saved
SCORES_OF = 2**21  # scores at a time, so that they fit into a CPU's cache
QUERIES_OF = 512  # at a time, however many keys there are, since oneDNN orders the keys anew for each block

PYTORCHS_OWN = nn.Conv2d._conv_forward
GLOBAL_HOOKS = nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks


class Conv3x3(nn.Conv2d):
    """`nn.Conv2d(C_in, C_out, 3, padding=1)`: (N, C_in, h, w) → (N, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if x.dtype == torch.float32 and self.is_large(x, x.shape[-2:]):
            return convolve(x, weight, bias)
        return super()._conv_forward(x, weight, bias)

    def of_repeated(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The convolution of a map whose pixels are repeated up to `size`: (N, C_in, h, w) → (N, C_out, *size)."""
        weight = self.weight.detach()  # which another thread may order and empty meanwhile (sampling/packed.py)
        twice = tuple(size) == (2 * x.shape[-2], 2 * x.shape[-1])
        many = size[0] * size[1] >= 2 * self.out_channels  # pixels of the large map, else the filters take too long
        if twice and many and weight.numel() and self.is_large(x, size) and not is_watched(self):
            return convolve_repeated(x, weight, self.bias)
        return self(F.interpolate(x, size=tuple(size), mode="nearest"))

    def is_large(self, x: Tensor, size: tuple[int, int]) -> bool:
        """Whether it is worth it: by the map and not by the batch, so that an image has the same bits in any batch.

        (An image without guidance is alone in its batch, for which PyTorch's own kernels may give other bits.)
        """
        return (
            _is_inference()
            and size[0] * size[1] >= PIXELS_FROM
            and min(self.in_channels, self.out_channels) >= CHANNELS_FROM
            and size[0] * size[1] * self.in_channels * self.out_channels >= WORK_FROM
            and x.device.type == "cpu"
            and x.dtype == self.weight.dtype
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.padding_mode == "zeros"  # programs that make images for tiling put another one in its place
            and nn.Conv2d._conv_forward is PYTORCHS_OWN  # or another function, for all convolutions
        )


def is_watched(layer: nn.Module) -> bool:
    """By hooks, or another program has put its own function, or a compiled one, in the place of this one."""
    replaced = {"forward", "_conv_forward"} & vars(layer).keys()
    hooks = layer._forward_hooks, layer._forward_pre_hooks, *GLOBAL_HOOKS
    return bool(replaced or layer._compiled_call_impl is not None or any(hooks))


def upsampled(x: Tensor, size: tuple[int, int], conv: nn.Module) -> Tensor:
    """x with its pixels repeated up to `size`, and convolved: (N, C_in, h, w) → (N, C_out, *size)."""
    if isinstance(conv, Conv3x3):
        return conv.of_repeated(x, size)
    return conv(F.interpolate(x, size=tuple(size), mode="nearest"))  # another program's layer


def _is_inference() -> bool:
    """Neither compiled or traced, nor with gradients, nor under autocast, nor within torch.func or forward-mode
    differentiation, which do not know all of the operators used here."""
    return (
        not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._functorch.maybe_current_level() is None
        and torch.autograd.forward_ad._current_level < 0
    )


# ----------------------------------------------------------------------------------------------------------------------
# F(4, 3)
# ----------------------------------------------------------------------------------------------------------------------


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 3×3 convolution, padded with zeros, by F(4, 3) down the rows.

    (N, C_in, h, w), (C_out, C_in, 3, 3) → (N, C_out, h, w), channels-last. Where a map is larger than the weight, some
    rows at a time, so that a cache holds them; else all of them with one filter at a time, for the filters' memory.
    """
    filters, (h, w) = filters_of(weight), x.shape[-2:]
    fours = -(-h // 4)
    at_once = max(1, ROWS_OF // (w * max(weight.shape[:2]))) if 9 * len(weight) < h * w else fours
    filters = filters if at_once >= fours else list(filters)
    y = x.new_empty(len(x), fours, 4, w, len(weight))
    for start in range(0, fours, at_once):
        end = min(start + at_once, fours)
        top, bottom = 4 * start - 1, 4 * end + 1  # with the row above and the one below
        rows = x[:, :, max(top, 0) : bottom]
        if top < 0 or bottom > h:
            rows = F.pad(rows, (0, 0, max(-top, 0), max(bottom - h, 0)))
        _four_rows(rows, filters, bias, y[:, start:end])
    return y.flatten(1, 2)[:, :h].contiguous().movedim(-1, 1)


def filters_of(weight: Tensor) -> Iterator[Tensor]:
    """Filters of three rows → the values of g₀ + g₁z + g₂z² at 0, ±1, ±2 and ∞, with the factors of interpolation.

    (C_out, C_in, 3, 3) → six of (C_out, C_in, 1, 3), one after the other.
    """
    g0, g1, g2 = weight.unbind(2)
    yield _of_one_row(g0)
    even = g0 + g2
    yield _of_one_row((even + g1).mul_(-1 / 6))
    yield _of_one_row(even.sub_(g1).mul_(-1 / 6))
    even = torch.add(g0, g2, alpha=4)
    yield _of_one_row(torch.add(even, g1, alpha=2).mul_(1 / 24))
    yield _of_one_row(even.sub_(g1, alpha=2).mul_(1 / 24))
    yield _of_one_row(g2)


def _of_one_row(weight: Tensor) -> Tensor:
    return weight[:, :, None].contiguous(memory_format=torch.channels_last)


def _four_rows(x: Tensor, filters: Iterable[Tensor], bias: Tensor | None, y: Tensor) -> None:
    """4k + 2 rows (N, C_in, 4k + 2, w) → `y`, k times four rows (N, k, 4, w, C_out)."""
    # The second product is part of all four outputs, with factor 1, so the bias comes with it.
    biases = (None, bias, None, None, None, None)
    products = (F.conv2d(*each, padding=(0, 1)) for each in zip(_sums_of_rows(x), filters, biases, strict=True))
    m0, m1, m2, m3, m4, m5 = (product.movedim(1, -1) for product in products)  # (N, k, w, C_out)
    one, two = m1 + m2, m3 + m4
    minus_one, minus_two = m1.sub_(m2), m3.sub_(m4)
    torch.add(m0.add_(one), two, out=y[:, :, 0])
    torch.add(minus_one, minus_two, alpha=2, out=y[:, :, 1])
    torch.add(one, two, alpha=4, out=y[:, :, 2])
    torch.add(m5.add_(minus_one), minus_two, alpha=8, out=y[:, :, 3])


def _sums_of_rows(x: Tensor) -> Iterator[Tensor]:
    """What the six filters see of 4k + 2 rows: (N, C_in, 4k + 2, w) → six of (N, C_in, k, w), one after the other."""
    x0, x1, x2, x3, x4, x5 = (x[:, :, i : i + x.shape[2] - 5 : 4] for i in range(6))
    yield torch.sub(x0, x2, alpha=1.25).add_(x4, alpha=0.25)
    even, odd = torch.sub(x4, x2, alpha=4), torch.sub(x3, x1, alpha=4)
    yield even + odd
    yield even.sub_(odd)
    even, odd = x4 - x2, x3 - x1
    yield torch.add(even, odd, alpha=2)
    yield even.sub_(odd, alpha=2)
    yield torch.sub(x5, x3, alpha=5).add_(x1, alpha=4)


# ----------------------------------------------------------------------------------------------------------------------
# Repeated pixels
# ----------------------------------------------------------------------------------------------------------------------


def convolve_repeated(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The 3×3 convolution, padded with zeros, of a map that has each pixel of x 2×2 times.

    (N, C_in, h, w), (C_out, C_in, 3, 3) → (N, C_out, 2h, 2w), channels-last.
    """
    n, _, h, w = x.shape
    y = x.new_empty(n, h, 2, w, 2, len(weight))
    for row, rows in enumerate(_halves(weight.to(torch.promote_types(weight.dtype, torch.float32)), 2)):
        for column, filter in enumerate(_halves(rows, 3)):
            filter = filter.to(x.dtype).contiguous(memory_format=torch.channels_last)
            z = F.conv2d(x, filter, bias, padding=1)  # (N, C_out, h + 1, w + 1)
            y[:, :, row, :, column] = z[:, :, row : row + h, column : column + w].movedim(1, -1)
    return y.flatten(3, 4).flatten(1, 2).movedim(-1, 1)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """What a filter of three has of two neighbours: of the first of two equal pixels one and two, of the second two
    and one."""
    first, middle, last = weight.unbind(dim)
    return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)


# ----------------------------------------------------------------------------------------------------------------------
# Attention
# ----------------------------------------------------------------------------------------------------------------------


def dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's `scaled_dot_product_attention`: q (N, heads, n, d), k and v (N, heads, L, d) → like q."""
    if is_faster_in_blocks(q, k, v):
        return attend_in_blocks(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def is_faster_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Much work in bfloat16 on a CPU that has instructions for it, by one image and not by the batch."""
    return (
        _is_inference()
        and q.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype == torch.bfloat16
        and q.ndim == k.ndim == 4
        and k.shape == v.shape
        and (q.shape[:2], q.shape[3]) == (k.shape[:2], k.shape[3])
        and q.shape[2] >= QUERIES_FROM
        and math.prod(q.shape[1:]) * k.shape[2] >= PRODUCTS_FROM
        and _multiplies_bfloat16()
    )


def _multiplies_bfloat16() -> bool:
    """By AVX-512 and oneDNN. With AMX, PyTorch's fused kernel is another one."""
    has_instructions = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
    return has_instructions and torch.bfloat16 in dtypes_of_onednn()


def dtypes_of_onednn() -> set[torch.dtype]:
    """For which the CPU has kernels; none where oneDNN is missing or switched off."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return set()
    return {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, all keys for some queries of some heads at a time. An image has the same bits in any batch."""
    (n, d), keys = q.shape[-2:], k.shape[-2]
    queries = min(n, max(QUERIES_OF, SCORES_OF // keys))
    heads = max(1, SCORES_OF // (queries * keys))
    out = q.new_empty(q.shape)
    rows, columns, values, outputs = q.flatten(0, 1), k.flatten(0, 1).mT, v.flatten(0, 1), out.flatten(0, 1)
    scores = q.new_empty(min(heads, len(rows)), queries, keys)  # one piece of memory for all
    for head in (slice(i, i + heads) for i in range(0, len(rows), heads)):
        for some in (slice(i, i + queries) for i in range(0, n, queries)):
            row = rows[head, some]
            block = scores[: row.shape[0], : row.shape[1]]
            torch.baddbmm(block, row, columns[head], beta=0, alpha=d**-0.5, out=block)
            torch.softmax(block, -1, out=block)
            torch.bmm(block, values[head], out=outputs[head, some])
    return out
