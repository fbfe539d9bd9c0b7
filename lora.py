"""LoRA: a fine-tuning as small matrices beside frozen weights, a few MB instead of the whole model.

Paper: Hu et al. 2021, arXiv:2106.09685. Of what a layer learns from thirty images, little is needed to say it: the
change of its weight W (out, in) has a low rank r, so it is a product of two thin matrices, and only they are trained:

    h = W x + scale · (α / r) · B A x        (Equation 3: A (r, in) is `down`, B (out, r) is `up`; α is `alpha`)

A starts at random and B at zero, so training begins at the model as it was; optimizer and average have a hundredth of
the numbers to keep. `scale` can be turned down or up when sampling, and several changes can be added up.

A network is not rebuilt: `add` makes a layer of another class, `LoRALinear` or `LoRAConv2d`, out of a layer that stays
where it is, with its name and weight. So it works for the U-Net and for CLIP, whose code knows nothing of it.
`published.lora_files` reads and writes the files.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import Conv3x3

# Which layers may be adapted, by the end of their names: those of attention, as in the paper, or more.
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
FEED_FORWARD = (".ff.net.0.proj", ".ff.net.2")
CONVOLUTIONS = (".conv1", ".conv2", ".conv_shortcut", ".proj_in", ".proj_out", "samplers.0.conv")
TARGETS = {
    "attention": ATTENTION,
    "feed_forward": ATTENTION + FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD + CONVOLUTIONS,
}

# ----------------------------------------------------------------------------------------------------------------------
# A layer and its low-rank changes
# ----------------------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """One change of one layer: x → scale · (α / r) · up(down(x)). At the start it is zero."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = layer.weight.shape[:2]
        like = {"bias": False, "device": layer.weight.device}
        if isinstance(layer, nn.Conv2d):  # `down` sees what the layer sees, `up` mixes channels
            self.down = nn.Conv2d(inputs, rank, layer.kernel_size, layer.stride, layer.padding, **like)
            self.up = nn.Conv2d(rank, outputs, 1, **like)
        else:
            self.down, self.up = nn.Linear(inputs, rank, **like), nn.Linear(rank, outputs, **like)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.rank, self.alpha, self.scale = rank, alpha, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.alpha / self.rank * self.up(self.down(x))

    def change(self) -> Tensor:
        """What it adds to the layer's weight, in float32: (out, in), or (out, in, 3, 3) for a 3×3 convolution."""
        up, down = self.up.weight.float().flatten(1), self.down.weight.float()
        return self.scale * self.alpha / self.rank * (up @ down.flatten(1)).unflatten(1, down.shape[1:])


class _Adapted:
    """A layer with changes by name. They are computed beside its weight, or are merged into it."""

    changes: nn.ModuleDict
    unmerged: tuple[nn.Parameter, ...]  # the layer's own weight while changes are merged, else empty

    def forward(self, x: Tensor) -> Tensor:
        h = super().forward(x)
        for change in () if self.unmerged else self.changes.values():
            if change.scale:  # at 0 it is the layer itself, bit for bit
                h = h + change(x)
        return h


class LoRALinear(_Adapted, nn.Linear):
    """A linear layer with low-rank changes."""


class LoRAConv2d(_Adapted, nn.Conv2d):
    """A convolution with low-rank changes."""


class LoRAConv3x3(_Adapted, Conv3x3):
    """One of 3×3 with low-rank changes."""

    def of_repeated(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        beside = not self.unmerged and any(change.scale for change in self.changes.values())
        return self(F.interpolate(x, size=tuple(size), mode="nearest")) if beside else super().of_repeated(x, size)


ADAPTED = {nn.Linear: LoRALinear, nn.Conv2d: LoRAConv2d, Conv3x3: LoRAConv3x3}
PLAIN = {adapted: plain for plain, adapted in ADAPTED.items()}

# ----------------------------------------------------------------------------------------------------------------------
# A network and its low-rank changes
# ----------------------------------------------------------------------------------------------------------------------


def targets(network: nn.Module, which: str = "attention") -> list[str]:
    """The layers of a U-Net to adapt: "attention", "feed_forward" (attention and feed-forward) or "all".

    They are the same where it has a LoRA already.
    """
    layers = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    return [name for name in layers if name.endswith(TARGETS[which])]


def add(network: nn.Module, layers: Iterable[str], rank: int, alpha: float, name: str = "default") -> list[LowRank]:
    """Gives each of the `layers` a new change `name`, zero at the start; returns these.

    Weights are unmerged before. ValueError if there are no layers, or one has a change of this name.
    """
    unmerge(network)
    made = [add_to(network.get_submodule(layer), rank, alpha, name) for layer in layers]
    if not made:
        raise ValueError(f"the LoRA {name!r} would change no layer; pass the names of some.")
    return made


def add_to(layer: nn.Module, rank: int, alpha: float, name: str) -> LowRank:
    """Gives one layer a new change. ValueError if it has one of this name, or is no linear layer or convolution."""
    if type(layer) in ADAPTED:
        layer.changes, layer.unmerged = nn.ModuleDict(), ()
        layer.__class__ = ADAPTED[type(layer)]  # last: a stop in between leaves a layer that works
    elif not isinstance(layer, _Adapted):
        raise ValueError(f"a {type(layer).__name__} cannot have low-rank changes, only a linear layer or convolution.")
    if name in layer.changes:
        raise ValueError(f"there is a LoRA {name!r} already.")
    layer.changes[name] = LowRank(layer, rank, alpha)
    return layer.changes[name]


def adapted(network: nn.Module) -> dict[str, LoRALinear | LoRAConv2d | LoRAConv3x3]:
    """The layers that have changes, by name."""
    return {name: layer for name, layer in network.named_modules() if isinstance(layer, _Adapted)}


def set_scale(network: nn.Module, name: str, scale: float) -> None:
    """How strongly the change `name` counts from now on: 0 = not at all, 1 = as it was trained."""
    was_merged = _is_merged(network)
    unmerge(network)
    for layer in adapted(network).values():
        if name in layer.changes:
            layer.changes[name].scale = scale
    if was_merged:
        merge(network)


@torch.no_grad()
def merge(network: nn.Module) -> None:
    """Adds all changes to the weights (W + (α/r) B A): as fast as without them. The weights themselves are kept."""
    for layer in adapted(network).values():
        if not layer.unmerged:
            layer.unmerged = (layer.weight,)
            total = sum((change.change() for change in layer.changes.values() if change.scale), torch.zeros(()))
            merged = (layer.weight.float() + total.to(layer.weight.device)).to(layer.weight.dtype)
            layer.weight = nn.Parameter(merged, requires_grad=False)


def unmerge(network: nn.Module) -> None:
    """Gives all layers their own weights back, bit for bit, and the changes beside them."""
    for layer in adapted(network).values():
        if layer.unmerged:
            (weight,) = layer.unmerged
            weight.data = weight.data.to(layer.weight)  # the network may have moved meanwhile
            layer.weight, layer.unmerged = weight, ()


def remove(network: nn.Module, name: str | None = None) -> None:
    """Takes the change `name` away, or all: without any, it is the network that it was before any `add`."""
    was_merged = _is_merged(network)
    unmerge(network)
    for layer in adapted(network).values():
        if name in layer.changes:
            del layer.changes[name]
        if name is None or not layer.changes:
            _make_plain(layer)
    if was_merged:
        merge(network)


@contextlib.contextmanager
def as_one_network(network: nn.Module) -> Iterator[None]:
    """Within, it is a plain network whose weights contain the changes, to be written as such."""
    layers, was_merged = adapted(network), _is_merged(network)
    merge(network)
    kept = {name: (layer.changes, layer.unmerged) for name, layer in layers.items()}
    for layer in layers.values():
        _make_plain(layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.__class__ = ADAPTED[type(layer)]
            layer.changes, layer.unmerged = kept[name]
        if not was_merged:
            unmerge(network)


def _is_merged(network: nn.Module) -> bool:
    return any(layer.unmerged for layer in adapted(network).values())


def _make_plain(layer: LoRALinear | LoRAConv2d | LoRAConv3x3) -> None:
    """A layer of its first class, with the weight that it has now."""
    del layer.changes, layer.unmerged
    layer.__class__ = PLAIN[type(layer)]


def in_words(scales: dict[str, float]) -> str | None:
    """How an image's text names LoRAs and their scales; None if there are none."""
    return ", ".join(f"{name}:{scale:g}" for name, scale in scales.items()) or None
