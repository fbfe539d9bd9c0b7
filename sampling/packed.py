"""The U-Net on a CPU: layers bring their weights into the order of oneDNN once, and not in each step.

PyTorch's convolutions and linear layers take weights as files have them, and oneDNN multiplies blocks of them; so every
call begins with a copy of the weights in another order. For one image, at 64×64 latents and below, that is a tenth of a
step. The result is the same up to the order of sums; in bfloat16, or in convolutions with several threads and two
latents at once, as guidance has them, bit for bit. Convolutions of large maps in float32, and those behind an
upsampling, are left alone: `layers.py` makes other filters of their weights.
"""

import contextlib
import ctypes
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_model import UNet
from layers import Conv3x3, dtypes_of_onednn
from lora import PLAIN, LoRAConv2d, LoRAConv3x3, LoRALinear

FROM_CALLS = 8  # for fewer, ordering takes longer than it saves
LINEAR_FROM = 2**16  # numbers in a weight; smaller ones are products of MKL in float32, which are as fast or faster
GIVE_BACK_EVERY = 2**27  # bytes of weights that were emptied: else they are kept beside those in order, 8 % too much
ONE_AT_A_TIME = threading.RLock()  # a model may sample in several threads
SAMPLINGS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # of each U-Net, those that are under way
THIS_THREAD = threading.local()  # `packed`: it samples, and long enough; `emptied`: bytes since some were given back


def _pytorchs_own() -> tuple:
    return nn.Conv2d.forward, nn.Conv2d._conv_forward, nn.Linear.forward, F.conv2d, F.linear


PYTORCHS_OWN = _pytorchs_own()  # others may be put in their place


class Packed(nn.Module):
    """A layer that orders its weight anew when it first computes, and has its parameter empty from then on.

    Other threads compute with the weight as it was. Whoever wants more than the output (the layer's state, a copy,
    another dtype, gradients) gets the layer as it was; only `weight` and `parameters()` are empty meanwhile.
    """

    packed: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        with ONE_AT_A_TIME:
            kind = type(self)
            if not issubclass(kind, Packed) or torch.is_grad_enabled():
                return type(_as_it_was(self)).forward(self, x)
            here = getattr(THIS_THREAD, "packed", False) and not torch.is_autocast_enabled("cpu")
            if here and self.packed is None and x.dtype == self.weight.dtype and not kind.is_faster_plain(self, x):
                with torch.inference_mode(False):
                    self.packed = kind.ordered(self, self.weight.data, x)
                    THIS_THREAD.emptied = getattr(THIS_THREAD, "emptied", 0) + self.weight.nbytes
                    self.weight.data = self.weight.new_empty(0)  # so that it takes no more memory
                if THIS_THREAD.emptied >= GIVE_BACK_EVERY:
                    give_memory_back()
                    THIS_THREAD.emptied = 0
            ordered = here and self.packed is not None and x.dtype == self.weight.dtype
            weight = self.packed if ordered else _plain_weight(self)
        return kind.output(self, x, weight)

    def is_faster_plain(self, x: Tensor) -> bool:
        return False

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        return _as_it_was(self)._apply(*args, **kwargs)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _as_it_was(self)._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _as_it_was(self)._load_from_state_dict(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple:  # copies and pickles
        return _as_it_was(self).__reduce_ex__(protocol)


class PackedConv2d(Packed, nn.Conv2d):
    def ordered(self, weight: Tensor, x: Tensor) -> Tensor:
        how = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *how, x.shape)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        if not weight.is_mkldnn:
            return self._conv_forward(x, weight, self.bias)
        how = self.padding, self.stride, self.dilation, self.groups
        return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *how, "none", [], "")


class PackedConv3x3(PackedConv2d, Conv3x3):
    def is_faster_plain(self, x: Tensor) -> bool:
        """Large maps in float32, for which it makes other filters of its weight."""
        return x.dtype == torch.float32 and self.is_large(x, x.shape[-2:])


class PackedLinear(Packed, nn.Linear):
    def ordered(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(weight, x.numel() // self.in_features)

    def output(self, x: Tensor, weight: Tensor) -> Tensor:
        if not weight.is_mkldnn:
            return F.linear(x, weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, self.bias, "none", [], "")


PACKED = {nn.Conv2d: PackedConv2d, Conv3x3: PackedConv3x3, nn.Linear: PackedLinear}
PACKED |= {LoRAConv2d: PackedConv2d, LoRAConv3x3: PackedConv3x3, LoRALinear: PackedLinear}


class _Sampling:
    """One that is under way; it lives no longer than `packed` does, however that ends."""


@contextlib.contextmanager
def packed(unet: UNet, calls: int) -> Iterator[None]:
    """Within, a U-Net on a CPU computes the same faster, if this thread calls it so many times.

    Of several threads, the first one packs, and the last one unpacks. Where an interrupt leaves something packed, the
    next sampling unpacks it, and so does whoever asks a layer for its state. Meanwhile nobody else may change the
    U-Net's weights or train them in another thread. Beside one that takes fewer steps nothing is packed, so that in
    float32 sums come in another order.
    """
    this, before = _Sampling(), getattr(THIS_THREAD, "packed", False)
    try:
        with ONE_AT_A_TIME:
            others = SAMPLINGS.setdefault(unet, weakref.WeakSet())
            THIS_THREAD.packed = calls >= FROM_CALLS
            if not others:  # else one of them may be computing with a weight that would be emptied
                unpack(unet)
                if THIS_THREAD.packed:
                    pack(unet)
            others.add(this)
        yield
    finally:
        with ONE_AT_A_TIME:
            THIS_THREAD.packed = before
            others = SAMPLINGS.get(unet, weakref.WeakSet())
            others.discard(this)
            if not others:
                unpack(unet)


def pack(unet: UNet) -> None:
    """From now on, layers order their weights once, until `unpack`, and this thread computes with these.

    It changes nothing on other devices, for dtypes that the CPU has no kernels for, under autocast, where the U-Net or
    a part of it is compiled, and for layers that compute otherwise than PyTorch's own.
    """
    THIS_THREAD.packed = True
    layers = [layer for layer in unet.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    if (
        type(unet) is not UNet
        or torch.is_autocast_enabled("cpu")
        or any(_is_compiled(module) for module in unet.modules())
        or PYTORCHS_OWN != _pytorchs_own()
        or torch._C._len_torch_dispatch_stack()  # somebody counts or changes what is computed
    ):
        return
    users, dtypes = Counter(layer.weight.data_ptr() for layer in layers), dtypes_of_onednn()
    for layer in layers:
        weight, merged = layer.weight, bool(getattr(layer, "unmerged", ()))  # its changes are in its weight
        if (
            type(layer) in PACKED
            and (type(layer) not in PLAIN or merged)
            and weight.device.type == "cpu"
            and weight.dtype in dtypes
            and users[weight.data_ptr()] == 1
            and weight.untyped_storage().nbytes() == weight.nbytes
            and not weight.is_shared()
            and not {"forward", "_conv_forward"} & vars(layer).keys()
            and (_pads_with_zeros(layer) if isinstance(layer, nn.Conv2d) else _is_worth_it(weight))
        ):
            layer.packed, layer.plain, layer.strides = None, type(layer), weight.stride()
            layer.__class__ = PACKED[type(layer)]


def _is_compiled(module: nn.Module) -> bool:
    """Or was given another `forward`, which may be a compiled one; of single layers, `pack` looks itself."""
    of_its_own = "forward" in vars(module) and not isinstance(module, nn.Conv2d | nn.Linear)
    return module._compiled_call_impl is not None or hasattr(module, "_orig_mod") or of_its_own


def _pads_with_zeros(layer: nn.Conv2d) -> bool:
    return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _is_worth_it(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 or weight.numel() >= LINEAR_FROM


def unpack(unet: nn.Module) -> None:
    """Every layer as it was, bit for bit, and in the memory layout that it had; a sampling goes on with these."""
    layers = [layer for layer in unet.modules() if isinstance(layer, Packed)]
    for layer in layers:
        _as_it_was(layer)
    if layers:
        give_memory_back()


def give_memory_back() -> None:
    """What weights took, for the C library would keep it, in pieces too small for the next weight and for a VAE."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):  # glibc has it
        library.malloc_trim(0)


def _as_it_was(layer: nn.Module) -> nn.Module:
    with ONE_AT_A_TIME, torch.inference_mode(False):
        if isinstance(layer, Packed):
            layer.weight.data = _plain_weight(layer)
            layer.__class__ = layer.plain
            del layer.packed, layer.plain, layer.strides
    return layer


def _plain_weight(layer: Packed) -> Tensor:
    if layer.packed is None:
        return layer.weight.data
    plain = layer.packed.to_dense()
    return plain.new_empty_strided(plain.shape, layer.strides).copy_(plain)
