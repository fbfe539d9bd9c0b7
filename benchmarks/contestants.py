"""What the benchmarks time: this repository's networks, and diffusers' with the same weights, at some sizes."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL as TheirVAE
from diffusers import UNet2DConditionModel as TheirUNet
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusion_model import UNet, UNetConfig
from noise_schedule import NoiseSchedule
from published import load_text_encoder, unet_dict, vae_dict
from text_encoder import TextEncoder
from train_stable_diffusion import draw_batch, train_step, unet_config
from training.captioned_latents import CaptionedLatents
from training.encoded_cache import Rows
from training.optimizers import make_optimizer
from training.presets import PRESETS, UNetOptions
from training.reproducible import Processes
from vae_model import VAE, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("ours", "documented", "tuned", "documented in float32")

# ----------------------------------------------------------------------------------------------------------------------
# Models and cases
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """What a model is made of, and at which sizes it is timed."""

    unet: UNetConfig
    vae: VAEConfig
    text: str  # "shipped", or "published": CLIP ViT-L's shape with random weights
    side: int  # of the images, in pixels: sampling, and the VAE
    train_side: int
    batch: int
    on_gpu: tuple[int, int] | None = None  # what GPUs train on: side and batch, if others

    def training_on(self, device: str) -> tuple[int, int]:
        """Side of the images and size of a batch."""
        return self.on_gpu if self.on_gpu and device == "cuda" else (self.train_side, self.batch)


def of_preset(name: str, context_dim: int) -> UNetConfig:
    return unet_config(UNetOptions(**PRESETS[name]), 4, context_dim)


SMALL_VAE = VAEConfig(block_out_channels=(32, 64, 128, 128), norm_num_groups=8)
MODELS = {
    "quickstart": Model(of_preset("monsters", 192), SMALL_VAE, "shipped", 128, 128, 64),
    "pokemon": Model(of_preset("pokemon", 768), SMALL_VAE, "published", 512, 256, 4, on_gpu=(512, 32)),
    "sd15": Model(UNetConfig(), VAEConfig(), "published", 512, 256, 1, on_gpu=(512, 8)),
}


@dataclass
class Case:
    row: str
    model: str
    dtype: str
    device: str = "cpu"
    compile: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def sides(self) -> tuple[str, ...]:
        return SIDES if self.dtype != "float32" else SIDES[:3]


# ----------------------------------------------------------------------------------------------------------------------
# Networks
# ----------------------------------------------------------------------------------------------------------------------

NEEDS = {row: ("unet",) for row in ("unet", "train")} | {row: ("vae",) for row in ("vae_encode", "vae_decode")}
NEEDS |= {row: ("unet", "vae", "text") for row in ("pictures", "sampling")}


@dataclass
class Side:
    """The networks of one side, with the same random weights as the others'."""

    unet: nn.Module | None
    vae: nn.Module | None
    text_encoder: TextEncoder | None


def build(case: "Case", side: str) -> Side:
    """The networks that a row needs, on its device and in its dtype; the others are left out, as None."""
    model, needs = MODELS[case.model], NEEDS[case.row]
    torch.manual_seed(0)
    with torch.device(case.device):  # where random numbers are drawn fast
        unet = UNet(model.unet).eval() if "unet" in needs else None
        vae = VAE(model.vae).eval() if "vae" in needs else None
    clip = load_text_encoder(ROOT / "stable_diffusion_results" / "clip") if "text" in needs else None
    if clip and model.text == "published":  # the tokenizer's words matter to no timing
        shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
        tokens = {"vocab_size": 49408, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        clip = TextEncoder(clip.tokenizer, CLIPTextModel(CLIPTextConfig(**shape, **tokens)))
    for parameter in unet.parameters() if unet else ():  # undoes the zeros at the start
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    if side != "ours":
        unet = as_theirs(TheirUNet, unet_dict(model.unet), unet) if unet else None
        vae = as_theirs(TheirVAE, vae_dict(model.vae), vae) if vae else None
    training = case.row in ("train", "pictures")
    if side in ("ours", "tuned"):  # as `StableDiffusion` does; training on a CPU is faster contiguous: `UNet.laid_out`
        contiguous = training and case.device == "cpu"
        unet = unet and unet.to(memory_format=torch.contiguous_format if contiguous else torch.channels_last)
        vae = vae and vae.to(memory_format=torch.channels_last)
    dtype = torch.float32 if training else case.torch_dtype
    unet, vae = (part and part.to(case.device, dtype) for part in (unet, vae))
    return Side(unet, vae, clip)


def as_theirs(kind: type, config: dict, ours: nn.Module) -> nn.Module:
    """diffusers' network of that config, with our network's very tensors."""
    with torch.device("meta"):
        theirs = kind(**{name: value for name, value in config.items() if not name.startswith("_")})
    theirs.load_state_dict(ours.state_dict(), assign=True)
    return theirs.eval().requires_grad_()


# ----------------------------------------------------------------------------------------------------------------------
# Our training
# ----------------------------------------------------------------------------------------------------------------------


class Training:
    """Draws batches from encoded images and takes steps as `train_stable_diffusion.py` does, and nothing else."""

    def __init__(
        self,
        unet: UNet,
        moments: Rows | Tensor,
        contexts: Rows | Tensor,
        batch_size: int,
        precision: torch.dtype,
        compiled: bool = False,
    ) -> None:
        device = self.device = unet.conv_in.weight.device
        self.unet = unet.laid_out(device).train()
        self.network = torch.compile(self.unet) if compiled else self.unet
        self.options = UNetOptions(batch_size=batch_size, min_snr_gamma=0.0, mirror=False)
        self.precision, self.optimizer = precision, make_optimizer("adamw", self.unet, 1e-4, 1e-2)
        # What a step asks of a model: its schedule and its latents' scale. VAE and CLIP have done their work.
        scale = SimpleNamespace(scale_latents=lambda latents: latents * 0.18215)
        self.model = SimpleNamespace(schedule=NoiseSchedule().to(device), vae=scale)
        images = len(moments)
        self.data = CaptionedLatents(moments, contexts, torch.arange(1, images + 1, device=device), [])
        self.indices, self.steps = torch.arange(images, device=device), 0

    def step(self) -> None:
        processes = Processes(0, 1, self.device)
        batch = draw_batch(self.data, self.indices, self.model, self.options, self.steps, processes)
        train_step(self.network, self.model.schedule, batch, self.optimizer, self.options, self.precision)
        self.steps += 1
