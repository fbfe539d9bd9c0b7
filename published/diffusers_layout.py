"""The JSON configs of diffusers' folders, to and from ours: U-Net, VAE and noise schedule.

Names of weights need no translation: those of `UNet` and `VAE` are diffusers'. An option that is not implemented here
is an error that names it, unless it has the one value with which Stable Diffusion was trained (the `_FIXED` tables) or
changes nothing (the `_WITHOUT_EFFECT` sets).
"""

from dataclasses import asdict, fields
from typing import Any

from diffusion_model import UNetConfig
from noise_schedule import NoiseSchedule
from vae_model import VAEConfig

# ----------------------------------------------------------------------------------------------------------------------
# unet/config.json
# ----------------------------------------------------------------------------------------------------------------------

_ATTENDS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False, "CrossAttnUpBlock2D": True, "UpBlock2D": False}
_UNET_FIXED = {
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "projection_class_embeddings_input_dim": None,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
# A size hint, dropout (sampling has none, and fine-tuning uses none), and the float32 softmax that
# `scaled_dot_product_attention` computes anyway.
_UNET_WITHOUT_EFFECT = {"sample_size", "dropout", "upcast_attention"}


def unet_config(config: dict[str, Any]) -> UNetConfig:
    """Read the `config.json` of a `UNet2DConditionModel`; ValueError at an option that is not implemented here."""
    options = _without_comments(config, _UNET_WITHOUT_EFFECT)
    # Where a config has no entry, diffusers takes these defaults.
    down = list(options.pop("down_block_types", ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]))
    up = list(options.pop("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3))
    for kind in down + up:
        if kind not in _ATTENDS:
            raise ValueError(f"unet/config.json: the block type {kind!r} is not supported.")
    if [_ATTENDS[kind] for kind in down] != [_ATTENDS[kind] for kind in reversed(up)]:
        raise ValueError("unet/config.json: up_block_types do not mirror down_block_types, which is not supported.")
    # Files of SD 1.x and 2.x give the number of heads under the wrong name "attention_head_dim".
    heads = options.pop("attention_head_dim", 8)
    heads = options.pop("num_attention_heads", None) or heads
    result = UNetConfig(
        in_channels=options.pop("in_channels", 4),
        out_channels=options.pop("out_channels", 4),
        block_out_channels=options.pop("block_out_channels", (320, 640, 1280, 1280)),
        layers_per_block=options.pop("layers_per_block", 2),
        attention_levels=tuple(_ATTENDS[kind] for kind in down),
        num_attention_heads=heads,
        context_dim=options.pop("cross_attention_dim", 1280),
        transformer_depth=options.pop("transformer_layers_per_block", 1),
        use_linear_projection=options.pop("use_linear_projection", False),
        norm_num_groups=options.pop("norm_num_groups", 32),
    )
    _check_fixed(options, _UNET_FIXED, "unet/config.json", "U-Net")
    return result


def unet_dict(config: UNetConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers' `UNet2DConditionModel` builds the same network."""
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention_levels],
        "up_block_types": ["CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention_levels)],
        "attention_head_dim": list(config.heads),
        "cross_attention_dim": config.context_dim,
        "transformer_layers_per_block": config.transformer_depth,
        "use_linear_projection": config.use_linear_projection,
        "norm_num_groups": config.norm_num_groups,
        "sample_size": 64,
    }


# ----------------------------------------------------------------------------------------------------------------------
# vae/config.json
# ----------------------------------------------------------------------------------------------------------------------

_VAE_FIXED = {
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
_VAE_WITHOUT_EFFECT = {
    "sample_size",
    "force_upcast",
}  # a size hint, and a warning of float16, in which no VAE runs here


def vae_config(config: dict[str, Any]) -> VAEConfig:
    """Read the `config.json` of an `AutoencoderKL`; ValueError at an option that is not implemented here."""
    options = _without_comments(config, _VAE_WITHOUT_EFFECT)
    ours = {field.name: options.pop(field.name) for field in fields(VAEConfig) if field.name in options}
    result = VAEConfig(**({"block_out_channels": (64,), "layers_per_block": 1} | ours))  # diffusers' defaults
    _check_fixed(options, _VAE_FIXED | _vae_blocks(result), "vae/config.json", "VAE")
    return result


def vae_dict(config: VAEConfig) -> dict[str, Any]:
    """The `config.json` with which diffusers' `AutoencoderKL` builds the same network."""
    shape = asdict(config) | {"block_out_channels": list(config.block_out_channels)}
    return {"_class_name": "AutoencoderKL", **shape, **_vae_blocks(config), "sample_size": 512}


def _vae_blocks(config: VAEConfig) -> dict[str, list[str]]:
    levels = len(config.block_out_channels)
    return {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}


# ----------------------------------------------------------------------------------------------------------------------
# scheduler/scheduler_config.json
# ----------------------------------------------------------------------------------------------------------------------


def noise_schedule(config: dict[str, Any]) -> NoiseSchedule:
    """The schedule in a `scheduler_config.json`; the options of single samplers are left to `samplers.grid_options`."""
    if config.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json: the option 'trained_betas' is not supported.")
    return NoiseSchedule(
        num_timesteps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.0001),  # diffusers' defaults, not Stable Diffusion's
        beta_end=config.get("beta_end", 0.02),
        schedule=config.get("beta_schedule", "linear"),
        prediction_type=config.get("prediction_type", "epsilon"),
        zero_terminal_snr=config.get("rescale_betas_zero_snr", False),
    )


def schedule_dict(schedule: NoiseSchedule) -> dict[str, Any]:
    """The entries of a `scheduler_config.json` that describe this schedule."""
    return {
        "num_train_timesteps": schedule.num_timesteps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.schedule,
        "prediction_type": schedule.prediction_type,
        "rescale_betas_zero_snr": schedule.zero_terminal_snr,
    }


# ----------------------------------------------------------------------------------------------------------------------
# What U-Net and VAE share
# ----------------------------------------------------------------------------------------------------------------------


def _without_comments(config: dict[str, Any], without_effect: set[str]) -> dict[str, Any]:
    """The options that matter: names with "_" in front are notes such as the version of diffusers."""
    return {name: v for name, v in config.items() if not name.startswith("_") and name not in without_effect}


def _check_fixed(options: dict[str, Any], fixed: dict[str, Any], file: str, network: str) -> None:
    """ValueError at the first option that has no entry in `fixed`, or another value than there."""
    for name, value in options.items():
        value = list(value) if isinstance(value, tuple) else value
        if name not in fixed or value != fixed[name]:
            raise ValueError(f"{file}: the option {name}={value!r} is not supported by this {network}.")
