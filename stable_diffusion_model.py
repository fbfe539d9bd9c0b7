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

from diffusion_model import NoiseSchedule, UNet, UNetConfig
from pictures import format_parameters, pixels_of, to_pictures, to_rgb
from pretrained_files import load_strict, locate, read_folder_weights, read_json, write_safetensors
from samplers import SAMPLERS, grid_options, inpainting, timestep_grid
from text_encoder import TextEncoder, load_text_model, load_tokenizer
from vae_model import VAE

# How SD 1.x's own folder has diffusers sample; models trained here say the same of themselves.
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
        # A folder's own config is not mixed with our defaults: where it is silent, each sampler has defaults of its own.
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
        stays in float32 beside float16, in which published ones overflow). One-sentence ValueError or FileNotFoundError.
        """
        path = locate(folder_or_hub_id, "the model")
        if path.is_file():
            from ldm_pipeline import read_ldm_pipeline  # the original layout is a room of its own, seldom entered

            model = cls(**read_ldm_pipeline(path), name=path.stem)
        else:
            model = cls._from_folder(path, name=str(folder_or_hub_id).rstrip("/").split("/")[-1])
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
        return self.unet.conv_in.weight.device

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
        prompts: str | list[str] | Tensor,
        *,
        negative_prompts: str | list[str] | None = None,
        steps: int = 30,
        sampler: str = "dpm++2m",
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, math.inf),
        seeds: int | Sequence[int] = 0,
        height: int = 512,
        width: int = 512,
        init_images: list[Image.Image] | None = None,
        strength: float = 0.8,
        masks: list[Image.Image] | None = None,
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
            prompts: N prompts, or their encodings (N, 77, D), as `encode_prompts` gives and interpolation mixes them.
            negative_prompts: what to stay away from: one for all or one each (Ho & Salimans' empty text if None).
            steps: how often the U-Net is asked, 1…1000 (img2img: int(steps · strength) times).
            sampler: ddpm, ddim, euler, euler_a or dpm++2m; `eta` is ddim's.
            guidance_scale: w in unconditional + w · (conditional - unconditional): 1 is the plain conditional model.
            guidance_rescale: φ of Lin et al. 2024, Equations 14-16, against over-exposure; 0 = off.
            guidance_interval: guide only where the noise level σ = √((1-ᾱ)/ᾱ) lies between these two.
            seeds: one per picture; a single number s stands for s, s+1, …
            height, width: of the pictures, in pixels, divisible by 8.
            init_images, strength: start from these pictures, noised by `strength` in (0, 1], not from pure noise.
            masks: white where `init_images` shall be painted anew; everywhere else they return exactly.
            karras, timestep_spacing: how timesteps are laid out, if not as the model's own scheduler_config.json says.
            noise: starting noise (N, 4, h, w) instead of the seeds', for interpolations.
            callback: called after each step with (step, t, x_t, predicted x_0); a tensor it returns replaces x_t.

        Picture k of a batch starts from the noise that its seed gives alone and sees no other picture; what can differ
        with the batch size is the last bits of sums in the matrix kernels. Raises ValueError, in one sentence, for bad input.
        """
        context = prompts if isinstance(prompts, Tensor) else None
        texts = [""] * len(prompts) if context is not None else [prompts] if isinstance(prompts, str) else list(prompts)
        negatives = _spread(negative_prompts or "", len(texts), "negative_prompts")
        seeds = _spread_seeds(seeds, len(texts))
        _check_request(texts, height, width, self.vae.config.downsampling, guidance_scale, guidance_rescale)
        shape = (1, self.unet.config.in_channels, height // 8, width // 8)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

        # Where the walk goes, and what it starts from.
        options = grid_options(sampler, self.scheduler_config)
        options |= {"use_karras_sigmas": karras} if karras is not None else {}
        options |= {"timestep_spacing": timestep_spacing} if timestep_spacing is not None else {}
        walk = timestep_grid(sampler, self.schedule, steps, **options)

        def draw(_step: int = 0) -> Tensor:
            return torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)  # (N, 4, h, w)

        original, keep = None, None
        if init_images is not None:
            original, pixels = self._encode_init_images(init_images, generators, height, width)
            walk = walk.from_strength(strength)
        unit_noise = draw() if noise is None else noise.to(self.device, torch.float32)
        if masks is not None:
            if original is None:
                raise ValueError("masks need init_images: the pictures whose unmasked parts are kept.")
            keep, latent_mask = self._read_masks(masks, len(texts), height, width)
            callback = inpainting(walk, original, unit_noise, latent_mask, callback)
        # A masked picture at full strength starts from pure noise; img2img always remembers its picture a little.
        from_noise = original is None or (masks is not None and strength == 1.0)
        x = walk.start(unit_noise) if from_noise else walk.noised(original, unit_noise)

        # The walk.
        context = (
            self.encode_prompts(texts) if context is None else context.to(self.device, self.unet.conv_in.weight.dtype)
        )
        predict = self._guided(context, negatives, guidance_scale, guidance_rescale, guidance_interval)
        with tqdm(total=len(walk), desc=f"sampling with {sampler}", unit="step", disable=not progress) as bar:

            def predict_and_tick(x_t: Tensor, t: float) -> Tensor:
                bar.update()
                return predict(x_t, t)

            x0 = SAMPLERS[sampler](predict_and_tick, x, self.schedule, walk, noise=draw, callback=callback, eta=eta)

        images = self.decode_latents(x0, tiled=vae_tiling)  # (N, 3, H, W)
        if keep is not None:
            images = torch.where(keep, (pixels / 2 + 0.5).to(images.device), images)
        pictures = to_pictures(images)
        for picture, text, negative, seed in zip(pictures, texts, negatives, seeds, strict=True):
            settings = {"Steps": steps, "Sampler": sampler, "CFG scale": guidance_scale, "Seed": seed}
            settings |= {"Size": f"{width}x{height}", "Model": self.name}
            settings |= {"Denoising strength": strength} if original is not None else {}
            picture.info["parameters"] = format_parameters(text, negative, **settings)
        return pictures

    def _guided(
        self, context: Tensor, negatives: list[str], scale: float, rescale: float, interval: tuple[float, float]
    ) -> Callable[[Tensor, float], Tensor]:
        """The U-Net as the samplers see it: (x_t, t) → prediction, pushed away from the negative prompt."""
        dtype = self.unet.conv_in.weight.dtype
        empty = self.encode_prompts(negatives) if scale != 1 else None

        def ask(x_t: Tensor, t: float, context: Tensor) -> Tensor:
            timesteps = torch.full((len(x_t),), t, dtype=torch.float32, device=x_t.device)
            return self.unet(x_t.to(dtype), timesteps, context).float()

        def predict(x_t: Tensor, t: float) -> Tensor:
            alpha_bar = float(self.schedule.alphas_cumprod[int(t)])
            sigma = math.sqrt((1 - alpha_bar) / max(alpha_bar, 1e-12))
            if empty is None or not interval[0] <= sigma <= interval[1]:
                return ask(x_t, t, context)
            if scale == 0:
                return ask(x_t, t, empty)
            both = ask(torch.cat([x_t, x_t]), t, torch.cat([empty, context]))  # one batch of 2N
            unconditional, conditional = both.chunk(2)
            guided = unconditional + scale * (conditional - unconditional)  # Ho & Salimans 2022, Equation 6, w = s - 1
            if rescale == 0:
                return guided
            # Lin et al. 2024, Equations 14-16: back to the spread of the conditional prediction, by a share φ.
            spread = conditional.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
            return guided * (rescale * spread + 1 - rescale)

        return predict

    def _encode_init_images(
        self, init_images: list[Image.Image], generators: list[torch.Generator], height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Latents (N, 4, h, w) and pixels (N, 3, H, W) of the pictures that img2img and inpainting start from."""
        init_images = _spread(init_images, len(generators), "init_images")
        for i, picture in enumerate(init_images):
            if picture.size != (width, height):
                raise ValueError(
                    f"init_images[{i}] is {picture.width}×{picture.height}, but the picture asked for is {width}×{height}:"
                    " resize it, or pass its own width and height."
                )
        pixels = torch.stack([pixels_of(to_rgb(picture)) for picture in init_images])
        pairs = zip(pixels.split(1), generators, strict=True)
        return torch.cat([self.encode_images(one, generator) for one, generator in pairs]), pixels

    def _read_masks(self, masks: list[Image.Image], n: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Where to keep the original, as pixels (N, 1, H, W) bool; and where to paint, as latents (N, 1, h, w), 0 or 1."""
        masks = _spread(masks, n, "masks")
        for i, mask in enumerate(masks):
            if mask.size != (width, height):
                raise ValueError(f"masks[{i}] is {mask.width}×{mask.height}, but the picture is {width}×{height}.")
        paint = torch.stack([pixels_of(mask.convert("RGB"))[:1] >= 0 for mask in masks]).to(
            self.device
        )  # white = paint
        latent = F.interpolate(paint.float(), size=(height // 8, width // 8))  # nearest, as diffusers does
        return ~paint, latent


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation
# ----------------------------------------------------------------------------------------------------------------------


def slerp(a: Tensor, b: Tensor, share: float) -> Tensor:
    """From noise `a` (share 0) to `b` (share 1) along the sphere, so that what lies between is noise as well.

    Straight lines would pass through tensors with too little variance. Shoemake 1985, Section 3.3.
    """
    angle = torch.acos((F.normalize(a.flatten(), dim=0) * F.normalize(b.flatten(), dim=0)).sum().clamp(-1, 1))
    if angle.sin() < 1e-4:  # (anti)parallel: the line is as good
        return torch.lerp(a, b, share)
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


# ----------------------------------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------------------------------


def _spread(values: object, n: int, name: str) -> list:
    """One value for all pictures, or one each."""
    values = [values] if not isinstance(values, list | tuple) else list(values)
    if len(values) == 1:
        return values * n
    if len(values) != n:
        raise ValueError(f"{name}: {len(values)} given for {n} prompts; pass one for all or one each.")
    return values


def _spread_seeds(seeds: int | Sequence[int], n: int) -> list[int]:
    seeds = [seeds + i for i in range(n)] if isinstance(seeds, int) else list(seeds)
    if len(seeds) != n:
        raise ValueError(f"seeds: {len(seeds)} given for {n} prompts; pass one number, or one each.")
    return seeds


def _check_request(texts: list[str], height: int, width: int, factor: int, scale: float, rescale: float) -> None:
    if not texts:
        raise ValueError("prompts is empty: pass at least one prompt.")
    if height % factor or width % factor or min(height, width) < factor:
        raise ValueError(f"height and width must be positive and divisible by {factor}, not {height} and {width}.")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be a finite number, not {scale}.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"guidance_rescale must lie in [0, 1], not {rescale}.")


def _write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
