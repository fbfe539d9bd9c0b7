"""A whole model from a single file in the LDM layout, and back: what `ldm_checkpoint` translates, put together.

Such a file holds the networks and nothing else: no tokenizer and no noise schedule. All published ones share theirs,
CLIP's vocabulary and the schedule with which `NoiseSchedule` starts out, so these are taken.
"""

from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_model import UNet
from ldm_checkpoint import LDMCheckpoint, read_ldm, write_ldm
from noise_schedule import NoiseSchedule
from pretrained_files import load_strict, locate
from text_encoder import TextEncoder, load_tokenizer
from vae_model import VAE

CLIP_TOKENIZER = "openai/clip-vit-large-patch14"  # the hub model whose vocabulary SD 1.x and 2.x read


def read_ldm_pipeline(path: str | Path, prediction_type: str | None = None) -> dict[str, Any]:
    """Return the arguments of `StableDiffusion`: `text_encoder`, `unet`, `vae` and `schedule`, from the file `path`.

    The tokenizer is read from a folder `tokenizer` beside the file if there is one, else from the hub (or its cache).
    `prediction_type`: see `read_ldm`. Raises ValueError or FileNotFoundError, in one sentence.
    """
    path = Path(path)
    file = read_ldm(path, prediction_type)
    for part in ("unet", "vae", "text_encoder"):
        if getattr(file, part) is None:
            raise ValueError(f"{path} holds no {part}; pass a checkpoint with all of U-Net, VAE and text encoder.")
    unet, vae = UNet(file.unet_config), VAE(file.vae_config)
    text_model = CLIPTextModel(CLIPTextConfig(**file.text_config))
    for module, tensors in ((unet, file.unet), (vae, file.vae), (text_model, file.text_encoder)):
        load_strict(module, tensors, path)

    beside = path.parent / "tokenizer"
    folder = beside if beside.is_dir() else locate(CLIP_TOKENIZER, f"the tokenizer for {path}", weights=False)
    tokenizer = load_tokenizer(folder)
    if file.text_config["hidden_act"] == "gelu":  # OpenCLIP pads with token 0, CLIP with the end of the text
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return {
        "text_encoder": TextEncoder(tokenizer, text_model),
        "unet": unet.eval(),
        "vae": vae.eval(),
        "schedule": NoiseSchedule(prediction_type=file.prediction_type, zero_terminal_snr=file.zero_terminal_snr),
    }


def write_ldm_pipeline(
    path: str | Path, text_encoder: TextEncoder, unet: UNet, vae: VAE, schedule: NoiseSchedule
) -> None:
    """Write the model as one `.safetensors` in the LDM layout; ValueError if the layout cannot hold its schedule."""
    usual = NoiseSchedule(prediction_type=schedule.prediction_type, zero_terminal_snr=schedule.zero_terminal_snr)
    if schedule != usual:
        raise ValueError(
            f"{path}: the readers of single files know one noise schedule, Stable Diffusion's; save a folder instead."
        )
    write_ldm(
        path,
        LDMCheckpoint(
            unet.config,
            unet.state_dict(),
            vae.config,
            vae.state_dict(),
            text_encoder.model.config.to_dict(),
            text_encoder.model.state_dict(),
            schedule.prediction_type,
            schedule.zero_terminal_snr,
        ),
    )
