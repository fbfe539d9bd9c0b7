"""The KL-f8 autoencoder of latent diffusion: images to latents of an eighth of their size, and back.

Papers: latent diffusion (Rombach et al. 2022, arXiv:2112.10752, Section 3.1) and VAE (Kingma & Welling 2014,
arXiv:1312.6114). The file reads from leaf to root: blocks → `Encoder`, `Decoder` → `DiagonalGaussian` → `VAE`.
Parameter names and layouts are those of diffusers' `AutoencoderKL`, so weights travel both ways unchanged.

Letters in the shape comments:
    N  images in the batch    C  channels    H, W  size of the image    h, w  size of a feature map (latents: 1/8)

Spaces: pixels in [-1, 1] → `encode` → raw latents → `scale_latents` → latents of unit variance, which the U-Net sees.

`VAE.load` reads the `vae_model.pth` that `VAE.save` writes; `published.load_vae` reads everybody else's files as well.
"""

import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers import Conv3x3, dot_product_attention, is_watched, upsampled

# PyTorch's own switch, which it looks at before its first tensor: on Linux, large tensors lie in pages of 2 MB instead
# of 4 KB, and a feature map of 512×512 no longer costs thousands of page faults. Programs that made a tensor before
# they imported this have small pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# ----------------------------------------------------------------------------------------------------------------------
# Blocks
# ----------------------------------------------------------------------------------------------------------------------


def _is_ours(layer: nn.Module) -> bool:
    """Whether what it gives may be overwritten: of a map of 512×512, what is new costs more than what is computed."""
    known = type(layer) in (nn.GroupNorm, Conv3x3) and not is_watched(layer)
    return known and not torch.is_grad_enabled()


def _silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normed x, like x."""
    return F.silu(norm(x), inplace=_is_ours(norm))


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions around a skip: (N, C_in, h, w) → (N, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(_silu(self.norm1, x))
        h = self.conv2(_silu(self.norm2, h))
        x = self.conv_shortcut(x)
        return h.add_(x) if _is_ours(self.conv2) and h.dtype == x.dtype else x + h


class SelfAttention(nn.Module):
    """One head over all pixels of the smallest feature map, added to it: (N, C, h, w) → (N, C, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list, so that the weight is called `to_out.0` as in published files.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, hw, C)
        q, k, v = self.to_q(h)[:, None], self.to_k(h)[:, None], self.to_v(h)[:, None]  # (N, 1 head, hw, C)
        h = self.to_out[0](dot_product_attention(q, k, v)[:, 0])  # (N, hw, C)
        return x + h.transpose(1, 2).unflatten(2, x.shape[-2:])


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the smallest size: (N, C, h, w) → (N, C, h, w)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([SelfAttention(channels, groups)])
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halves height and width: (N, C, h, w) → (N, C, h/2, w/2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded right and below only, as in the published weights


class Upsample(nn.Module):
    """Repeats each pixel 2×2 and smooths with a convolution: (N, C, h, w) → (N, C, 2h, 2w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return upsampled(x, (2 * x.shape[-2], 2 * x.shape[-1]), self.conv)


class Level(nn.Module):
    """The residual blocks of one resolution, then its resampling if there is one."""

    def __init__(self, resnets: list[ResnetBlock], down: Downsample | None = None, up: Upsample | None = None) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if down is not None:
            self.downsamplers = nn.ModuleList([down])
        if up is not None:
            self.upsamplers = nn.ModuleList([up])

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in (*getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ())):
            x = resample(x)
        return x


# ----------------------------------------------------------------------------------------------------------------------
# Encoder and decoder
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class VAEConfig:
    """The shape of an autoencoder, finest resolution first; the defaults are Stable Diffusion's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215  # 1/std of the raw latents, see `VAE.scale_latents`

    def __post_init__(self) -> None:
        self.block_out_channels = tuple(self.block_out_channels)
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}."
                )

    @property
    def downsampling(self) -> int:
        """Pixels per latent, along each side: 8."""
        return 2 ** (len(self.block_out_channels) - 1)


class Encoder(nn.Module):
    """Images (N, 3, H, W) → means and log-variances before `quant_conv` (N, 2·4, H/8, W/8)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        c = channels[0]
        for i, c_out in enumerate(channels):
            resnets = [ResnetBlock(c if j == 0 else c_out, c_out, groups) for j in range(config.layers_per_block)]
            self.down_blocks.append(Level(resnets, down=Downsample(c_out) if i < len(channels) - 1 else None))
            c = c_out
        self.mid_block = MidBlock(c, groups)
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, 2 * config.latent_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv_in(images)  # (N, C, H, W)
        for level in self.down_blocks:
            x = level(x)  # half the size at every level but the last
        x = self.mid_block(x)  # (N, C, h, w)
        return self.conv_out(_silu(self.conv_norm_out, x))  # (N, 8, h, w)


class Decoder(nn.Module):
    """Latents after `post_quant_conv` (N, 4, h, w) → images (N, 3, 8h, 8w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        channels, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups)
        self.up_blocks = nn.ModuleList()
        c = channels[0]
        for i, c_out in enumerate(channels):
            resnets = [ResnetBlock(c if j == 0 else c_out, c_out, groups) for j in range(config.layers_per_block + 1)]
            self.up_blocks.append(Level(resnets, up=Upsample(c_out) if i < len(channels) - 1 else None))
            c = c_out
        self.conv_norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))  # (N, C, h, w)
        for level in self.up_blocks:
            x = level(x)  # twice the size at every level but the last
        return self.conv_out(_silu(self.conv_norm_out, x))  # (N, 3, H, W)


# ----------------------------------------------------------------------------------------------------------------------
# The autoencoder
# ----------------------------------------------------------------------------------------------------------------------


class DiagonalGaussian:
    """The posterior q(z|x), independent for each latent: mean and log-variance (N, 4, h, w)."""

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)  # so that exp() stays finite early in training

    @classmethod
    def from_moments(cls, moments: Tensor) -> "DiagonalGaussian":
        """From mean and log-variance stacked along the channels (N, 8, h, w)."""
        return cls(*moments.chunk(2, dim=1))

    @property
    def moments(self) -> Tensor:
        return torch.cat([self.mean, self.logvar], dim=1)  # (N, 8, h, w)

    def sample(self, generator: torch.Generator | None = None, noise: Tensor | None = None) -> Tensor:
        """mean + std · ε (Kingma & Welling 2014, Equation 10); ε is `noise`, or drawn on the generator's device."""
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.logvar) * noise.to(self.mean.device)

    def mode(self) -> Tensor:
        """The most likely latents: the mean."""
        return self.mean

    def kl(self) -> Tensor:
        """KL(q(z|x) ‖ N(0, I)) of each image, summed over its latents, in nats: (N,) (same paper, Appendix B)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


def _laid_out(x: Tensor) -> Tensor:
    """Channels-last on a CPU, which all feature maps behind it then are: 1.1 to 1.4 times as fast on two cores."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class VAE(nn.Module):
    """Images in [-1, 1] to raw latents and back; raw latents to unit variance and back."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor) -> DiagonalGaussian:
        """(N, 3, H, W) in [-1, 1], H and W divisible by 8 → the posterior over latents (N, 4, H/8, W/8)."""
        f = self.config.downsampling
        if images.shape[-2] % f or images.shape[-1] % f:
            raise ValueError(
                f"images of {images.shape[-1]}×{images.shape[-2]}: width and height must be divisible by {f}."
            )
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(_laid_out(images))).contiguous())

    def scale_latents(self, raw_latents: Tensor) -> Tensor:
        """Raw latents, or their means → unit variance, as the U-Net sees them (Rombach et al. 2022, Appendix G)."""
        return raw_latents * self.config.scaling_factor

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """The inverse of `scale_latents`: what `decode` expects."""
        return latents / self.config.scaling_factor

    def standardise_latents(self, mean: Tensor, std: float) -> None:
        """From now on, latents have mean 0 and variance 1; `mean` by channel (4,) and `std` are of the raw ones before.

        Reconstructions stay as they are, and the scaling factor, too (`rescaled_latents`). Why mean 0: where the
        schedule's last ᾱ is not 0, training sees √ᾱ · mean in x_T and the U-Net learns to read an image's brightness
        from it, but sampling starts from noise of mean 0 (Lin et al. 2024, Section 3.1).
        """
        self.load_state_dict(rescaled_latents(self.state_dict(), 1 / (std * self.config.scaling_factor), mean))

    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents (N, 4, h, w) → images (N, 3, 8h, 8w) in about [-1, 1]."""
        return self.decoder(_laid_out(self.post_quant_conv(latents))).contiguous()

    def decode_tiled(self, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
        """`decode` for large images, tile by tile, so that memory does not grow with the image.

        Tiles of `tile`×`tile` latents overlap by `overlap` and are blended there with linear ramps. Attention and
        group norms see one tile at a time, so the result is close to `decode`, not equal.
        """
        n, _, h, w = latents.shape
        f, ramp = self.config.downsampling, overlap * self.config.downsampling
        total = latents.new_zeros(n, self.config.out_channels, h * f, w * f)
        weight = latents.new_zeros(1, 1, h * f, w * f)
        for top in _tile_starts(h, tile, overlap):
            for left in _tile_starts(w, tile, overlap):
                pixels = self.decode(latents[:, :, top : top + tile, left : left + tile])
                fade = _fade(pixels.shape[-2], ramp, pixels)[:, None] * _fade(pixels.shape[-1], ramp, pixels)[None, :]
                window = (..., slice(top * f, top * f + len(fade)), slice(left * f, left * f + fade.shape[1]))
                total[window] += pixels * fade
                weight[window] += fade
        return total / weight

    def save(self, path: str | os.PathLike) -> None:
        """Writes config and weights (float16: half the file, far below the error of an autoencoder) to a `.pth`."""
        weights = {name: tensor.detach().to("cpu", torch.float16) for name, tensor in self.state_dict().items()}
        temporary = Path(f"{path}.tmp")
        torch.save({"config": asdict(self.config), "state_dict": weights}, temporary)
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "VAE":
        """Reads what `save` wrote: in float32, on the CPU, in eval mode.

        FileNotFoundError if there is no such file, ValueError if it is damaged or another kind of file.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is not a file; published.load_vae also takes folders and hub ids.")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)  # runs nothing that the file contains
            vae = cls(VAEConfig(**content["config"]))
            vae.load_state_dict(content["state_dict"], strict=True)
        except Exception as error:  # a damaged file can fail anywhere
            raise ValueError(
                f"{path} is damaged or was not written by VAE.save ({type(error).__name__}); published.load_vae reads "
                "other kinds of files."
            ) from error
        return vae.eval()


def rescaled_latents(weights: dict[str, Tensor], r: float, mean: Tensor | None = None) -> dict[str, Tensor]:
    """The weights of a VAE whose raw latents are r (z - mean) where those of `weights` are z; same reconstructions.

    The layers on both sides of the latents are linear, so they can take it up exactly: mean and standard deviation come
    out r times as large (log-variance + 2 ln r), and the decoder divides by r and adds `mean` (4,), by default 0.
    """
    weight, bias = weights["quant_conv.weight"].float(), weights["quant_conv.bias"].float()
    back, offset = weights["post_quant_conv.weight"].float(), weights["post_quant_conv.bias"]
    c = len(offset)  # channels of the latents
    mean = torch.zeros(c, device=bias.device) if mean is None else mean
    return weights | {
        "quant_conv.weight": torch.cat([weight[:c] * r, weight[c:]]),
        "quant_conv.bias": torch.cat([(bias[:c] - mean) * r, bias[c:] + 2 * math.log(r)]),
        "post_quant_conv.weight": back / r,
        "post_quant_conv.bias": offset + back[:, :, 0, 0] @ mean,
    }


def _tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that neighbours overlap and the last one ends at the edge."""
    return [*range(0, max(length - tile, 0), tile - overlap), max(length - tile, 0)]


def _fade(length: int, ramp: int, like: Tensor) -> Tensor:
    """Weights that rise over `ramp` pixels from both ends: (length,).

    Weights stay above 0, so every output pixel has at least one tile.
    """
    distance = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(distance, distance.flip(0)).clamp(max=ramp) / ramp
