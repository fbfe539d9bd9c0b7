"""Stable Diffusion, put together: text encoder + U-Net + VAE + noise schedule; prompts in, pictures out.

Paper: latent diffusion (Rombach et al. 2022, arXiv:2112.10752), classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598). The parts live in rooms of their own; here is how they are read from and written to the standard
folder (diffusers' layout), and the one path on which text-to-image, img2img and inpainting differ only in their start.

Letters: N pictures, h = H/8 and w = W/8 the size of their latents, L text positions (77), D width of the text encoding.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from diffusion_model import UNet, UNetConfig
from guidance import Guidance
from images import format_parameters, image_to_mask, image_to_pixels, pixels_to_images
from noise_schedule import NoiseSchedule
from pretrained_files import load_strict, locate, read_folder_weights, read_json, write_safetensors
from samplers import SAMPLERS, TimestepGrid, check_arguments, grid_options, inpainting, timestep_grid
from sampling_request import check_tensor, generators_of, latent_size, one_each, pixels_for, texts_of
from text_encoder import TextEncoder, load_text_model, load_tokenizer
from vae_model import VAE

# How SD 1.x's own folder has diffusers sample; models trained here say the same of themselves.
LATENTS_MEAN = "_latents_mean"  # by channel, in scheduler_config.json; diffusers passes over names that start with "_"
DEFAULT_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def choose_device(name: str | None = None) -> torch.device:
    """`name`, or the best there is: cuda, then mps, then cpu. ValueError if the named one is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name in (None, "auto"):
        name = next(kind for kind, there in available.items() if there)
    if not available.get(str(name).split(":")[0], False):
        raise ValueError(
            f"--device {name}: not available here; choose from {', '.join(k for k, v in available.items() if v)}."
        )
    return torch.device(name)


class StableDiffusion:
    """A text encoder, a U-Net, a VAE and the schedule that binds them."""

    def __init__(
        self,
        text_encoder: TextEncoder,
        unet: UNet,
        vae: VAE,
        schedule: NoiseSchedule,
        scheduler_config: dict | None = None,
        name: str = "untitled",
    ) -> None:
        if unet.config.context_dim != text_encoder.width:
            raise ValueError(
                f"The U-Net expects text encodings of width {unet.config.context_dim}, but the text encoder's are "
                f"{text_encoder.width} wide: they do not belong together."
            )
        if unet.config.in_channels != vae.config.latent_channels:
            raise ValueError(
                f"The U-Net takes {unet.config.in_channels} channels, but the VAE's latents have "
                f"{vae.config.latent_channels}: inpainting U-Nets (9 channels) and the like are not supported."
            )
        self.text_encoder, self.unet, self.vae = text_encoder, unet, vae
        self.schedule = schedule
        # A folder's own config is not mixed with our defaults: where it is silent, each sampler has its own.
        # The two values behind it are those that diffusers' pipeline sets, too, whatever the config says.
        self.scheduler_config = {"_class_name": "DDIMScheduler"} | dict(scheduler_config or DEFAULT_SCHEDULER)
        self.scheduler_config |= {"clip_sample": False, "steps_offset": 1}
        self.name = name  # goes into the pictures' metadata

    # ------------------------------------------------------------------------------------------------------------------
    # Reading and writing
    # ------------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | os.PathLike, device: str | None = None, dtype: torch.dtype | None = None
    ) -> "StableDiffusion":
        """Reads the standard folder, a hub id of SD 1.x or 2.x, or a single file in the original LDM layout.

        `device`: cuda, mps, cpu, or None for the best there is; `dtype` of the networks, float32 if None (the VAE
        stays in float32 beside float16, in which published ones overflow). ValueError or FileNotFoundError, in one
        sentence, for what is not such a model.
        """
        path = locate(folder_or_hub_id, "the model")
        if path.is_file():
            from ldm_pipeline import read_ldm_pipeline  # the original layout is a room of its own, seldom entered

            model = cls(**read_ldm_pipeline(path), name=path.stem)
        else:
            given = Path(folder_or_hub_id)  # a run keeps its model in RUN/model
            model = cls._from_folder(path, name=given.parent.name if given.name == "model" else given.name)
        return model.to(choose_device(device), dtype or torch.float32)

    @classmethod
    def _from_folder(cls, folder: Path, name: str) -> "StableDiffusion":
        index = read_json(folder / "model_index.json")
        kind = index.get("_class_name", "StableDiffusionPipeline")
        if not kind.startswith("StableDiffusion") or "XL" in kind or "3" in kind:
            raise ValueError(f"{folder}: a {kind} is not supported, only Stable Diffusion 1.x and 2.x.")
        config = UNetConfig.from_diffusers(read_json(folder / "unet" / "config.json"))
        unet = UNet(config)
        load_strict(unet, read_folder_weights(folder / "unet", "diffusion_pytorch_model"), folder / "unet")
        scheduler_config = read_json(folder / "scheduler" / "scheduler_config.json")
        return cls(
            TextEncoder(load_tokenizer(folder / "tokenizer"), load_text_model(folder / "text_encoder")),
            unet.eval(),
            VAE.load(folder / "vae"),
            NoiseSchedule.from_diffusers(scheduler_config),
            scheduler_config,
            name,
        )

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Writes the standard folder, which `diffusers.StableDiffusionPipeline.from_pretrained` opens as well."""
        folder = Path(folder)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.30.0",
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", self.scheduler_config["_class_name"]],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        _write_json(folder / "model_index.json", index)
        _write_json(
            folder / "scheduler" / "scheduler_config.json", self.scheduler_config | self.schedule.to_diffusers()
        )
        for name, module in {"unet": self.unet, "vae": self.vae}.items():
            _write_json(folder / name / "config.json", module.config.to_diffusers())
            weights = {key: tensor.to(dtype) for key, tensor in module.state_dict().items()}
            write_safetensors(folder / name / "diffusion_pytorch_model.safetensors", weights)
        self.text_encoder.save(folder / "text_encoder", folder / "tokenizer", dtype)

    def export(self, path: str | os.PathLike) -> None:
        """Writes one `.safetensors` in the original LDM layout, for the tools that want a single file."""
        from ldm_pipeline import write_ldm_pipeline

        write_ldm_pipeline(path, self.text_encoder, self.unet, self.vae, self.schedule)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "StableDiffusion":
        """Moves everything to `device` and the networks to `dtype`; returns itself."""
        self.unet.to(device, dtype)
        self.text_encoder.model.to(device, dtype)
        self.vae.to(device, torch.float32 if dtype == torch.float16 else dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the U-Net computes in; latents are float32 all the way."""
        return self.unet.conv_in.weight.dtype

    # ------------------------------------------------------------------------------------------------------------------
    # Spaces: words → context; pixels ↔ latents. The only two places that know the scaling factor
    # ------------------------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts → (N, 77, D)."""
        return self.text_encoder(prompts)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] → latents (N, 4, h, w) of unit variance, drawn from the posterior."""
        posterior = self.vae.encode(images.to(self.device, self.vae.quant_conv.weight.dtype))
        return posterior.sample(generator).float() * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Latents (N, 4, h, w) → pictures (N, 3, H, W) in [0, 1]; one at a time, to need no more memory than for one.

        `tiled` decodes large pictures in overlapping tiles (see `VAE.decode_tiled`).
        """
        raw = latents.to(self.device, self.vae.quant_conv.weight.dtype) / self.vae.config.scaling_factor
        decode = self.vae.decode_tiled if tiled else self.vae.decode
        images = torch.cat([decode(one) for one in raw.split(1)])
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------------------------
    # Sampling
    # ------------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: str | Sequence[str] | Tensor,
        *,
        negative_prompts: str | Sequence[str] | None = None,
        steps: int = 30,
        sampler: str = "dpm++2m",
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        seeds: int | Sequence[int] = 0,
        height: int = 512,
        width: int = 512,
        init_images: Image.Image | Sequence[Image.Image] | None = None,
        strength: float = 0.8,
        masks: Image.Image | Sequence[Image.Image] | None = None,
        eta: float = 0.0,
        karras: bool | None = None,
        timestep_spacing: str | None = None,
        noise: Tensor | None = None,
        vae_tiling: bool = False,
        progress: bool = True,
        callback: Callable[[int, float, Tensor, Tensor], Tensor | None] | None = None,
    ) -> list[Image.Image]:
        """Pictures for prompts, one each. Same arguments, same pictures.

        Args:
            prompts: N prompts, or their encodings (N, L, D), as `encode_prompts` gives and interpolation mixes them.
            negative_prompts: what to stay away from: one for all or one each (Ho & Salimans' empty text if None).
            steps: how often the U-Net is asked, 1…1000 (img2img: int(steps · strength) times).
            sampler: ddpm, ddim, euler, euler_a or dpm++2m; `eta` is ddim's.
            guidance_scale, guidance_rescale, guidance_interval: see `Guidance`; scale 1 is the plain conditional model.
            seeds: one per picture; a single number s stands for s, s+1, …
            height, width: of the pictures, in pixels, divisible by 8.
            init_images, strength: start from these pictures, noised by `strength` in (0, 1], not from pure noise.
            masks: white where `init_images` shall be painted anew; everywhere else they return exactly.
            karras, timestep_spacing: how timesteps are laid out, if not as the model's own scheduler_config.json says.
            noise: starting noise (N, 4, h, w) instead of the seeds', for interpolations.
            callback: called after each step with (step, t, x_t, predicted x_0); a tensor it returns replaces x_t.

        Picture k of a batch is the picture that its seed gives alone: on a CPU bit for bit, for the same number of
        threads; on a GPU, where batches are faster, but for the order of sums in the matrix kernels. The pictures'
        `info["parameters"]` say how they were made. Raises ValueError, in one sentence, before any network runs.
        """
        # What was asked for, checked.
        encoded = isinstance(prompts, Tensor)
        if encoded:
            check_tensor(prompts, (None, self.text_encoder.length, self.text_encoder.width), "prompts")
        texts = [""] * len(prompts) if encoded else texts_of(prompts, "prompts")
        n, factor = len(texts), self.vae.config.downsampling
        negatives = [""] if negative_prompts is None else texts_of(negative_prompts, "negative_prompts")
        negatives = one_each(negatives, n, "negative_prompts")
        guidance = Guidance(guidance_scale, guidance_rescale, guidance_interval)
        generators = generators_of(seeds, n)
        shape = (1, self.unet.config.in_channels, *latent_size(height, width, factor))

        def draw(_step: int = 0) -> Tensor:
            return torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)  # (N, 4, h, w)

        walk = self._walk(sampler, steps, karras, timestep_spacing)
        check_arguments(sampler, walk, draw, eta)
        original = (
            None if init_images is None else pixels_for(init_images, image_to_pixels, n, height, width, "init_images")
        )
        walk = walk if original is None else walk.from_strength(strength)
        paint = (
            None if masks is None else pixels_for(masks, image_to_mask, n, height, width, "masks")
        )  # (N, 1, H, W), 0 or 1
        if paint is not None and original is None:
            raise ValueError("masks need init_images: the pictures whose unmasked parts are kept.")
        if noise is not None:
            check_tensor(noise, (n, *shape[1:]), "noise")

        # Words.
        context = prompts if encoded else self._encode_each_prompt(texts)  # (N, L, D)
        empty = self._encode_each_prompt(negatives) if guidance.needs_unconditional else context
        context, empty = (words.to(self.device, self.dtype) for words in (context, empty))

        # The start: noise alone, or a picture under noise.
        latents = None if original is None else self._encode_each_picture(original, generators)
        unit_noise = draw() if noise is None else noise.to(self.device, torch.float32)
        if paint is not None:
            mask = F.interpolate(paint, size=shape[2:]).to(self.device)  # (N, 1, h, w), nearest, as diffusers
            callback = inpainting(walk, latents, unit_noise, mask, callback)
        # A masked picture at full strength starts from noise; img2img always remembers its picture a little.
        from_noise = latents is None or (paint is not None and strength == 1)
        x = self._start(walk, unit_noise) if from_noise else walk.noised(latents, unit_noise)  # (N, 4, h, w)

        # The walk.
        level_at = dict(zip(walk.timesteps, walk.levels, strict=True))
        together = 1 if self.device.type == "cpu" else n  # a CPU gains nothing from a batch, and so gives the same bits
        with tqdm(total=len(walk), desc=f"sampling with {sampler}", unit="step", disable=not progress) as bar:

            def predict(x_t: Tensor, t: float) -> Tensor:
                parts = zip(*(tensor.split(together) for tensor in (x_t, context, empty)), strict=True)
                made = torch.cat([guidance.predict(self._ask, *part, t, level_at[t]) for part in parts])
                bar.update()
                return made

            x0 = SAMPLERS[sampler](predict, x, self.schedule, walk, noise=draw, callback=callback, eta=eta)

        # Pixels.
        if not x0.isfinite().all():
            raise FloatingPointError("The latents overflowed: sample in float32 or bfloat16, or with less guidance.")
        images = self.decode_latents(x0, tiled=vae_tiling)  # (N, 3, H, W)
        if paint is not None:
            images = torch.where(paint.to(images.device) == 1, images, (original / 2 + 0.5).to(images.device))
        pictures = pixels_to_images(images)
        for picture, text, negative, generator in zip(pictures, texts, negatives, generators, strict=True):
            settings = {
                "Steps": steps, "Sampler": sampler, "Schedule type": "Karras" if karras else None,
                "Timestep spacing": timestep_spacing, "Eta": eta or None, "CFG scale": guidance_scale,
                "CFG rescale": guidance_rescale or None, "CFG interval": None if guidance.always else guidance_interval,
                "Seed": generator.initial_seed() if noise is None else None, "Size": f"{width}x{height}",
                "Model": self.name,
                "Denoising strength": None if original is None else strength,
            }  # fmt: skip
            picture.info["parameters"] = format_parameters(text, negative, **settings)
        return pictures

    def _walk(self, sampler: str, steps: int, karras: bool | None, timestep_spacing: str | None) -> TimestepGrid:
        """Timesteps and noise levels, as the model's own scheduler_config.json has them unless told otherwise."""
        told = {"use_karras_sigmas": karras, "timestep_spacing": timestep_spacing}
        told = {name: value for name, value in told.items() if value is not None}
        return timestep_grid(sampler, self.schedule, steps, **grid_options(sampler, self.scheduler_config) | told)

    def _encode_each_picture(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Pixels (N, 3, H, W) → latents (N, 4, h, w), each drawn from its own generator."""
        pairs = zip(pixels.split(1), generators, strict=True)
        return torch.cat([self.encode_images(one, generator) for one, generator in pairs])

    def _start(self, walk: TimestepGrid, noise: Tensor) -> Tensor:
        """The x_T of text-to-image: noise, and under it the mean of the training latents if the model knows it.

        Where the schedule's last ᾱ is not 0, training never saw pure noise: a little of the picture shines through, its
        mean brightness above all, which the U-Net learns to read (Lin et al. 2024, Section 3.1; Everaert et al. 2024,
        arXiv:2309.15842). Starting from noise of mean 0 then asks for pictures far darker than any it was shown.
        """
        mean = self.scheduler_config.get(LATENTS_MEAN)
        if mean is None:  # as published models and diffusers do
            return walk.start(noise)
        return walk.noised(torch.tensor(mean, device=noise.device)[None, :, None, None].expand_as(noise), noise)

    def _encode_each_prompt(self, texts: list[str]) -> Tensor:
        """Texts → (N, L, D), each distinct one encoded alone: its encoding depends on no neighbour, to the last bit."""
        encodings = {text: self.encode_prompts([text]) for text in dict.fromkeys(texts)}
        return torch.cat([encodings[text] for text in texts])

    def _ask(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        """The U-Net's prediction (N, 4, h, w), ε or v, in float32."""
        timesteps = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return self.unet(x_t.to(self.dtype), timesteps, context).float()


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation: along the sphere for noise; encodings of prompts lie on none, there `torch.lerp` is right
# ----------------------------------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise `a` (share 0) to `b` (share 1) along the sphere, so that what lies between is noise as well.

    Straight lines would pass through tensors with too little variance. Shoemake 1985, Section 3.3.
    """
    angle = torch.acos((F.normalize(a.flatten(), dim=0) * F.normalize(b.flatten(), dim=0)).sum().clamp(-1, 1))
    if angle.sin() < 1e-4:  # (anti)parallel: the line is as good
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
