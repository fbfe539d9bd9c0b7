"""The U-Net on a CPU: convolutions bring their weights into the order of oneDNN once, and not in each step.

PyTorch's convolutions take weights as files have them, and oneDNN multiplies blocks of them; so every call begins with
a copy of the weights in another order. For one image, at 64×64 latents and below, that is a tenth of a step. Kernels
are the same, and so is every bit; but with a single thread PyTorch takes others, with another order of sums.
"""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffusion_model import UNet
from lora import LoRAConv2d

ONE_AT_A_TIME = threading.RLock()  # a model may sample in several threads


class PackedConv2d(nn.Conv2d):
    """A convolution that orders its weight anew when it first computes, and has its parameter empty from then on."""

    packed: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        how = self.padding, self.stride, self.dilation, self.groups
        with ONE_AT_A_TIME:
            if type(self) is not PackedConv2d:  # another thread has unpacked it meanwhile
                return self(x)
            if self.packed is None:
                self.packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *how, x.shape)
                self.weight.data = self.weight.data.new_empty(0)  # so that it takes no more memory
            packed = self.packed
        return torch.ops.mkldnn._convolution_pointwise(x, packed, self.bias, *how, "none", [], "")


@contextlib.contextmanager
def packed(unet: UNet) -> Iterator[None]:
    """Within, a U-Net on a CPU computes the same faster, and the weights of its convolutions are not to be touched.

    Of several threads, the first one packs and the last one unpacks.
    """
    with ONE_AT_A_TIME:
        unet.samplings = getattr(unet, "samplings", 0) + 1
        if unet.samplings == 1:
            pack(unet)
    try:
        yield
    finally:
        with ONE_AT_A_TIME:
            unet.samplings -= 1
            if not unet.samplings:
                unpack(unet)


def pack(unet: UNet) -> None:
    """From now on, convolutions order their weights once. No gradients, until `unpack`.

    It changes nothing on other devices, for dtypes that the CPU has no kernels for, and where the U-Net is compiled.
    """
    weight = unet.conv_in.weight
    if type(unet) is not UNet or weight.device.type != "cpu" or weight.dtype not in _dtypes_of_onednn():
        return
    for layer in unet.modules():
        merged = type(layer) is LoRAConv2d and layer.unmerged  # its changes are in its weight
        if type(layer) is nn.Conv2d or merged:
            layer.packed, layer.plain, layer.strides = None, type(layer), layer.weight.stride()
            layer.__class__ = PackedConv2d


def _dtypes_of_onednn() -> set[torch.dtype]:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return set()
    return {torch.float32} | ({torch.bfloat16} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else set())


def unpack(unet: nn.Module) -> None:
    """Every convolution as it was, bit for bit, and in the memory layout that it had; a sampling goes on with these."""
    with ONE_AT_A_TIME:
        for layer in unet.modules():
            if isinstance(layer, PackedConv2d):
                if layer.packed is not None:
                    plain = layer.packed.to_dense()
                    layer.weight.data = plain.new_empty_strided(plain.shape, layer.strides).copy_(plain)
                layer.__class__, layer.packed = layer.plain, None
