"""Single-file checkpoints in the layout of the first latent-diffusion code, to and from the names used here.

One file holds three networks: `model.diffusion_model.…` is the U-Net, `first_stage_model.…` the VAE and
`cond_stage_model.…` the text encoder (CLIP as `transformers` names it in SD 1.x, as OpenCLIP names it in SD 2.x).
Both layouts are the same networks, numbered differently: LDM counts the blocks of the whole way down and up
(`input_blocks.7`), diffusers counts levels and blocks within (`down_blocks.2.resnets.0`), and each has names of its own
for the layers of a block (ours are diffusers'). So a translation is a table of module names, built by walking through
the network once. Reading uses it from left to right and writing from right to left, so neither drifts from the other.

What a file doesn't say: with how many heads the attention was trained, which activation CLIP has and whether the U-Net
predicts noise or v. They follow from the published families (SD 1.x: 8 heads, noise; SD 2.x: 64 channels a head)
or, in a file that was written here, from its metadata.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_model import UNetConfig
from pretrained_files import read_checkpoint, write_safetensors
from vae_model import VAEConfig

UNET, EMA = "model.diffusion_model.", "model_ema."
VAE_PREFIX = "first_stage_model."
CLIP_TEXT, OPEN_CLIP_TEXT = "cond_stage_model.transformer.", "cond_stage_model.model."
LDM_SCALING_FACTOR = 0.18215  # what every reader of such a file multiplies latents with; the file cannot say otherwise

# What a reader of the file's metadata may need of the text encoder's configuration beside its shapes.
TEXT_OPTIONS = ("num_attention_heads", "hidden_act", "projection_dim", "bos_token_id", "eos_token_id", "pad_token_id")

Table = list[tuple[str, str]]  # (LDM's name of a module, ours)


@dataclass
class LDMCheckpoint:
    """The networks of one file under our names, each None where the file has none."""

    unet_config: UNetConfig | None = None
    unet: dict[str, Tensor] | None = None
    vae_config: VAEConfig | None = None
    vae: dict[str, Tensor] | None = None
    text_config: dict[str, Any] | None = None  # keyword arguments of transformers' CLIPTextConfig
    text_encoder: dict[str, Tensor] | None = None  # names without the prefix "text_model."
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False


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


def unet_table(config: UNetConfig) -> Table:
    """LDM's and our name of every module of the U-Net; the inside of a transformer block is named alike in both."""
    table = [
        ("time_embed.0", "time_embedding.linear_1"),
        ("time_embed.2", "time_embedding.linear_2"),
        ("input_blocks.0.0", "conv_in"),
        ("out.0", "conv_norm_out"),
        ("out.2", "conv_out"),
    ]
    levels = len(config.block_out_channels)

    n = 1  # the way down is numbered through; a downsampling has a number to itself
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

    n = 0  # so is the way up; an upsampling is the last part of the block before it
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


def vae_table(config: VAEConfig) -> Table:
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


def open_clip_table(layers: int) -> Table:
    """OpenCLIP's and transformers' name of every module of the text encoder."""
    table = [("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm")]
    table += [("positional_embedding", "embeddings.position_embedding.weight")]  # a bare parameter there
    for i in range(layers):
        table += _inside(f"transformer.resblocks.{i}", f"encoder.layers.{i}", OPEN_CLIP_LAYER)
    return table


def translate(tensors: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Rename every tensor by the table's entry for its innermost module; a name without one is left as it is."""
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


def turned(table: Table) -> Table:
    """The table from ours to LDM's."""
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
    """The way back: q, k and v on top of each other."""
    result = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            parts = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            result[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif ".k_proj." not in name and ".v_proj." not in name:
            result[name] = tensor
    return result


def _rescaled(config: VAEConfig, vae: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same VAE with its latents scaled such that `LDM_SCALING_FACTOR` makes of them what its own factor makes.

    The layers on both sides of the latents are linear, so the ratio r disappears in their weights: the mean and the
    standard deviation come out r times as large (log-variance + 2 ln r), and the decoder divides by r.
    """
    r = config.scaling_factor / LDM_SCALING_FACTOR
    if abs(r - 1) < 1e-6:
        return vae
    vae, c = dict(vae), config.latent_channels
    weight, bias = vae["quant_conv.weight"].float(), vae["quant_conv.bias"].float()
    vae["quant_conv.weight"] = torch.cat([weight[:c] * r, weight[c:]])
    vae["quant_conv.bias"] = torch.cat([bias[:c] * r, bias[c:] + 2 * torch.tensor(r).log()])
    vae["post_quant_conv.weight"] = vae["post_quant_conv.weight"].float() / r
    return vae


# ----------------------------------------------------------------------------------------------------------------------
# Reading: the config from the shapes, then the names
# ----------------------------------------------------------------------------------------------------------------------


def is_ldm(tensors: dict[str, Tensor]) -> bool:
    """True if these are the tensors of a whole LDM checkpoint or of its VAE alone, told by their names."""
    return any(name.startswith((UNET, VAE_PREFIX)) or name == "encoder.mid.attn_1.q.weight" for name in tensors)


def read_ldm(path: str | Path, prediction_type: str | None = None, ema: bool = False) -> LDMCheckpoint:
    """Return the networks of a `.safetensors` or `.ckpt` file in LDM's layout, under our names, as stored (no copy).

    `prediction_type` overrules what the file says or suggests: that an SD 2.x file predicts v is no more than a good
    guess (see `_guess_prediction`). `ema` takes the averaged U-Net where a file has both; the plain one is the default,
    as in diffusers. Raises ValueError, in one sentence, if it is no such file or an architecture that isn't supported.
    """
    tensors, rest = read_checkpoint(path)
    if any(name.startswith(("conditioner.embedders.", UNET + "label_emb.")) for name in tensors):
        raise ValueError(f"{path} is an SDXL or unCLIP checkpoint; pass one of Stable Diffusion 1.x or 2.x.")
    if not is_ldm(tensors):
        raise ValueError(
            f"{path} is not a Stable Diffusion checkpoint in the LDM layout (it holds {min(tensors)!r}, no '{UNET}…'); "
            f"pass a whole checkpoint, or a folder in diffusers' layout."
        )
    if ema and any(name.startswith(EMA) for name in tensors):
        for name in [name for name in tensors if name.startswith(UNET)]:  # EMA names are the same without the dots
            tensors[name] = tensors.get(EMA + name.removeprefix("model.").replace(".", ""), tensors[name])
    said = _metadata(rest, path)
    result = LDMCheckpoint()
    try:
        if unet := _under(tensors, UNET):
            shape = _unet_shape(unet, path)
            result.unet_config = UNetConfig(**({"num_attention_heads": _heads(shape)} | said.get("unet", {}) | shape))
            result.unet = translate(unet, unet_table(result.unet_config))
        if _vae_tensors(tensors):
            result.vae_config, result.vae = _read_vae(tensors, said, path)
        if _under(tensors, CLIP_TEXT) or _under(tensors, OPEN_CLIP_TEXT):
            result.text_config, result.text_encoder = _read_text_encoder(tensors, said)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]!r}: it is damaged or no Stable Diffusion 1.x or 2.x.") from error
    except (TypeError, IndexError) as error:  # metadata with unknown keys, tensors with too few dimensions
        raise ValueError(f"{path} is no Stable Diffusion 1.x or 2.x checkpoint ({error}).") from error
    result.prediction_type = prediction_type or said.get("prediction_type") or _guess_prediction(tensors, rest)
    result.zero_terminal_snr = bool(said.get("zero_terminal_snr")) or "ztsnr" in tensors
    return result


def read_ldm_vae(path: str | Path) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Return (config, tensors under our names) of the VAE in a whole LDM checkpoint or in a file of its own.

    The latents' scale is taken to be Stable Diffusion's; raises ValueError, in one sentence, if there is no such VAE.
    """
    tensors, rest = read_checkpoint(path)
    if not _vae_tensors(tensors):
        hint = "pass a VAE such as vae-ft-mse-840000-ema-pruned.safetensors, or a whole checkpoint"
        if any(name.startswith("encoder.mid_block.") for name in tensors):
            hint = "its names are diffusers', so pass its folder, which says its shape"
        raise ValueError(f"{path} holds no VAE in the LDM layout; {hint}.")
    try:
        return _read_vae(tensors, _metadata(rest, path), path)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]!r}: it is damaged or no VAE of Stable Diffusion.") from error
    except (TypeError, IndexError) as error:
        raise ValueError(f"{path} is no VAE of Stable Diffusion ({error}).") from error


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _metadata(rest: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """What a file written here says about itself."""
    try:
        said = json.loads(rest.get("ldm_checkpoint") or "{}")
    except (TypeError, ValueError):
        said = None
    if not isinstance(said, dict):
        raise ValueError(f"{path} has damaged metadata; export it again.")
    return said


def _unet_shape(unet: dict[str, Tensor], path: str | Path) -> dict[str, Any]:
    levels: list[list[tuple[int, bool]]] = [[]]  # for each level its blocks: (channels, has attention)
    n = 1
    while True:
        if f"input_blocks.{n}.0.op.weight" in unet:
            levels.append([])
        elif (conv := unet.get(f"input_blocks.{n}.0.out_layers.3.weight")) is not None:
            levels[-1].append((conv.shape[0], f"input_blocks.{n}.1.proj_in.weight" in unet))
        else:
            break
        n += 1
    if any(len(blocks) != len(levels[0]) or len(set(blocks)) != 1 for blocks in levels):
        raise ValueError(f"{path} has blocks of unequal make on one level: it is no Stable Diffusion 1.x or 2.x U-Net.")

    depth = sum(f"middle_block.1.transformer_blocks.{i}.norm1.weight" in unet for i in range(100))
    linear = unet["middle_block.1.proj_in.weight"].ndim == 2  # SD 1.x: a 1×1 convolution
    channels = tuple(blocks[0][0] for blocks in levels)
    shape = {
        "in_channels": unet["input_blocks.0.0.weight"].shape[1],
        "out_channels": unet["out.2.weight"].shape[0],
        "block_out_channels": channels,
        "layers_per_block": len(levels[0]),
        "attention_levels": tuple(blocks[0][1] for blocks in levels),
        "context_dim": unet["middle_block.1.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "transformer_depth": depth,
        "use_linear_projection": linear,
    }
    if shape["in_channels"] != shape["out_channels"]:
        kind = "an inpainting" if shape["in_channels"] == 9 else "a special"
        given = f"{kind} U-Net with {shape['in_channels']} input channels"
        raise ValueError(f"{path} holds {given}, which is not supported; pass a text-to-image checkpoint.")
    return shape


def _heads(shape: dict[str, Any]) -> int | tuple[int, ...]:
    """SD 1.x has 8 heads everywhere; SD 2.x, known by its linear projections, has heads of 64 channels."""
    return tuple(max(c // 64, 1) for c in shape["block_out_channels"]) if shape["use_linear_projection"] else 8


def _vae_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    vae = _under(tensors, VAE_PREFIX) or _under(tensors, "vae.") or tensors
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # and not its loss or its own average
    vae = {name: tensor for name, tensor in vae.items() if name.startswith(parts)}
    return vae if "encoder.down.0.block.0.conv1.weight" in vae else {}


def _read_vae(
    tensors: dict[str, Tensor], said: dict[str, Any], path: str | Path
) -> tuple[VAEConfig, dict[str, Tensor]]:
    theirs = _vae_tensors(tensors)
    channels, layers = [], 0
    while (conv := theirs.get(f"encoder.down.{len(channels)}.block.0.conv1.weight")) is not None:
        channels.append(conv.shape[0])
    while f"encoder.down.0.block.{layers}.conv1.weight" in theirs:
        layers += 1
    shape = {
        "in_channels": theirs["encoder.conv_in.weight"].shape[1],
        "out_channels": theirs["decoder.conv_out.weight"].shape[0],
        "latent_channels": theirs["decoder.conv_in.weight"].shape[1],
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "scaling_factor": LDM_SCALING_FACTOR,
    }
    if theirs["quant_conv.weight"].shape[0] != 2 * shape["latent_channels"]:
        raise ValueError(f"{path} holds an autoencoder without mean and variance (VQ); pass a KL one.")
    config = VAEConfig(**(said.get("vae", {}) | shape))
    vae = translate(theirs, vae_table(config))
    # LDM's attention is made of 1×1 convolutions: (C, C, 1, 1) for our linear layer's (C, C).
    return config, {name: t.flatten(1) if _is_vae_projection(name) else t for name, t in vae.items()}


def _read_text_encoder(tensors: dict[str, Tensor], said: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if is_open_clip := bool(theirs := _under(tensors, OPEN_CLIP_TEXT)):
        # ViT-H's text model has 24 layers, SD 2.x reads the output of the last but one, so the 24th was never trained
        # on and diffusers leaves it out; so are the parts that compare texts with pictures.
        unused = ("transformer.resblocks.23.", "text_projection", "logit_scale", "attn_mask")
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(unused)}
        text = translate(_split_in_proj(theirs), open_clip_table(layers=23))
    else:
        theirs = _under(tensors, CLIP_TEXT)
        text = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    text.pop("embeddings.position_ids", None)  # 0 … 76, which the module counts for itself
    words, width = text["embeddings.token_embedding.weight"].shape
    usual = {
        "num_attention_heads": max(width // 64, 1),
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "projection_dim": 512 if is_open_clip else 768,  # of a part that isn't here; as the published configs say
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
        "pad_token_id": 1,
    }
    shape = {
        "vocab_size": words,
        "hidden_size": width,
        "intermediate_size": text["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": sum(name.endswith(".mlp.fc1.weight") for name in text),
        "max_position_embeddings": text["embeddings.position_embedding.weight"].shape[0],
    }
    return usual | said.get("text_encoder", {}) | shape, text


def _guess_prediction(tensors: dict[str, Tensor], rest: dict[str, Any]) -> str:
    """Return "epsilon" or "v_prediction", which no shape shows.

    A tensor named `v_pred` says it. SD 1.x predicts noise. SD 2.x comes as both: the step counter of 2.0-base, if it
    was kept, says noise; otherwise ComfyUI's rule of thumb is followed, that one bias of the v-models is spread wider.
    """
    if "v_pred" in tensors:
        return "v_prediction"
    bias = tensors.get(UNET + "output_blocks.11.1.transformer_blocks.0.norm1.bias")
    keys = tensors.get(UNET + "middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if bias is None or keys is None or keys.shape[1] != 1024 or rest.get("global_step") == 875000:
        return "epsilon"
    return "v_prediction" if bias.float().std(unbiased=False) > 0.09 else "epsilon"


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def write_ldm(path: str | Path, checkpoint: LDMCheckpoint) -> None:
    """Write the networks of `checkpoint` as one `.safetensors` in LDM's layout, for the tools that want a single file.

    Such tools multiply latents with 0.18215 whatever the VAE, so one with another scale is rescaled to give the same
    pictures. A text encoder is written as OpenCLIP's if its activation is "gelu" (SD 2.x), else as CLIP's (SD 1.x).
    """
    file: dict[str, Tensor] = {}
    said: dict[str, Any] = {
        "prediction_type": checkpoint.prediction_type,
        "zero_terminal_snr": checkpoint.zero_terminal_snr,
    }
    if checkpoint.unet is not None:
        unet = translate(checkpoint.unet, turned(unet_table(checkpoint.unet_config)))
        file |= {UNET + name: tensor for name, tensor in unet.items()}
        said["unet"] = asdict(checkpoint.unet_config)
    if checkpoint.vae is not None:
        vae = _rescaled(checkpoint.vae_config, checkpoint.vae)
        vae = {name: t[:, :, None, None] if _is_vae_projection(name) else t for name, t in vae.items()}
        vae = translate(vae, turned(vae_table(checkpoint.vae_config)))
        file |= {VAE_PREFIX + name: tensor for name, tensor in vae.items()}
        said["vae"] = asdict(checkpoint.vae_config)
    if checkpoint.text_encoder is not None:
        text = {name.removeprefix("text_model."): tensor for name, tensor in checkpoint.text_encoder.items()}
        positions = torch.arange(text["embeddings.position_embedding.weight"].shape[0])[None]
        if checkpoint.text_config["hidden_act"] == "gelu":
            layers = checkpoint.text_config["num_hidden_layers"]
            text.pop("embeddings.position_ids", None)
            text = _fuse_in_proj(translate(text, turned(open_clip_table(layers))))
            file |= {OPEN_CLIP_TEXT + name: tensor for name, tensor in text.items()}
        else:
            text["embeddings.position_ids"] = positions  # which readers of that time expect
            file |= {f"{CLIP_TEXT}text_model.{name}": tensor for name, tensor in text.items()}
        said["text_encoder"] = {name: checkpoint.text_config[name] for name in TEXT_OPTIONS}
    # Two empty tensors by which other tools, too, know these models.
    file |= {"v_pred": torch.tensor([])} if checkpoint.prediction_type == "v_prediction" else {}
    file |= {"ztsnr": torch.tensor([])} if checkpoint.zero_terminal_snr else {}
    write_safetensors(path, file, {"ldm_checkpoint": json.dumps(said)})
