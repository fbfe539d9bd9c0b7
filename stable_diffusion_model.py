"""Stable Diffusion, put together: text encoder + U-Net + VAE + noise schedule; prompts in, images out.

Paper: latent diffusion (Rombach et al. 2022, arXiv:2112.10752), classifier-free guidance (Ho & Salimans 2022,
arXiv:2207.12598). Each part has a module of its own, and `published` reads and writes whole models. Here they meet:
text-to-image, img2img and inpainting are one path, which differs only in where it starts.

Letters: N images, h = H/8 and w = W/8 the size of their latents, L text positions (77), D width of the text encoding.
"""

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

import lora
from diffusion_model import Context, UNet
from guidance import Guidance
from images import format_parameters, image_to_mask, image_to_pixels, pixels_to_images
from noise_schedule import NoiseSchedule
from published import ModelParts, attach, find_layers, load_model, lora_file, read_lora, save_folder, save_single_file
from samplers import SAMPLERS, TimestepGrid, check_arguments, grid_options, inpainting, timestep_grid
from sampling.packed import packed, unpack
from sampling.request import check_tensor, generators_of, latent_size, one_each, pixels_for, texts_of
from text_encoder import TextEncoder
from vae_model import VAE

LATENTS_MEAN = "_latents_mean"  # by channel, in the scheduler_config.json of models trained on latents of another mean
DEFAULT_SCHEDULER_CONFIG = {  # SD 1.x's, and that of models trained here
    "_class_name": "DDIMScheduler",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_START_THERE = (
    "its U-Net was trained on latents whose mean is not 0, and from plain noise it draws dark images; give other tools "
    "latents=, noise above that mean, or train again: VAEs that are trained here now give latents of mean 0."
)


def choose_device(name: str | None = None) -> torch.device:
    """`name`, or the best there is: cuda, then mps, then cpu. ValueError if the named one is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name in (None, "auto"):
        name = next(kind for kind, there in available.items() if there)
    if not available.get(str(name).split(":")[0], False):
        found = ", ".join(kind for kind, there in available.items() if there)
        raise ValueError(f"--device {name}: not available here; choose from {found}.")
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
        # Channels-last samples fastest: on one core 1.2 times in bfloat16 and 1.1 in float32 at 512×512, and equal at
        # 128×128. What the U-Net trains in is another matter, see `UNet.laid_out`.
        self.unet, self.vae = (network.to(memory_format=torch.channels_last) for network in (unet, vae))
        self.text_encoder, self.schedule = text_encoder, schedule
        # A folder's own config is not mixed with our defaults: for what it leaves out, each sampler has its own.
        # Two values are set whatever the config says, as in diffusers' pipeline.
        if scheduler_config is None:
            # Zero terminal SNR is of use if sampling begins at the last timestep (Lin et al. 2024, Section 3.3).
            spacing = {"timestep_spacing": "trailing"} if schedule.zero_terminal_snr else {}
            scheduler_config = DEFAULT_SCHEDULER_CONFIG | spacing
        self.scheduler_config = {"_class_name": "DDIMScheduler"} | dict(scheduler_config)
        self.scheduler_config |= {"clip_sample": False, "steps_offset": 1}
        self.name = name  # goes into the images' metadata
        self.loras: dict[str, float] = {}  # those that are loaded, and their scales

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
        return cls(*load_model(folder_or_hub_id, dtype := dtype or torch.float32)).to(choose_device(device), dtype)

    def save_pretrained(self, folder: str | os.PathLike, dtype: torch.dtype = torch.float32) -> None:
        """Writes the standard folder, which `diffusers.StableDiffusionPipeline.from_pretrained` opens as well.

        Of a model whose latents have another mean than 0, a warning says that it does not start there as it does here.
        """
        if LATENTS_MEAN in self.scheduler_config:
            warnings.warn(f"{folder}: diffusers does not read {LATENTS_MEAN}: {_START_THERE}", stacklevel=2)
        with self._as_plain_networks():
            save_folder(Path(folder), self.parts, dtype)

    def export(self, path: str | os.PathLike) -> None:
        """Writes one `.safetensors` in the original LDM layout, for the tools that want a single file.

        ValueError if such a file would give other images: the noise schedule, or the mean of the latents, is not SD's.
        """
        if LATENTS_MEAN in self.scheduler_config:
            raise ValueError(
                f"{path}: a single file cannot say {LATENTS_MEAN}, so it would not be the same model: {_START_THERE}"
            )
        with self._as_plain_networks():
            save_single_file(path, self.parts)

    @property
    def parts(self) -> ModelParts:
        """What it is made of: the arguments that would make the same model."""
        return ModelParts(self.text_encoder, self.unet, self.vae, self.schedule, self.scheduler_config, self.name)

    def load_lora(self, path_or_hub_id: str | os.PathLike, scale: float = 1.0) -> str:
        """Adds the low-rank changes of a LoRA to U-Net and text encoder, `scale` times; returns the name it has here.

        Layouts of diffusers, peft and kohya; several add up. Sampling is as fast as without. ValueError or
        FileNotFoundError, in one sentence, if it is damaged, no LoRA, or made for another base model.
        """
        if not math.isfinite(scale):
            raise ValueError(f"{path_or_hub_id}: the scale of a LoRA must be a finite number, not {scale}.")
        file, name = lora_file(path_or_hub_id)
        changes = read_lora(file)
        while name in self.loras or hasattr(nn.ModuleDict(), name):
            name += "_"
        pairs = [pair for kind, net in self._networks().items() for pair in find_layers(net, changes[kind], kind, file)]
        self.loras[name] = 1.0
        try:
            attach(pairs, name)
            self.set_lora_scale(name, scale)
        except BaseException:  # Ctrl-C, or no memory: a part of a LoRA must not stay
            self.unload_lora(name)
            raise
        return name

    def set_lora_scale(self, name: str, scale: float) -> None:
        """How strongly a LoRA counts from the next `sample` on: 0 = not at all, bit for bit. ValueError if unknown.

        In a callback it is from the next step on, but for the text's keys and values, which a sampling computes once.
        """
        if name not in self.loras or not math.isfinite(scale):
            loaded = ", ".join(self.loras) or "none"
            raise ValueError(f"LoRA {name!r} at scale {scale}: the scale must be finite, and loaded are {loaded}.")
        self.loras[name] = scale
        for network in self._networks().values():
            lora.set_scale(network, name, scale)
            lora.merge(network)

    def unload_lora(self, name: str) -> None:
        """Takes a LoRA's changes away again: without any, it is the model as it was. ValueError if unknown."""
        if name not in self.loras:
            raise ValueError(f"LoRA {name!r} is not loaded; loaded are {', '.join(self.loras) or 'none'}.")
        for network in self._networks().values():
            lora.remove(network, name)
        del self.loras[name]

    def _networks(self) -> dict[str, nn.Module]:
        """Those that a LoRA may change, with their weights where they belong, even while it samples."""
        unpack(self.unet)
        return {"unet": self.unet, "text_encoder": self.text_encoder.model}

    @contextlib.contextmanager
    def _as_plain_networks(self) -> Iterator[None]:
        """Within, the weights contain what LoRAs change, and the networks are as if there were none."""
        with contextlib.ExitStack() as stack:
            for network in self._networks().values():
                stack.enter_context(lora.as_one_network(network))
            yield

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
    # Spaces: prompts → context; pixels ↔ latents
    # ------------------------------------------------------------------------------------------------------------------

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """Prompts → (N, 77, D)."""
        return self.text_encoder(prompts)

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] → latents (N, 4, h, w) of unit variance, drawn from the posterior."""
        posterior = self.vae.encode(images.to(self.device, self.vae.quant_conv.weight.dtype))
        return self.vae.scale_latents(posterior.sample(generator).float())

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, tiled: bool = False) -> Tensor:
        """Latents (N, 4, h, w) → images (N, 3, H, W) in [0, 1]; one at a time, to need no more memory than for one.

        `tiled` decodes large images in overlapping tiles (see `VAE.decode_tiled`).
        """
        raw_latents = self.vae.unscale_latents(latents.to(self.device, self.vae.quant_conv.weight.dtype))
        decode = self.vae.decode_tiled if tiled else self.vae.decode
        images = torch.cat([decode(one) for one in raw_latents.split(1)])
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
        """One image for each prompt. Same arguments, same images.

        Args:
            prompts: N prompts, or their encodings (N, L, D), as `encode_prompts` gives and interpolation mixes them.
            negative_prompts: what to avoid: one for all or one each (None: the empty text, as in Ho & Salimans).
            steps: how often the U-Net is called, 1…1000 (img2img: int(steps · strength) times).
            sampler: ddpm, ddim, euler, euler_a or dpm++2m; `eta` is ddim's.
            guidance_scale, guidance_rescale, guidance_interval: see `Guidance`; scale 1 is the plain conditional model.
            seeds: one per image; a single number s stands for s, s+1, …
            height, width: of the images, in pixels, divisible by 8.
            init_images, strength: start from these images, noised by `strength` in (0, 1], not from pure noise.
            masks: white where `init_images` are sampled anew; everywhere else they are kept exactly.
            karras, timestep_spacing: override what the model's scheduler config says about the timestep grid.
            noise: starting noise (N, 4, h, w) instead of the seeds', for interpolations.
            callback: called after each step with (step, t, x_t, predicted x_0); a tensor it returns replaces x_t.
                With one, float32 sums on a CPU may come in another order.

        Image k of a batch equals the image that its seed gives alone: on a CPU bit for bit, for the same number of
        threads and with no other sampling beside it; on a GPU, where batches are faster, up to the order of sums. Their
        `info["parameters"]` say how they were made. Raises ValueError, in one sentence, before any network runs.
        """
        # The request, checked.
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

        grid = self._grid(sampler, steps, karras, timestep_spacing)
        check_arguments(sampler, grid, draw, eta)
        size = (n, height, width)
        original = None if init_images is None else pixels_for(init_images, image_to_pixels, *size, "init_images")
        grid = grid if original is None else grid.from_strength(strength)
        mask = None if masks is None else pixels_for(masks, image_to_mask, *size, "masks")  # (N, 1, H, W), 0 or 1
        if mask is not None and original is None:
            raise ValueError("masks need init_images: the images whose unmasked parts are kept.")
        if noise is not None:
            check_tensor(noise, (n, *shape[1:]), "noise")

        # Prompts → context.
        context = prompts if encoded else self._encode_each_prompt(texts)  # (N, L, D)
        empty = self._encode_each_prompt(negatives) if guidance.needs_unconditional else context
        context, empty = (encoding.to(self.device, self.dtype) for encoding in (context, empty))
        together = 1 if self.device.type == "cpu" else n  # the same bits, for which a CPU gives up 1.5× at 128×128
        parts = zip(context.split(together), empty.split(together), strict=True)
        contexts = [guidance.contexts(*part) for part in parts]
        fixed = callback is None  # else it may change the networks, and nothing is prepared for all steps at once
        prepared = functools.cache(self.unet.keys_and_values) if fixed else lambda c: c.to(self.device, self.dtype)

        # The start: noise alone, or an image under noise.
        latents = None if original is None else self._encode_each_image(original, generators)
        unit_noise = draw() if noise is None else noise.to(self.device, torch.float32)
        if mask is not None:
            latent_mask = F.interpolate(mask, size=shape[2:]).to(self.device)  # (N, 1, h, w), nearest, as diffusers
            callback = inpainting(grid, latents, unit_noise, latent_mask, callback)
        # A masked image at full strength starts from noise alone; img2img always keeps a little of its image.
        from_noise = latents is None or (mask is not None and strength == 1)
        x = self._start(grid, unit_noise) if from_noise else grid.noised(latents, unit_noise)  # (N, 4, h, w)

        # Noise → latents.
        level_at = dict(zip(grid.timesteps, grid.levels, strict=True))

        def model(x_t: Tensor, t: float, context: Tensor) -> Tensor:
            return self._predict(x_t, t, prepared(context))

        bar = tqdm(total=len(grid), desc=f"sampling with {sampler}", unit="step", disable=not progress)
        with bar, packed(self.unet, len(grid) * fixed):  # by the steps, so that an image alone has a batch's bits

            def predict(x_t: Tensor, t: float) -> Tensor:
                parts = zip(x_t.split(together), contexts, strict=True)
                guided = [guidance.predict(model, part, *told, t, level_at[t]) for part, told in parts]
                bar.update()
                return torch.cat(guided)

            x0 = SAMPLERS[sampler](predict, x, self.schedule, grid, noise=draw, callback=callback, eta=eta)

        # Latents → images.
        if not x0.isfinite().all():
            raise FloatingPointError("The latents overflowed: use float32 or bfloat16, less guidance, less of a LoRA.")
        decoded = self.decode_latents(x0, tiled=vae_tiling)  # (N, 3, H, W)
        if mask is not None:
            decoded = torch.where(mask.to(decoded.device) == 1, decoded, (original / 2 + 0.5).to(decoded.device))
        images = pixels_to_images(decoded)
        for image, text, negative, generator in zip(images, texts, negatives, generators, strict=True):
            settings = {
                "Steps": steps, "Sampler": sampler, "Schedule type": "Karras" if karras else None,
                "Timestep spacing": timestep_spacing, "Eta": eta or None, "CFG scale": guidance_scale,
                "CFG rescale": guidance_rescale or None, "CFG interval": None if guidance.always else guidance_interval,
                "Seed": generator.initial_seed() if noise is None else None, "Size": f"{width}x{height}",
                "Model": self.name,
                "LoRA": lora.in_words(self.loras),
                "Denoising strength": None if original is None else strength,
            }  # fmt: skip
            image.info["parameters"] = format_parameters(text, negative, **settings)
        return images

    def _grid(self, sampler: str, steps: int, karras: bool | None, timestep_spacing: str | None) -> TimestepGrid:
        """Timesteps and noise levels by the model's scheduler config, except where an argument is given."""
        overrides = {"use_karras_sigmas": karras, "timestep_spacing": timestep_spacing}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        return timestep_grid(sampler, self.schedule, steps, **grid_options(sampler, self.scheduler_config) | overrides)

    def _encode_each_image(self, pixels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Pixels (N, 3, H, W) → latents (N, 4, h, w), each drawn from its own generator."""
        pairs = zip(pixels.split(1), generators, strict=True)
        return torch.cat([self.encode_images(one, generator) for one, generator in pairs])

    def _start(self, grid: TimestepGrid, noise: Tensor) -> Tensor:
        """The x_T of text-to-image: noise, above the mean of the training latents if the model's config has that mean.

        Where the schedule's last ᾱ is not 0, training never saw pure noise: x_T kept a little of the image, above all
        its mean brightness, which the U-Net learns to read (Lin et al. 2024, Section 3.1; Everaert et al. 2024,
        arXiv:2309.15842). Noise of mean 0 would then start images far darker than any of the training set. This is
        about the shipped model alone: VAEs trained since then give latents of mean 0 (`VAE.standardise_latents`).
        """
        mean = self.scheduler_config.get(LATENTS_MEAN)
        if mean is None:  # as published models and diffusers do
            return grid.start(noise)
        return grid.noised(torch.tensor(mean, device=noise.device)[None, :, None, None].expand_as(noise), noise)

    def _encode_each_prompt(self, texts: list[str]) -> Tensor:
        """Texts → context (N, L, D), each distinct one encoded alone, so that no neighbour changes a bit of it."""
        encodings = {text: self.encode_prompts([text]) for text in dict.fromkeys(texts)}
        return torch.cat([encodings[text] for text in texts])

    def _predict(self, x_t: Tensor, t: float, context: Context) -> Tensor:
        """The U-Net's prediction (N, 4, h, w), ε or v, in float32."""
        timesteps = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
        return self.unet(x_t.to(self.dtype), timesteps, context).float()


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation: along the sphere for noise; for contexts, which lie on no sphere, `torch.lerp` is right
# ----------------------------------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise `a` (share 0) to `b` (share 1) along the sphere: noise of unit variance all the way.

    On the straight line the variance would fall below 1. Shoemake 1985, Section 3.3.
    """
    angle = torch.acos((F.normalize(a.flatten(), dim=0) * F.normalize(b.flatten(), dim=0)).sum().clamp(-1, 1))
    if angle.sin() < 1e-4:  # (anti)parallel: the line is as good
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
