"""A single-file checkpoint in the LDM layout, read and written: its three networks under our names, and their configs.

Shapes give the configs. What no shape shows (with how many heads the attention was trained, which activation CLIP has,
whether the U-Net predicts noise or v) follows from the published families (SD 1.x: 8 heads, noise; SD 2.x: 64 channels
a head) or, in a file that was written here, from its metadata.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_model import UNetConfig
from published.ldm_layout import (
    CLIP_TEXT,
    EMA,
    LDM_SCALING_FACTOR,
    OPEN_CLIP_TEXT,
    UNET,
    VAE_PREFIX,
    text_from_open_clip,
    text_to_open_clip,
    unet_from_ldm,
    unet_to_ldm,
    vae_from_ldm,
    vae_to_ldm,
)
from published.weight_files import read_checkpoint, write_safetensors
from vae_model import VAEConfig

# What the metadata says of the text encoder's configuration, because its shapes do not.
TEXT_OPTIONS = ("num_attention_heads", "hidden_act", "projection_dim", "bos_token_id", "eos_token_id", "pad_token_id")


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
    tokenizer: dict[str, str] | None = None  # file name → content, in files written here whose tokenizer is not CLIP's


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def is_ldm(tensors: dict[str, Tensor]) -> bool:
    """True if these are the tensors of a whole LDM checkpoint or of its VAE alone, judged by their names."""
    return any(name.startswith((UNET, VAE_PREFIX)) or name == "encoder.mid.attn_1.q.weight" for name in tensors)


def read_ldm(path: str | Path, prediction_type: str | None = None, ema: bool = False) -> LDMCheckpoint:
    """Return the networks of a `.safetensors` or `.ckpt` file in LDM's layout, under our names, as stored (no copy).

    `prediction_type` overrules what the file says or suggests: whether an SD 2.x file predicts v can only be guessed
    (see `_guess_prediction`). `ema` takes the averaged U-Net where a file has both; the plain one is the default,
    as in diffusers. Raises ValueError, in one sentence, if it is no such file or its architecture is not supported.
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
    metadata = _metadata(rest, path)
    result = LDMCheckpoint()
    try:
        if unet := _under(tensors, UNET):
            shape = _unet_shape(unet, path)
            result.unet_config = UNetConfig(
                **({"num_attention_heads": _heads(shape)} | metadata.get("unet", {}) | shape)
            )
            result.unet = unet_from_ldm(result.unet_config, unet)
        if _vae_tensors(tensors):
            result.vae_config, result.vae = _read_vae(tensors, metadata, path)
        if _under(tensors, CLIP_TEXT) or _under(tensors, OPEN_CLIP_TEXT):
            result.text_config, result.text_encoder = _read_text_encoder(tensors, metadata)
    except KeyError as error:
        raise ValueError(f"{path} lacks {error.args[0]!r}: it is damaged or no Stable Diffusion 1.x or 2.x.") from error
    except (TypeError, IndexError) as error:  # metadata with unknown keys, tensors with too few dimensions
        raise ValueError(f"{path} is no Stable Diffusion 1.x or 2.x checkpoint ({error}).") from error
    result.prediction_type = prediction_type or metadata.get("prediction_type") or _guess_prediction(tensors, rest)
    result.zero_terminal_snr = bool(metadata.get("zero_terminal_snr")) or "ztsnr" in tensors
    result.tokenizer = metadata.get("tokenizer")
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
    """What `write_ldm` noted in a file that was written here; {} for others."""
    try:
        metadata = json.loads(rest.get("ldm_checkpoint") or "{}")
    except (TypeError, ValueError):
        metadata = None
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} has damaged metadata; export it again.")
    return metadata


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
        raise ValueError(f"{path} has blocks of unequal kind on one level: it is no Stable Diffusion 1.x or 2.x U-Net.")

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
    tensors: dict[str, Tensor], metadata: dict[str, Any], path: str | Path
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
    config = VAEConfig(**(metadata.get("vae", {}) | shape))
    return config, vae_from_ldm(config, theirs)


def _read_text_encoder(
    tensors: dict[str, Tensor], metadata: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if is_open_clip := bool(theirs := _under(tensors, OPEN_CLIP_TEXT)):
        # ViT-H's text model has 24 layers, but SD 2.x reads the output of the 23rd: the last one and the parts that
        # compare texts with images are left out, as in diffusers.
        unused = ("transformer.resblocks.23.", "text_projection", "logit_scale", "attn_mask")
        theirs = {name: tensor for name, tensor in theirs.items() if not name.startswith(unused)}
        text = text_from_open_clip(theirs, layers=23)
    else:
        theirs = _under(tensors, CLIP_TEXT)
        text = {name.removeprefix("text_model."): tensor for name, tensor in theirs.items()}
    text.pop("embeddings.position_ids", None)  # 0 … 76, which the module makes itself
    words, width = text["embeddings.token_embedding.weight"].shape
    usual = {
        "num_attention_heads": max(width // 64, 1),
        "hidden_act": "gelu" if is_open_clip else "quick_gelu",
        "projection_dim": 512 if is_open_clip else 768,  # of a part that is not used; as in the published configs
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
    return usual | metadata.get("text_encoder", {}) | shape, text


def _guess_prediction(tensors: dict[str, Tensor], rest: dict[str, Any]) -> str:
    """Return "epsilon" or "v_prediction", which no shape shows.

    A tensor named `v_pred` marks a v-model. SD 1.x predicts noise. SD 2.x comes as both: the step counter of 2.0-base,
    if it was kept, means noise; otherwise ComfyUI's rule of thumb applies, that one bias of the v-models varies more.
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
    images. A text encoder is written as OpenCLIP's if its activation is "gelu" (SD 2.x), else as CLIP's (SD 1.x).
    """
    file: dict[str, Tensor] = {}
    metadata: dict[str, Any] = {
        "prediction_type": checkpoint.prediction_type,
        "zero_terminal_snr": checkpoint.zero_terminal_snr,
    }
    if checkpoint.unet is not None:
        unet = unet_to_ldm(checkpoint.unet_config, checkpoint.unet)
        file |= {UNET + name: tensor for name, tensor in unet.items()}
        metadata["unet"] = asdict(checkpoint.unet_config)
    if checkpoint.vae is not None:
        vae = vae_to_ldm(checkpoint.vae_config, checkpoint.vae)
        file |= {VAE_PREFIX + name: tensor for name, tensor in vae.items()}
        metadata["vae"] = asdict(checkpoint.vae_config)
    if checkpoint.text_encoder is not None:
        text = {name.removeprefix("text_model."): tensor for name, tensor in checkpoint.text_encoder.items()}
        positions = torch.arange(text["embeddings.position_embedding.weight"].shape[0])[None]
        if checkpoint.text_config["hidden_act"] == "gelu":
            text.pop("embeddings.position_ids", None)
            text = text_to_open_clip(text, checkpoint.text_config["num_hidden_layers"])
            file |= {OPEN_CLIP_TEXT + name: tensor for name, tensor in text.items()}
        else:
            text["embeddings.position_ids"] = positions  # which readers of that time expect
            file |= {f"{CLIP_TEXT}text_model.{name}": tensor for name, tensor in text.items()}
        metadata["text_encoder"] = {name: checkpoint.text_config[name] for name in TEXT_OPTIONS}
    if checkpoint.tokenizer is not None:
        metadata["tokenizer"] = checkpoint.tokenizer
    # Two empty tensors by which other tools, too, recognise these models.
    file |= {"v_pred": torch.tensor([])} if checkpoint.prediction_type == "v_prediction" else {}
    file |= {"ztsnr": torch.tensor([])} if checkpoint.zero_terminal_snr else {}
    write_safetensors(path, file, {"ldm_checkpoint": json.dumps(metadata)})
