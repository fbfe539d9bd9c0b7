"""The text-conditioned U-Net of latent diffusion: noisy latents, a timestep and a text in, the noise (or v) out.

Papers: latent diffusion (Rombach et al. 2022, arXiv:2112.10752), DDPM (Ho et al. 2020, arXiv:2006.11239).

The file reads from leaf to root: time embedding → residual block → attention → spatial transformer → `UNet`.
Parameter names and layouts are those of diffusers' `UNet2DConditionModel`, so weights travel both ways unchanged.

Letters in the shape comments:
    N  images in the batch          C  channels of a feature map     h, w  height and width of a feature map
    L  text tokens (77 for CLIP)    D  width of the text encoding    E     width of the time embedding (4C)
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layers import Conv3x3, dot_product_attention, upsampled

# ----------------------------------------------------------------------------------------------------------------------
# Leaves: time embedding, residual block, resampling
# ----------------------------------------------------------------------------------------------------------------------


class TimestepEmbedding(nn.Module):
    """Timesteps (N,) → sinusoids (N, C) → two linear layers → (N, 4C) (DDPM, Appendix B)."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.linear_1 = nn.Linear(channels, out_channels)
        self.linear_2 = nn.Linear(out_channels, out_channels)

    def sinusoids(self, timesteps: Tensor) -> Tensor:
        """cos and sin at C/2 geometric frequencies (Vaswani et al. 2017, Section 3.5; DDPM, Appendix B).

        In float32 whatever the model's type: 999 is not exact in bf16.
        """
        half = self.channels // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
        angles = timesteps.float()[:, None] * torch.exp(-math.log(10000.0) * exponent)  # (N, C/2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)  # (N, C)

    def forward(self, timesteps: Tensor) -> Tensor:
        t = self.sinusoids(timesteps).to(self.linear_1.weight.dtype)  # (N, C)
        return self.linear_2(F.silu(self.linear_1(t)))  # (N, 4C)


class ResnetBlock(nn.Module):
    """Two 3×3 convolutions beside a skip, the time added in between: (N, C_in, h, w), (N, E) → (N, C_out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = Conv3x3(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return self.conv_shortcut(x) + h


class Downsample(nn.Module):
    """Halves height and width with a strided convolution: (N, C, h, w) → (N, C, ⌈h/2⌉, ⌈w/2⌉)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Repeats pixels up to `size` and smooths with a convolution: (N, C, h, w) → (N, C, *size)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        # The size of the skip that comes next, not a factor of 2: odd sizes were rounded up on the way down.
        return upsampled(x, size, self.conv)


# ----------------------------------------------------------------------------------------------------------------------
# The spatial transformer: pixels attend to each other and to the text
# ----------------------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(QKᵀ/√d) V (Vaswani et al. 2017, Equation 1): q (N, heads, n, d), k and v (N, heads, L, d) → like q."""
    if q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:
        # There, training through PyTorch's fused kernel takes 1.2 to 3 times as long as through its three parts (up to
        # about 256 keys, measured); scores are rounded to bfloat16, as everything is.
        scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (N, heads, n, L)
        return torch.softmax(scores, dim=-1) @ v
    return dot_product_attention(q, k, v)


class CrossAttention(nn.Module):
    """Multi-head attention from x (N, hw, C) to a context (N, L, D), or to x itself if there is none → (N, hw, C).

    Rombach et al. 2022, Section 3.3.
    """

    def __init__(self, channels: int, context_dim: int | None, heads: int) -> None:
        super().__init__()
        self.heads = heads
        context_dim = context_dim or channels
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_dim, channels, bias=False)
        self.to_v = nn.Linear(context_dim, channels, bias=False)
        # A list, so that the weight is called `to_out.0` as in published files.
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, n, C) → (N, heads, n, C/heads)

    def keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the queries of x meet: (N, L, D) → twice (N, heads, L, C/heads)."""
        return self._split_heads(self.to_k(context)), self._split_heads(self.to_v(context))

    def forward(self, x: Tensor, context: "Context | None" = None) -> Tensor:
        q = self._split_heads(self.to_q(x))
        k, v = context[self] if isinstance(context, dict) else self.keys_and_values(x if context is None else context)
        out = attend(q, k, v)  # (N, heads, hw, C/heads)
        return self.to_out[0](out.transpose(1, 2).flatten(2))  # (N, hw, C)


# The text as a U-Net takes it: its encoding (N, L, D), or what `UNet.keys_and_values` made of that beforehand.
Context = Tensor | dict[CrossAttention, tuple[Tensor, Tensor]]


class GEGLU(nn.Module):
    """A linear layer gated by the GELU of another (Shazeer 2020, Equation 6): (..., C) → (..., hidden)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU up to four times the width and back: (N, hw, C) → (N, hw, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # Identity stands where others have dropout, and keeps the published names "net.0.proj" and "net.2".
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward, each pre-normed and added: (N, hw, C) → same."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = CrossAttention(channels, None, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = CrossAttention(channels, context_dim, heads)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A feature map as a sequence of pixels, through transformer blocks, added back: (N, C, h, w) → (N, C, h, w)."""

    def __init__(self, channels: int, context_dim: int, heads: int, depth: int, linear: bool, groups: int) -> None:
        super().__init__()
        self.linear = linear  # SD 2.x projects with a linear layer where SD 1.x has a 1×1 convolution: the same maths
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        size = x.shape[-2:]
        h = self.norm(x)  # (N, C, h, w)
        h = self.proj_in(_to_sequence(h)) if self.linear else _to_sequence(self.proj_in(h))  # (N, hw, C)
        for block in self.transformer_blocks:
            h = block(h, context)  # (N, hw, C)
        h = _to_map(self.proj_out(h), size) if self.linear else self.proj_out(_to_map(h, size))  # (N, C, h, w)
        return x + h


def _to_sequence(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (N, C, h, w) → (N, hw, C)


def _to_map(x: Tensor, size: torch.Size) -> Tensor:
    return x.transpose(1, 2).unflatten(2, size)  # (N, hw, C) → (N, C, h, w)


# ----------------------------------------------------------------------------------------------------------------------
# The U-Net
# ----------------------------------------------------------------------------------------------------------------------


class Level(nn.Module):
    """One resolution of the U-Net: residual blocks, each with a transformer behind it where the level attends.

    `UNet.forward` calls `resnets` and `attentions` itself, since it stores or consumes a skip after each.
    """

    def __init__(self, resnets: list[ResnetBlock], attentions: list[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def attention(self, i: int) -> SpatialTransformer | None:
        return self.attentions[i] if hasattr(self, "attentions") else None


@dataclass
class UNetConfig:
    """The shape of a U-Net; the defaults are Stable Diffusion 1.x. Tuples go by resolution, finest first."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2  # residual blocks per level going down; one more going up
    attention_levels: tuple[bool, ...] = (True, True, True, False)  # the middle always attends
    num_attention_heads: int | tuple[int, ...] = 8  # one number for all levels, or one per level
    context_dim: int = 768  # width of the text encoding
    transformer_depth: int = 1
    use_linear_projection: bool = False
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        self.block_out_channels = tuple(self.block_out_channels)
        self.attention_levels = tuple(bool(a) for a in self.attention_levels)
        levels = len(self.block_out_channels)
        if len(self.attention_levels) != levels:
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} entries for {levels} levels of channels."
            )
        if isinstance(self.num_attention_heads, list | tuple):
            self.num_attention_heads = tuple(self.num_attention_heads)
        if len(self.heads) != levels:
            raise ValueError(f"num_attention_heads has {len(self.heads)} entries for {levels} levels of channels.")
        for channels, heads in zip(self.block_out_channels, self.heads, strict=True):
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: {channels} is not divisible by norm_num_groups={self.norm_num_groups}."
                )
            if channels % heads:
                raise ValueError(f"block_out_channels: {channels} channels do not divide into {heads} attention heads.")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads per level."""
        n = self.num_attention_heads
        return n if isinstance(n, tuple) else (n,) * len(self.block_out_channels)


class UNet(nn.Module):
    """Predicts the noise (or v) in noisy latents from the timestep and the text.

    forward(latents (N, 4, h, w), timesteps (N,), context (N, L, D)) → prediction (N, 4, h, w)
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: recompute blocks in the backward pass; memory for time
        channels, groups, heads = config.block_out_channels, config.norm_num_groups, config.heads
        time_channels = 4 * channels[0]
        last = len(channels) - 1

        def resnet(c_in: int, c_out: int) -> ResnetBlock:
            return ResnetBlock(c_in, c_out, time_channels, groups)

        def transformer(level: int) -> SpatialTransformer:
            linear, depth = config.use_linear_projection, config.transformer_depth
            return SpatialTransformer(channels[level], config.context_dim, heads[level], depth, linear, groups)

        self.time_embedding = TimestepEmbedding(channels[0], time_channels)
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        skips = [channels[0]]  # channels of every feature map that the way up takes back as a skip

        self.down_blocks = nn.ModuleList()
        c = channels[0]
        for i, c_out in enumerate(channels):
            resnets, attentions = [], []
            for _ in range(config.layers_per_block):
                resnets.append(resnet(c, c_out))
                attentions += [transformer(i)] if config.attention_levels[i] else []
                c = c_out
                skips.append(c)
            level = Level(resnets, attentions)
            if i < last:
                level.downsamplers = nn.ModuleList([Downsample(c)])
                skips.append(c)
            self.down_blocks.append(level)

        self.mid_block = Level([resnet(c, c), resnet(c, c)], [transformer(last)])

        self.up_blocks = nn.ModuleList()
        for i, c_out in reversed(list(enumerate(channels))):
            resnets, attentions = [], []
            for _ in range(config.layers_per_block + 1):
                resnets.append(resnet(c + skips.pop(), c_out))
                attentions += [transformer(i)] if config.attention_levels[i] else []
                c = c_out
            level = Level(resnets, attentions)
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(c)])
            self.up_blocks.append(level)

        self.conv_norm_out = nn.GroupNorm(groups, channels[0], eps=1e-5)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)
        self.initialize_weights()

    def laid_out(self, device: torch.device | str) -> "UNet":
        """On `device`, in the memory layout that trains fast there: channels-last on CUDA, for the convolutions.

        On two cores, forward and backward pass are 1.1 times as fast contiguous for the quickstart's U-Net, 1.0 times
        for that of `pokemon`.
        """
        channels_last = torch.device(device).type == "cuda"
        return self.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)

    def initialize_weights(self) -> None:
        """Starts every residual branch and the output at zero: an untrained block passes its input on."""
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)  # DDPM's and LDM's rule; without it deep nets start badly scaled
                nn.init.zeros_(module.conv2.bias)
            if isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
                nn.init.zeros_(module.proj_out.bias)
        nn.init.zeros_(self.conv_out.weight)  # the first prediction is 0, so the loss starts at 1
        nn.init.zeros_(self.conv_out.bias)

    def keys_and_values(self, context: Tensor) -> Context:
        """A text encoding (N, L, D) → every cross-attention's keys and values; ValueError if D is another width.

        They are the same at all steps of a sampler, so it hands in these: no bit changes, and the U-Nets of the
        quickstart and of `pokemon` are 1.04 times as fast.
        """
        self._check_width(context)
        blocks = (module for module in self.modules() if isinstance(module, TransformerBlock))
        return {block.attn2: block.attn2.keys_and_values(context) for block in blocks}

    def _check_width(self, context: Tensor) -> None:
        if context.shape[-1] != self.config.context_dim:
            raise ValueError(
                f"context is {context.shape[-1]} wide, but this U-Net was built for text encodings of width "
                f"{self.config.context_dim}: use the text encoder that it was trained with."
            )

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)

    def forward(self, latents: Tensor, timesteps: Tensor, context: Context) -> Tensor:
        if isinstance(context, Tensor):
            self._check_width(context)
        temb = self.time_embedding(timesteps)  # (N, 4C)
        x = self.conv_in(latents)  # (N, C, h, w)
        skips = [x]

        for level in self.down_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, x, temb)
                if (attention := level.attention(i)) is not None:
                    x = self._run(attention, x, context)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)  # half the size
                skips.append(x)

        x = self._run(self.mid_block.resnets[0], x, temb)
        x = self._run(self.mid_block.attention(0), x, context)
        x = self._run(self.mid_block.resnets[1], x, temb)

        for level in self.up_blocks:
            for i, resnet in enumerate(level.resnets):
                x = self._run(resnet, torch.cat([x, skips.pop()], dim=1), temb)
                if (attention := level.attention(i)) is not None:
                    x = self._run(attention, x, context)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[-2:])  # twice the size

        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (N, 4, h, w)
