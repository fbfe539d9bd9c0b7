"""The smallest models that still have every part: what tests train, save and sample."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diffusion_model import UNet, UNetConfig
from noise_schedule import NoiseSchedule
from published import save_text_encoder
from stable_diffusion_model import StableDiffusion
from text_encoder import TextEncoder
from training.presets import UNetOptions
from training.run_folder import RunFolder
from vae_model import VAE, VAEConfig


def tiny_text_encoder(width: int = 32, length: int = 77) -> TextEncoder:
    """A random CLIP text model with a tokenizer that spells words letter by letter."""
    letters = list(string.ascii_lowercase + string.digits + string.punctuation)
    words = [*letters, "<|startoftext|>", "<|endoftext|>"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Split("", "isolated")])
    start, end = len(letters), len(letters) + 1
    core.post_processor = TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[("<|startoftext|>", start), ("<|endoftext|>", end)],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=length,
    )
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return TextEncoder(tokenizer, CLIPTextModel(config))


def tiny_vae() -> VAE:
    return VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4)).eval()


def tiny_unet(context_dim: int = 32, randomise: bool = True) -> UNet:
    """Two levels, the deeper one attending; `randomise` undoes the zero initialisation, so that inputs matter."""
    config = UNetConfig(
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_levels=(False, True),
        num_attention_heads=2,
        context_dim=context_dim,
        norm_num_groups=8,
    )
    unet = UNet(config)
    return randomised(unet) if randomise else unet


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Small random values wherever initialisation put zeros: parity and sampling tests must not compare 0 with 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    return module.eval()


def tiny_model(prediction_type: str = "epsilon") -> StableDiffusion:
    return StableDiffusion(
        tiny_text_encoder(), tiny_unet(), tiny_vae(), NoiseSchedule(prediction_type=prediction_type), name="tiny"
    )


def tiny_parts(folder: Path) -> Path:
    """A folder with a tiny VAE and a tiny CLIP, as the options of training take them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    tiny_vae().save(folder / "vae_model.pth")
    save_text_encoder(tiny_text_encoder(), folder / "clip", folder / "clip", torch.float32)
    return folder


def training_arguments(parts: Path, *more: str) -> list[str]:
    """The command line of a training run that takes a second; `more` overrides."""
    return [
        *("--preset", "monsters", "--dataset", "monsters:8", "--resolution", "64", "--wandb", "off", "--device", "cpu"),
        *("--vae", str(parts / "vae_model.pth"), "--text_encoder", str(parts / "clip")),
        *("--block_out_channels", "16", "32", "--attention_levels", "0", "1", "--norm_num_groups", "8"),
        *("--num_attention_heads", "2", "--batch_size", "4", "--max_steps", "6", "--warmup_steps", "2"),
        *("--checkpoint_every", "3", "--validate_every", "3", "--preview_every", "6", "--preview_steps", "2"),
        *("--log_every", "2", "--validation_share", "0.25", "--precision", "float32", "--preview_prompts", "a fox"),
        *("--optimizer", "adamw", "--mirror", "yes", "--final_samples", "0"),
        *more,
    ]  # fmt: skip


def folder_at(path: Path | str, **options: object) -> RunFolder:
    """The run folder `path`, as a script with these options opens it."""
    return RunFolder(UNetOptions(output_dir=str(path), **options))
