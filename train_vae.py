"""Trains the KL-f8 autoencoder: reconstruction + KL, and late, if wanted, a patch discriminator.

Papers: latent diffusion (Rombach et al. 2022, arXiv:2112.10752, Appendix G), VQGAN (Esser et al. 2021,
arXiv:2012.09841, Equation 7: the adaptive weight), PatchGAN (Isola et al. 2017, arXiv:1611.07004), hinge loss (Lim & Ye
2017, arXiv:1705.02894).

    python train_vae.py --dataset monsters:2000 FOLDER --output_dir stable_diffusion_results/my_vae

writes `vae_model.pth` (averaged weights, latents of mean 0 and variance 1) into the output folder, beside
metrics.csv, loss.png and sheets of reconstructions. All options are in `training/presets.py`.
"""

from training.options import answer_early, parse_options
from training.presets import VAEOptions as Options

if __name__ == "__main__":
    answer_early(Options)  # before the imports below, which take seconds

import contextlib
import copy
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from images import save_png
from pokemon_dataset import load_images
from published import load_vae
from stable_diffusion_model import choose_device
from training.reconstruction import measure, reconstruction_sheet, to_floats
from training.reporter import Reporter
from training.reproducible import (
    EMA,
    Processes,
    batch_indices,
    clip_and_step,
    digest_of,
    generator_for,
    learning_rate_at,
    load_optimizer,
    resolve_precision,
)
from training.run_folder import RunFolder, atomically, load_checkpoint
from training.script import UserError, run, user_errors
from vae_model import VAE, VAEConfig

COLUMNS = ("step", "loss", "l1", "kl", "gradient_norm", "learning_rate", "psnr", "ssim", "skipped_steps")

# ----------------------------------------------------------------------------------------------------------------------
# Data: whole images as bytes, crops cut on the device
# ----------------------------------------------------------------------------------------------------------------------


class Crops:
    """Random crops, mirrored half the time, drawn in proportion to how much of the crop is not blank."""

    STRIDE = 16  # pixels between candidate positions

    def __init__(self, images: Tensor, size: int, blank_weight: float) -> None:
        if size > images.shape[-1] or size % 8:
            raise UserError(f"--crop {size}: must be divisible by 8 and at most --resolution {images.shape[-1]}.")
        self.images, self.size = images, size
        weights = []
        for chunk in images.split(64):
            drawn = (chunk.amin(dim=1, keepdim=True) < 245).float()  # (n, 1, R, R): not (nearly) white
            share = F.avg_pool2d(drawn, size, stride=self.STRIDE)  # (n, 1, P, P): of each candidate crop
            weights.append(share.flatten(1) + blank_weight)  # blank ones are rare, not absent: white must stay white
        self.weights = torch.cat(weights)  # (N, P·P)
        self.positions = int(self.weights.shape[1] ** 0.5)

    def __call__(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Crops of the chosen images: (n, 3, size, size) in [-1, 1]."""
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
    """Images (N, 3, H, W) → a dict: the total loss, L1, KL, and the reconstruction `made`.

    Kingma & Welling 2014, Equation 10, with L1 and L2 as the likelihood; a small weight of the KL as in Rombach et al.
    2022, Section 3.1.
    """
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
    reconstruction_gradient = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)[0].norm()
    adversarial_gradient = torch.autograd.grad(adversarial, last_layer, retain_graph=True)[0].norm()
    return (reconstruction_gradient / (adversarial_gradient + 1e-4)).clamp(0, 1e4).detach()


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def standardised(vae: VAE, images: Tensor, generator: torch.Generator) -> VAE:
    """A copy whose latents of these whole images, uint8 (N, 3, R, R), have mean 0 in each channel and variance 1.

    The scaling factor stays Stable Diffusion's, which many tools take for granted (Rombach et al. 2022, Appendix G, has
    the scale; the mean is our addition): `VAE.standardise_latents` changes the weights instead.
    """
    device = vae.quant_conv.weight.device
    samples = [vae.encode(to_floats(one.to(device))).sample(generator) for one in images.split(4)]
    latents = torch.cat(samples).float().transpose(0, 1).flatten(1)  # (4, N·h·w)
    mean = latents.mean(dim=1)
    copied = copy.deepcopy(vae)
    copied.standardise_latents(mean, (latents - mean[:, None]).std().item())
    return copied


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


class ImageSets:
    """The images of all sources on the device, some of each held out; every source is seen equally often."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.device = options, device
        self.held_out: dict[str, Tensor] = {}  # uint8 (n, 3, R, R), in host memory
        self.rows: list[Tensor] = []  # of each source: where its training images are in `images`
        training, count, n = [], 0, options.validation_images
        for source in options.dataset:
            images, _ = load_images(source, options.resolution, options.on_bad_image)
            if len(images) < 2 * n:
                raise UserError(f"--validation_images {n}: {source} has only {len(images)} images.")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed))
            self.held_out[source] = images[order[:n]]
            training.append(images[order[n:]])
            self.rows.append(torch.arange(count, count + len(images) - n, device=device))
            count += len(images) - n
        self.digest = digest_of([*self.held_out.values(), *training])
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

    def standardising_sample(self) -> Tensor:
        """Up to 128 training images of each source, uint8, always the same."""
        chosen = [rows[batch_indices(len(rows), min(128, len(rows)), 0, 0, self.device)] for rows in self.rows]
        return self.images[torch.cat(chosen)]


class Run:
    """Networks, optimizers, averages and data of one training run, and the step that moves them."""

    PARTS = ("vae", "ema", "discriminator", "optimizer", "critic")  # what a checkpoint holds

    def __init__(self, options: Options, folder: RunFolder) -> None:
        self.options, self.folder = options, folder
        with user_errors():
            device = self.device = choose_device(options.device)
            if options.pretrained:
                vae = load_vae(options.pretrained, "--pretrained")
            else:
                shape = ("block_out_channels", "layers_per_block", "norm_num_groups")
                vae = VAE(VAEConfig(**{name: getattr(options, name) for name in shape}))
        self.precision = resolve_precision(options.precision, device)
        state = load_checkpoint(folder.path, device) if options.resume else None
        self.sets = ImageSets(options, device)
        self.vae = vae.to(device, memory_format=torch.channels_last).train()
        self.discriminator = PatchDiscriminator().to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        self.critic = torch.optim.AdamW(self.discriminator.parameters(), lr=2e-4, betas=(0.5, 0.9), fused=True)
        self.average = EMA(self.vae, options.ema_decay)
        self.ema = self.average.module
        self.reconstruct: nn.Module = Reconstruct(self.vae)
        if options.compile:
            self.reconstruct = torch.compile(self.reconstruct)

        duties = {"validation": options.validate_every, "checkpoint": options.checkpoint_every}
        self.reporter = Reporter(options, folder, Processes(0, 1, device), duties, state, self.sets.digest)
        if state is None:
            folder.start(options, COLUMNS)
        else:
            for name in self.PARTS:
                part = getattr(self, name)
                is_optimizer = isinstance(part, torch.optim.Optimizer)
                load_optimizer(part, state[name]) if is_optimizer else part.load_state_dict(state[name])
            folder.resume(options, state["step"], COLUMNS, ["psnr"] if "validation" in state["undone"] else [])
            self.write_results()  # a kill may have come before they were written
        self.reporter.start_wandb("stable-diffusion-vae")
        print(
            f"{sum(p.numel() for p in self.vae.parameters()) / 1e6:.1f} M parameters, {len(self.sets.images)} images, "
            f"{device.type}, {str(self.precision).removeprefix('torch.')}; results in {folder.path}"
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32)

    def train_step(self, real: Tensor, step: int) -> dict[str, Tensor]:
        """One step on crops (N, 3, H, W): returns its loss, L1, KL and gradient norm, 0-d tensors on the device."""
        options = self.options
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
        loss.backward()
        norm = clip_and_step(self.optimizer, options.gradient_clip)
        self.average.update(self.vae, step)
        if adversarial:
            self.critic.zero_grad(set_to_none=True)  # of the gradients that came through it to the VAE
            with self.autocast():
                critic_loss = self.discriminator.loss(real, terms["made"].detach()).float()
            critic_loss.backward()
            clip_and_step(self.critic, options.gradient_clip)
        return {name: terms[name] for name in ("loss", "l1", "kl")} | {"gradient_norm": norm}

    def train(self) -> None:
        options, reporter = self.options, self.reporter
        with reporter.running():
            self.after_step()  # what a stop left undone at the step that a resumed run begins after
            for step in reporter.steps():
                rate = learning_rate_at(
                    step, options.learning_rate, options.warmup_steps, options.max_steps, floor=0.02
                )
                self.optimizer.param_groups[0]["lr"] = rate
                reporter.record(learning_rate=rate, **self.train_step(self.sets.batch(step), step))
                self.after_step()

    def after_step(self) -> None:
        """Validation and checkpoint, each when it is due."""
        score = math.inf
        if self.reporter.due("validation"):
            with self.reporter.interruptible("validation"):
                scores = self.validate()
                self.reporter.log(**scores)
                score = -scores["psnr"]
        if self.reporter.due("checkpoint"):
            self.save(is_best=self.reporter.is_best(score))

    def validate(self) -> dict[str, float]:
        """Mean PSNR and SSIM over the sources; each one's go to the screen and scores.json, with a sheet of images."""
        step, held_out = self.reporter.step, self.sets.held_out
        scores = {}
        for source, images in held_out.items():
            self.reporter.check_stop()
            scores[source] = dict(zip(("psnr", "ssim"), measure(self.ema, images), strict=True))
        for source, score in scores.items():
            self.reporter.say(f"step {step}: {source}: held-out PSNR {score['psnr']:.2f} dB, SSIM {score['ssim']:.4f}")
        self.folder.write_text("scores.json", json.dumps({"step": step, "held_out": scores}, indent=2) + "\n")
        file = self.folder.path / "samples" / f"step_{step:06d}.png"
        with atomically(file) as temporary:
            save_png(reconstruction_sheet(self.ema, torch.cat([i[:4] for i in held_out.values()])), temporary)
        self.reporter.log_image("reconstructions", file)
        return {name: float(np.mean([score[name] for score in scores.values()])) for name in ("psnr", "ssim")}

    def save(self, is_best: bool) -> None:
        """A checkpoint; vae_model.pth with the averaged weights and standardised latents; plots."""
        folder = self.folder
        state = self.reporter.state() | {name: getattr(self, name).state_dict() for name in self.PARTS}
        folder.save_checkpoint(state, self.options.keep_checkpoints, is_best)
        self.write_results()
        folder.plot({"psnr": "held-out PSNR (dB)"}, "PSNR (dB)", "psnr.png")
        folder.plot({"loss": "training loss"}, "loss", log_scale=True)
        self.reporter.saved()

    def write_results(self) -> None:
        generator = generator_for(self.device, self.options.seed, "standardise")
        vae = standardised(self.ema, self.sets.standardising_sample(), generator)
        with atomically(self.folder.path / "vae_model.pth") as temporary:
            vae.save(temporary)


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with RunFolder(options) as folder:
        training_run = Run(options, folder)
        training_run.train()
        if training_run.reporter.finish():
            print(f"Wrote {folder.path / 'vae_model.pth'}; use it with --vae {folder.path / 'vae_model.pth'}")


if __name__ == "__main__":
    run(main)
