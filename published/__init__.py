"""Everything that knows somebody else's file: published folders, single files and hub ids, to and from our networks.

`weight_files` finds and reads files without trusting them; `diffusers_layout` translates configs; `ldm_layout` is the
table of names of the original single-file layout, `ldm_checkpoint` a file in it; `whole_models` puts them together.
`lora_files` are the low-rank changes of a fine-tuning.

    python -m published stabilityai/sd-vae-ft-mse sd_vae.pth     # a published VAE as our own file
"""

from published.diffusers_layout import noise_schedule, schedule_dict, unet_config, unet_dict, vae_config, vae_dict
from published.lora_files import attach, find_layers, lora_file, read_lora, write_lora
from published.weight_files import first_line, load_strict, locate
from published.whole_models import (
    ModelParts,
    load_model,
    load_text_encoder,
    load_vae,
    save_folder,
    save_single_file,
    save_text_encoder,
)

__all__ = [
    "ModelParts",
    "attach",
    "find_layers",
    "first_line",
    "load_model",
    "load_strict",
    "load_text_encoder",
    "load_vae",
    "locate",
    "lora_file",
    "noise_schedule",
    "read_lora",
    "save_folder",
    "save_single_file",
    "save_text_encoder",
    "schedule_dict",
    "unet_config",
    "unet_dict",
    "vae_config",
    "vae_dict",
    "write_lora",
]
