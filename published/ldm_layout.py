"""The layout of single-file checkpoints, as the first latent-diffusion code (LDM) wrote them, as a table of names.

One file holds three networks: `model.diffusion_model.…` is the U-Net, `first_stage_model.…` the VAE and
`cond_stage_model.…` the text encoder (CLIP as `transformers` names it in SD 1.x, as OpenCLIP names it in SD 2.x).
They are the same networks as ours, numbered differently: LDM counts the blocks of the whole way down and up
(`input_blocks.7`), diffusers counts levels and blocks within (`down_blocks.2.resnets.0`), and each has its own names
for the layers of a block (ours are diffusers'). So a table of module names, built by one pass over the network, is the
translation: reading uses it from left to right and writing from right to left, so that the two cannot disagree.
"""

import torch
from torch import Tensor

from diffusion_model import UNetConfig
from vae_model import VAEConfig, rescaled_latents

UNET, EMA = "model.diffusion_model.", "model_ema."
VAE_PREFIX = "first_stage_model."
CLIP_TEXT, OPEN_CLIP_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
LDM_SCALING_FACTOR = 0.18215  # what every reader of such a file multiplies latents with; the file cannot say otherwise

Table = list[tuple[str, str]]  # (LDM's name of a module, ours)

# ----------------------------------------------------------------------------------------------------------------------
# The tables
# ----------------------------------------------------------------------------------------------------------------------

UNET_RESNET = [
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
    ("skip_connection", "conv_shortcut"),
]
VAE_RESNET = [("norm1", "norm1"), ("conv1", "conv1"), ("norm2", "norm2"), ("conv2", "conv2")]
VAE_RESNET += [("nin_shortcut", "conv_shortcut")]
VAE_ATTENTION = [("norm", "group_norm"), ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")]
OPEN_CLIP_LAYER = [
    ("ln_1", "layer_norm1"),
    ("ln_2", "layer_norm2"),
    ("attn.out_proj", "self_attn.out_proj"),  # the other three are one matrix in OpenCLIP, see `_split_in_proj`
    ("attn.q_proj", "self_attn.q_proj"),
    ("attn.k_proj", "self_attn.k_proj"),
    ("attn.v_proj", "self_attn.v_proj"),
    ("mlp.c_fc", "mlp.fc1"),
    ("mlp.c_proj", "mlp.fc2"),
]


def _inside(theirs: str, ours: str, layers: Table) -> Table:
    return [(f"{theirs}.{a}", f"{ours}.{b}") for a, b in layers]


def _unet_table(config: UNetConfig) -> Table:
    """LDM's and our name of every module of the U-Net; the inside of a transformer block is named alike in both."""
    table = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    levels = len(config.block_out_channels)

    n = 1  # one number for each block on the way down; a downsampling has its own
    for level in range(levels):
        for i in range(config.layers_per_block):
            table += _inside(f"input_blocks.{n}.0", f"down_blocks.{level}.resnets.{i}", UNET_RESNET)
            table += [(f"input_blocks.{n}.1", f"down_blocks.{level}.attentions.{i}")]
            n += 1
        if level < levels - 1:
            table += [(f"input_blocks.{n}.0.op", f"down_blocks.{level}.downsamplers.0.conv")]
            n += 1

    table += _inside("middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    table += [("middle_block.1", "mid_block.attentions.0")]
    table += _inside("middle_block.2", "mid_block.resnets.1", UNET_RESNET)

    n = 0  # the same on the way up; an upsampling is the last part of the block before it
    for level in range(levels):
        attends = config.attention_levels[levels - 1 - level]
        for i in range(config.layers_per_block + 1):
            table += _inside(f"output_blocks.{n}.0", f"up_blocks.{level}.resnets.{i}", UNET_RESNET)
            if level < levels - 1 and i == config.layers_per_block:
                part = 2 if attends else 1
                table += [(f"output_blocks.{n}.{part}.conv", f"up_blocks.{level}.upsamplers.0.conv")]
            if attends:
                table += [(f"output_blocks.{n}.1", f"up_blocks.{level}.attentions.{i}")]
            n += 1
    return table


def _vae_table(config: VAEConfig) -> Table:
    """LDM's and our name of every module of the VAE; LDM numbers the decoder's levels by resolution, finest first."""
    table = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
    levels = len(config.block_out_channels)
    for half in ("encoder", "decoder"):
        table += _inside(half, half, [("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")])
        table += _inside(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", VAE_RESNET)
        table += _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
        table += _inside(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", VAE_RESNET)
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for i in range(config.layers_per_block):
            table += _inside(f"{down}.block.{i}", f"encoder.down_blocks.{level}.resnets.{i}", VAE_RESNET)
        for i in range(config.layers_per_block + 1):
            table += _inside(f"{up}.block.{i}", f"decoder.up_blocks.{level}.resnets.{i}", VAE_RESNET)
        if level < levels - 1:
            table += [(f"{down}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")]
            table += [(f"{up}.upsample.conv", f"decoder.up_blocks.{level}.upsamplers.0.conv")]
    return table


def _open_clip_table(layers: int) -> Table:
    """OpenCLIP's and transformers' name of every module of the text encoder."""
    table = [("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm")]
    table += [("positional_embedding", "embeddings.position_embedding.weight")]  # a bare parameter there
    for i in range(layers):
        table += _inside(f"transformer.resblocks.{i}", f"encoder.layers.{i}", OPEN_CLIP_LAYER)
    return table


def _translate(tensors: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Rename every tensor by the table's entry for its innermost module; a name without an entry stays as it is."""
    modules = dict(table)

    def new_name(name: str) -> str:
        head, tail = name, ""
        while head:
            if head in modules:
                return modules[head] + tail
            head, dot, last = head.rpartition(".")
            tail = dot + last + tail
        return name

    return {new_name(name): tensor for name, tensor in tensors.items()}


def _reversed(table: Table) -> Table:
    """The same table from our names to LDM's."""
    return [(ours, theirs) for theirs, ours in table]


# ----------------------------------------------------------------------------------------------------------------------
# Where the layouts differ in more than names
# ----------------------------------------------------------------------------------------------------------------------


def _is_vae_projection(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight") and ".group_norm." not in name


def _split_in_proj(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's fused (3D, D) attention input, `attn.in_proj_weight`, as `attn.q_proj.weight` and its two siblings."""
    result = {}
    for name, tensor in tensors.items():
        module, fused, kind = name.partition("in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True) if fused else ()
        result |= {f"{module}{letter}_proj.{kind}": part for letter, part in parts} or {name: tensor}
    return result


def _fuse_in_proj(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_in_proj`: q, k and v stacked."""
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            result[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[name] = tensor
    return result


def _with_ldm_scale(config: VAEConfig, vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same VAE with its raw latents rescaled so that `LDM_SCALING_FACTOR`, too, brings them to unit variance."""
    r = config.scaling_factor / LDM_SCALING_FACTOR
    return vae if abs(r - 1) < 1e-6 else rescaled_latents(vae, r)


# ----------------------------------------------------------------------------------------------------------------------
# Whole networks, their names without the prefix in the file
# ----------------------------------------------------------------------------------------------------------------------


def unet_from_ldm(config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's tensors under our names."""
    return _translate(tensors, _unet_table(config))


def unet_to_ldm(config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A U-Net's tensors under LDM's names."""
    return _translate(tensors, _reversed(_unet_table(config)))


def vae_from_ldm(config: VAEConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under our names; LDM's attention is made of 1×1 convolutions, ours of linear layers."""
    tensors = _translate(tensors, _vae_table(config))
    return {name: t.flatten(1) if _is_vae_projection(name) else t for name, t in tensors.items()}


def vae_to_ldm(config: VAEConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors under LDM's names and with its scale."""
    tensors = _with_ldm_scale(config, tensors)
    tensors = {name: t[:, :, None, None] if _is_vae_projection(name) else t for name, t in tensors.items()}
    return _translate(tensors, _reversed(_vae_table(config)))


def text_from_open_clip(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """OpenCLIP's text encoder under the names that `transformers` gives to CLIP's."""
    return _translate(_split_in_proj(tensors), _open_clip_table(layers))


def text_to_open_clip(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The inverse of `text_from_open_clip`."""
    return _fuse_in_proj(_translate(tensors, _reversed(_open_clip_table(layers))))
