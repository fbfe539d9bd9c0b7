"""Trains the KL-f8 autoencoder: reconstruction + KL, and late, if wanted, a patch discriminator.

Papers: latent diffusion (Rombach et al. 2022, arXiv:2112.10752, Appendix G), VQGAN (Esser et al. 2021,
arXiv:2012.09841, Equation 7: the adaptive weight), PatchGAN (Isola et al. 2017, arXiv:1611.07004), hinge loss (Lim & Ye
2017, arXiv:1705.02894).

    python train_vae.py --dataset monsters:2000 FOLDER --output_dir stable_diffusion_results/my_vae

writes `vae_model.pth` (averaged weights, with the measured scaling factor inside) into the output folder, beside
metrics.csv, loss.png and sheets of reconstructions.
"""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from tqdm import tqdm

from images import image_sheet, pixels_to_images, save_png
from pokemon_dataset import load_captioned_images, load_pixels
from stable_diffusion_model import choose_device
from training import (
    EMA,
    RunFolder,
    StopRequest,
    batch_indices,
    generator_for,
    learning_rate_at,
    parse_options,
    resolve_precision,
    run,
)
from vae_model import VAE, VAEConfig


@dataclass
class Options:
    """Options of train_vae.py. The defaults made `vae_model.pth`, for which they won short trials (one GPU)."""

    dataset: list[str] = field(
        default_factory=lambda: ["monsters:1000"],
        metadata={"help": "one or more of: monsters[:N], a folder of pictures with captions, a hub id"},
    )
    output_dir: str = field(default="stable_diffusion_results/my_vae", metadata={"help": "the run folder"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output_dir"})
    pretrained: str | None = field(default=None, metadata={"help": "start from this VAE: file, folder or hub id"})
    resolution: int = field(default=512, metadata={"help": "pictures are loaded at this size (pixels)"})
    crop: int = field(default=192, metadata={"help": "training sees random crops of this size (pixels)"})
    validation_pictures: int = field(default=40, metadata={"help": "held out, of each data set"})
    blank_weight: float = field(
        default=0.02, metadata={"help": "chance of a blank crop relative to a full one; large numbers: crops anywhere"}
    )
    block_out_channels: list[int] = field(default_factory=lambda: [32, 64, 128, 128])
    layers_per_block: int = 2
    norm_num_groups: int = 8
    max_steps: int = 4000
    batch_size: int = 32
    learning_rate: float = field(default=1e-3, metadata={"help": "at its peak; warmed up, then a cosine to 2 %%"})
    warmup_steps: int = 200
    l1_weight: float = field(default=1.0, metadata={"help": "of the mean absolute error"})
    l2_weight: float = field(default=20.0, metadata={"help": "of the mean squared error, which is what PSNR measures"})
    kl_weight: float = field(default=1e-6, metadata={"help": "of the KL, per pixel value as in LDM"})
    discriminator_start: int = field(default=-1, metadata={"help": "step at which it joins in; -1 = never"})
    discriminator_weight: float = field(default=0.5, metadata={"help": "times the adaptive weight"})
    ema_decay: float = 0.999
    gradient_clip: float = 1.0
    precision: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the network: slow to start, then faster"})
    device: str = field(default="auto", metadata={"help": "auto, cuda, mps or cpu"})
    seed: int = 0
    validate_every: int = 500
    checkpoint_every: int = 1000
    log_every: int = 20
    wandb: str = field(default="auto", metadata={"help": "auto, online, offline or off"})


COLUMNS = ("step", "loss", "l1", "kl", "learning_rate", "psnr", "ssim", "pictures_per_second")

# ----------------------------------------------------------------------------------------------------------------------
# Data: whole pictures as bytes, crops cut on the device
# ----------------------------------------------------------------------------------------------------------------------


def load_pictures(source: str, resolution: int) -> Tensor:
    """All pictures of a source as uint8 (N, 3, R, R) in host memory."""
    cells = load_captioned_images(source)["image"]
    stacked = torch.empty(len(cells), 3, resolution, resolution, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(cells), 32), desc=f"reading {source}", unit="32 pictures"):
            pixels = load_pixels([cells[i] for i in range(start, min(start + 32, len(cells)))], resolution, pool)
            stacked[start : start + 32] = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return stacked


def to_floats(images: Tensor) -> Tensor:
    """uint8 → float in [-1, 1]."""
    return images.float() / 127.5 - 1


class Crops:
    """Random crops, mirrored half the time, drawn in proportion to how much of the crop is not blank."""

    STRIDE = 16  # pixels between candidate positions

    def __init__(self, images: Tensor, size: int, blank_weight: float) -> None:
        if size > images.shape[-1] or size % 8:
            raise ValueError(f"--crop {size}: must be divisible by 8 and at most --resolution {images.shape[-1]}.")
        self.images, self.size = images, size
        weights = []
        for chunk in images.split(64):
            drawn = (chunk.amin(dim=1, keepdim=True) < 245).float()  # (n, 1, R, R): not (nearly) white
            share = F.avg_pool2d(drawn, size, stride=self.STRIDE)  # (n, 1, P, P): of each candidate crop
            weights.append(share.flatten(1) + blank_weight)  # blank ones are rare, not absent: white must stay white
        self.weights = torch.cat(weights)  # (N, P·P)
        self.positions = int(self.weights.shape[1] ** 0.5)

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Crops of the chosen pictures: (n, 3, size, size) in [-1, 1]."""
        device, n = self.images.device, len(indices)
        weights = self.weights[indices]
        # A draw in proportion to the weights: the shortest of waits with these rates. `multinomial` would check its
        # arguments on the host and so let the device run dry at every step.
        waits = torch.empty_like(weights).exponential_(generator=generator) / weights
        place = waits.argmin(dim=1, keepdim=True)  # (n, 1)
        corner = torch.cat([place // self.positions, place % self.positions], dim=1) * self.STRIDE  # (n, 2)
        jitter = torch.randint(self.STRIDE, (n, 2), generator=generator, device=device)
        corner = (corner + jitter).clamp(max=self.images.shape[-1] - self.size)
        span = torch.arange(self.size, device=device)
        rows = (corner[:, 0, None] + span)[:, None, :, None]  # (n, 1, size, 1)
        columns = (corner[:, 1, None] + span)[:, None, None, :]  # (n, 1, 1, size)
        mirrored = torch.rand(n, 1, 1, 1, generator=generator, device=device) < 0.5
        columns = torch.where(mirrored, columns.flip(-1), columns)
        channels = torch.arange(3, device=device)[None, :, None, None]
        return to_floats(self.images[indices[:, None, None, None], channels, rows, columns])


# ----------------------------------------------------------------------------------------------------------------------
# Losses
# ----------------------------------------------------------------------------------------------------------------------


class PatchDiscriminator(nn.Module):
    """Real or made, patch by patch: (N, 3, H, W) → logits (N, 1, H/8, W/8) (Isola et al. 2017)."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for c_in, c_out, stride in ((channels, 2 * channels, 2), (2 * channels, 4 * channels, 2)):
            conv = nn.Conv2d(c_in, c_out, 4, stride=stride, padding=1, bias=False)
            layers += [conv, nn.GroupNorm(32, c_out), nn.LeakyReLU(0.2)]
        layers.append(nn.Conv2d(4 * channels, 1, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)

    def loss(self, real: Tensor, made: Tensor) -> Tensor:
        """Hinge: real patches above 1, made ones below -1."""
        return (F.relu(1 - self(real)).mean() + F.relu(1 + self(made)).mean()) / 2


def reconstruction_loss(reconstruct: nn.Module, images: Tensor, options: Options) -> dict[str, Tensor]:
    """The terms of the negative evidence bound and the pictures: images (N, 3, H, W) → loss, l1, kl, made."""
    made, kl = reconstruct(images)
    l1, l2 = (made - images).abs().mean(), (made - images).square().mean()
    kl = kl.sum() / images.numel()  # per pixel value, so that the weight means the same at every size
    loss = options.l1_weight * l1 + options.l2_weight * l2 + options.kl_weight * kl
    return {"loss": loss, "l1": l1, "kl": kl, "made": made}


class Reconstruct(nn.Module):
    """encode → sample → decode as one forward, which is what gets compiled: (N, 3, H, W) → the same, KL (N,)."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        posterior = self.vae.encode(images)
        return self.vae.decode(posterior.sample()).float(), posterior.kl()


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """How much of the adversarial gradient equals the other one at the decoder's last layer (Esser 2021, Eq. 7)."""
    ours = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    theirs = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (ours / (theirs + 1e-4)).clamp(0, 1e4).detach()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def reconstruct(vae: VAE, images: Tensor) -> Tensor:
    """uint8 pictures (N, 3, H, W) → their reconstructions from the posterior's mean, uint8 on the CPU."""
    device = vae.quant_conv.weight.device
    made = [vae.decode(vae.encode(to_floats(one.to(device))).mode()).cpu() for one in images.split(4)]
    return ((torch.cat(made).float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def measure(vae: VAE, images: Tensor) -> tuple[float, float]:
    """Mean PSNR (dB) and SSIM of the reconstructions of uint8 pictures (N, 3, H, W)."""
    pairs = [(a.numpy(), b.numpy()) for a, b in zip(images.cpu(), reconstruct(vae, images), strict=True)]
    with ThreadPoolExecutor() as pool:
        psnr = list(pool.map(lambda pair: peak_signal_noise_ratio(*pair, data_range=255), pairs))
        ssim = list(pool.map(lambda pair: structural_similarity(*pair, data_range=255, channel_axis=0), pairs))
    return float(np.mean(psnr)), float(np.mean(ssim))


@torch.no_grad()
def measure_scaling_factor(vae: VAE, images: Tensor, generator: torch.Generator) -> float:
    """1/std of posterior samples over whole pictures, so that the U-Net sees unit variance (Rombach 2022, App. G)."""
    device = vae.quant_conv.weight.device
    samples = [vae.encode(to_floats(one.to(device))).sample(generator).flatten() for one in images.split(4)]
    return 1.0 / torch.cat(samples).float().std().item()


def reconstruction_sheet(vae: VAE, images: Tensor, columns: int = 4) -> Image.Image:
    """Originals in odd rows, what the VAE makes of them below each."""
    rows = []
    for chunk in images.split(columns):
        rows += [*(chunk.float().cpu() / 255), *(reconstruct(vae, chunk).float() / 255)]
    return image_sheet(pixels_to_images(torch.stack(rows)), columns)


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class PictureSets:
    """The pictures of all sources on the device, some of each held out; every source is seen equally often."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.held_out: dict[str, Tensor] = {}  # uint8 (n, 3, R, R), in host memory
        self.rows: list[Tensor] = []  # of each source: where its training pictures are in `images`
        training, count, n = [], 0, options.validation_pictures
        for source in options.dataset:
            images = load_pictures(source, options.resolution)
            if len(images) < 2 * n:
                raise ValueError(f"--validation_pictures {n}: {source} has only {len(images)} pictures.")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
            self.held_out[source] = images[order[:n]]
            training.append(images[order[n:]])
            self.rows.append(torch.arange(count, count + len(images) - n, device=device))
            count += len(images) - n
        self.images = torch.cat(training).to(device)  # uint8 (N, 3, R, R)
        self.crops = Crops(self.images, options.crop, options.blank_weight)

    def batch(self, step: int) -> Tensor:
        """The crops of a step, (batch_size, 3, size, size) in [-1, 1]: a function of (seed, step)."""
        sources, seed = len(self.rows), self.options.seed
        shares = [(self.options.batch_size + i) // sources for i in range(sources)]
        parts = [
            rows[batch_indices(len(rows), n, step, seed, self.device)]
            for rows, n in zip(self.rows, shares, strict=True)
            if n
        ]
        crops = self.crops(torch.cat(parts), generator_for(self.device, seed, "crops", step))
        return crops.contiguous(memory_format=torch.channels_last)

    def some(self) -> Tensor:
        """Up to 128 training pictures of each source, uint8, always the same."""
        chosen = [rows[batch_indices(len(rows), min(128, len(rows)), 0, 0, self.device)] for rows in self.rows]
        return self.images[torch.cat(chosen)]


class Training:
    """Networks, optimizers and averages of a run, and the step that moves them."""

    PARTS = ("vae", "ema", "discriminator", "optimizer", "critic")  # what a checkpoint holds

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.precision = resolve_precision(options.precision, device)
        if options.pretrained:
            vae = VAE.load(options.pretrained)
        else:
            shape = ("block_out_channels", "layers_per_block", "norm_num_groups")
            vae = VAE(VAEConfig(**{name: getattr(options, name) for name in shape}))
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self.discriminator = PatchDiscriminator().to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.critic = torch.optim.AdamW(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9))
        self.average = EMA(self.vae, options.ema_decay)
        self.ema = self.average.module
        self.reconstruct: nn.Module = Reconstruct(self.vae)
        if options.compile:
            self.reconstruct = torch.compile(self.reconstruct)

    def state(self) -> dict[str, dict]:
        return {name: getattr(self, name).state_dict() for name in self.PARTS}

    def load_state(self, state: dict) -> None:
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def step(self, real: Tensor, step: int) -> Tensor:
        """One step on crops (N, 3, H, W): returns its loss, L1 and KL as a tensor (3,), still on the device."""
        options = self.options
        self.optimizer.param_groups[0]["lr"] = self.learning_rate(step)
        adversarial = 0 <= options.discriminator_start <= step
        torch.manual_seed(options.seed * 1_000_003 + step)  # of the posterior's noise, drawn inside the forward
        with self.autocast():
            terms = reconstruction_loss(self.reconstruct, real, options)
        loss = terms["loss"]
        if adversarial:
            with self.autocast():
                fooled = -self.discriminator(terms["made"]).float().mean()
            weight = adaptive_weight(loss, fooled, self.vae.decoder.conv_out.weight)
            loss = loss + options.discriminator_weight * weight * fooled
        self._descend(self.optimizer, loss)
        self.average.update(self.vae, step)
        if adversarial:
            with self.autocast():
                critic_loss = self.discriminator.loss(real, terms["made"].detach()).float()
            self._descend(self.critic, critic_loss)
        return torch.stack([terms[name].detach() for name in ("loss", "l1", "kl")])

    def _descend(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.options.gradient_clip)
        optimizer.step()

    def learning_rate(self, step: int) -> float:
        options = self.options
        return learning_rate_at(step, options.learning_rate, options.warmup_steps, options.max_steps, floor=0.02)


def validate(vae: VAE, held_out: dict[str, Tensor], folder: RunFolder, step: int) -> dict[str, float]:
    """Mean PSNR and SSIM over the sources; each one's go to the screen and scores.json, with a sheet of pictures."""
    scores = {source: dict(zip(("psnr", "ssim"), measure(vae, some), strict=True)) for source, some in held_out.items()}
    for source, score in scores.items():
        tqdm.write(f"step {step}: {source}: held-out PSNR {score['psnr']:.2f} dB, SSIM {score['ssim']:.4f}")
    folder.write_text("scores.json", json.dumps({"step": step, "held_out": scores}, indent=2) + "\n")
    file = folder.path / "samples" / f"step_{step:06d}.png"
    save_png(reconstruction_sheet(vae, torch.cat([some[:4] for some in held_out.values()])), file)
    folder.log_picture(step, "reconstructions", file)
    return {name: float(np.mean([score[name] for score in scores.values()])) for name in ("psnr", "ssim")}


def checkpoint(training: Training, sets: PictureSets, folder: RunFolder, step: int) -> None:
    """vae_model.pth with the averaged weights and the measured scaling factor; all that a resumed run needs; plots."""
    generator = generator_for(training.device, training.options.seed, "scaling")
    training.ema.config.scaling_factor = measure_scaling_factor(training.ema, sets.some(), generator)
    training.ema.save(folder.path / "vae_model.pth")
    folder.save_state(training.state() | {"step": step})
    folder.plot({"psnr": "held-out PSNR (dB)"}, "PSNR (dB)", "psnr.png")
    folder.plot({"loss": "training loss"}, "loss", log_scale=True)


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv)
    device = choose_device(options.device)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    training = Training(options, device)
    folder = RunFolder(options.output_dir, options, options.resume, COLUMNS)
    sets = PictureSets(options, device)
    first_step = 0
    if options.resume:
        state = folder.load_state(folder.path, device)
        training.load_state(state)
        first_step = state["step"]
        folder.forget_after(first_step)
    folder.start_wandb(options.wandb, "stable-diffusion-vae", options)
    millions = sum(p.numel() for p in training.vae.parameters()) / 1e6
    print(
        f"{millions:.1f} M parameters, {len(sets.images)} pictures, {device.type}, "
        f"{str(training.precision).removeprefix('torch.')}; results in {folder.path}"
    )

    stop = StopRequest()
    progress = tqdm(total=options.max_steps, initial=first_step, unit="step")
    recent: list[Tensor] = []
    step = first_step
    while step < options.max_steps and not stop.asked:
        recent.append(training.step(sets.batch(step), step))
        step += 1
        progress.update()

        is_last = step == options.max_steps or stop.asked
        if is_last or step % options.log_every == 0:
            loss, l1, kl = torch.stack(recent).mean(dim=0).tolist()
            recent.clear()
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"step {step}: the loss is {loss}; go on from the last checkpoint with --resume and a lower "
                    "--learning_rate."
                )
            progress.set_postfix(loss=f"{loss:.4f}", l1=f"{l1:.4f}")
            speed = (progress.format_dict["rate"] or 0) * options.batch_size
            rate = training.learning_rate(step - 1)
            folder.log(step, loss=loss, l1=l1, kl=kl, learning_rate=rate, pictures_per_second=speed)
        if is_last or step % options.validate_every == 0:
            folder.log(step, **validate(training.ema, sets.held_out, folder, step))
        if is_last or step % options.checkpoint_every == 0:
            checkpoint(training, sets, folder, step)
    progress.close()
    folder.close()
    print(f"Wrote {folder.path / 'vae_model.pth'}; use it with --vae {folder.path / 'vae_model.pth'}")


if __name__ == "__main__":
    run(main)
