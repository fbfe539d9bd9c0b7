"""Trains the U-Net of a latent diffusion model on captioned images; VAE and text encoder stay frozen.

    python train_stable_diffusion.py --preset monsters                 # draws its own data; minutes on two CPU cores
    python train_stable_diffusion.py --dataset FOLDER_OR_HUB_ID        # the `pokemon` preset: from scratch, one GPU
    python train_stable_diffusion.py --preset finetune --dataset …     # from Stable Diffusion 1.5; or `lora`, on 8 GB
    torchrun --nproc_per_node 2 train_stable_diffusion.py …            # the same maths on several GPUs

Papers: DDPM (Ho et al. 2020, Algorithm 1), latent diffusion (Rombach et al. 2022), classifier-free guidance (Ho &
Salimans 2022), evenly spread timesteps (Kingma et al. 2021, Appendix I.1), min-SNR (Hang et al. 2023), zero-terminal
SNR (Lin et al. 2024), LoRA (Hu et al. 2021). All options are in `training/presets.py`. Read here: `draw_batch` →
`diffusion_loss` → `train_step` → the loop in `Run.train`.

Letters in the shape comments:
    N  images in the batch    n  those of one process    h, w  size of the latents    L  text tokens    D  text width
"""

from training.options import answer_early, parse_options
from training.presets import PARTS, PRESETS, check_objective, what_to_do
from training.presets import UNetOptions as Options

if __name__ == "__main__":
    answer_early(Options, PRESETS, "pokemon")  # before the imports below, which take seconds

import contextlib
import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import monsters
from diffusion_model import UNet, UNetConfig
from evaluation.obedience import judge_monsters
from evaluation.timestep_loss import BINS, VALIDATED_AT_ONCE, by_tenths, spread
from images import image_sheet, save_png
from noise_schedule import NoiseSchedule
from pokemon_dataset import load_captioned_images
from published import load_text_encoder, load_vae
from stable_diffusion_model import StableDiffusion, choose_device
from training import low_rank
from training.captioned_latents import CaptionedLatents, prepare, split_images
from training.memory_forecast import forecast_run
from training.optimizers import make_optimizer
from training.reporter import Reporter
from training.reproducible import (
    EMA,
    Processes,
    batch_indices,
    clip_and_step,
    generator_for,
    join_processes,
    learning_rate_at,
    load_optimizer,
    resolve_precision,
    was_restarted,
    without_synchronisation,
)
from training.run_folder import RunFolder, atomically, is_own, load_common_checkpoint
from training.script import UserError, run, user_errors
from vae_model import DiagonalGaussian

# ----------------------------------------------------------------------------------------------------------------------
# Model and data
# ----------------------------------------------------------------------------------------------------------------------


def build_model(options: Options) -> StableDiffusion:
    """The model to train: a pretrained one, or a fresh U-Net between a VAE and a text encoder."""
    name = Path(options.output_dir).name
    with user_errors(hint=what_to_do(options)):
        if options.pretrained:
            model = StableDiffusion.from_pretrained(options.pretrained, device="cpu")
            vae = load_vae(options.vae, "--vae") if options.vae else model.vae
            text_encoder = model.text_encoder
            if options.text_encoder:
                text_encoder = load_text_encoder(options.text_encoder, "--text_encoder")
            check_objective(options, model.schedule)
            return StableDiffusion(text_encoder, model.unet, vae, model.schedule, model.scheduler_config, name)
        parts = PARTS[options.preset]
        text_encoder = load_text_encoder(options.text_encoder or parts["text_encoder"], "--text_encoder")
        vae = load_vae(options.vae or parts["vae"], "--vae")
        config = unet_config(options, vae.config.latent_channels, text_encoder.width)
        schedule = NoiseSchedule(
            prediction_type=options.prediction_type or "epsilon", zero_terminal_snr=options.zero_terminal_snr
        )
        return StableDiffusion(text_encoder, UNet(config), vae, schedule, name=name)


def unet_config(options: Options, latent_channels: int, context_dim: int) -> UNetConfig:
    """The shape of the U-Net that the options ask for, between a VAE and a text encoder."""
    heads = options.num_attention_heads
    return UNetConfig(
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        attention_levels=tuple(bool(a) for a in options.attention_levels),
        num_attention_heads=heads[0] if len(heads) == 1 else tuple(heads),
        context_dim=context_dim,
        norm_num_groups=options.norm_num_groups,
    )


# ----------------------------------------------------------------------------------------------------------------------
# The training step
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one process sees of a step: latents and noise (n, 4, h, w), t (n,), context (n, L, D)."""

    latents: Tensor
    noise: Tensor
    t: Tensor
    context: Tensor

    def split(self, parts: int) -> list["Batch"]:
        columns = (self.latents, self.noise, self.t, self.context)
        return [Batch(*part) for part in zip(*(column.chunk(parts) for column in columns), strict=True)]


def draw_batch(
    data: CaptionedLatents, chosen: Tensor, model: StableDiffusion, options: Options, step: int, processes: Processes
) -> Batch:
    """The images, posterior samples, noise, timesteps and dropped captions of a step: a function of (seed, step).

    All are drawn for the global batch of N, of which each process takes its slice: two processes train what one would.
    """
    device, N = chosen.device, options.batch_size
    generator = generator_for(device, options.seed, "step", step)
    indices = chosen[batch_indices(len(chosen), N, step, options.seed, device)]
    mirrored = (torch.rand(N, generator=generator, device=device) < 0.5) & options.mirror
    dropped = torch.rand(N, generator=generator, device=device) < options.caption_dropout
    t = model.schedule.draw_timesteps(N, generator)

    mine = slice(processes.rank * N // processes.count, (processes.rank + 1) * N // processes.count)
    moments, context = data.gather(indices[mine], mirrored[mine], dropped[mine])  # (n, 8, h, w), (n, L, D)
    posterior = DiagonalGaussian.from_moments(moments)
    shape = (N, *posterior.mean.shape[1:])
    spread = torch.randn(shape, generator=generator, device=device)[mine]
    noise = torch.randn(shape, generator=generator, device=device)[mine]
    if options.noise_offset:  # Guttenberg 2023: lets the mean of an image drift
        shift = torch.randn((N, shape[1], 1, 1), generator=generator, device=device)[mine]
        noise = noise + options.noise_offset * shift
    latents = model.vae.scale_latents(posterior.sample(noise=spread))
    return Batch(latents, noise, t[mine], context)


def diffusion_loss(unet: nn.Module, schedule: NoiseSchedule, batch: Batch, gamma: float | None) -> Tensor:
    """The weighted squared error of the prediction for each image, (n,) (DDPM, Equation 14; min-SNR weights)."""
    x_t = schedule.add_noise(batch.latents, batch.noise, batch.t)
    prediction = unet(x_t, batch.t, batch.context).float()
    error = (prediction - schedule.target(batch.latents, batch.noise, batch.t)).square().mean(dim=(1, 2, 3))  # (n,)
    return schedule.loss_weight(batch.t, gamma) * error


def train_step(
    unet: nn.Module, schedule: NoiseSchedule, batch: Batch, optimizer: torch.optim.Optimizer, options: Options,
    precision: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the optimizer on this process's share of a batch; returns its loss and the gradient norm (0-d).

    The batch may go through in `gradient_accumulation` parts, and is one slice of several processes': all add up to the
    gradient of the mean over the global batch.
    """
    parts, total = options.gradient_accumulation, torch.zeros((), device=batch.t.device)
    for i, part in enumerate(batch.split(parts)):
        with contextlib.nullcontext() if i == parts - 1 else without_synchronisation(unet):
            # No cache: a pass reads each weight once, so that its low-precision copy need not be kept.
            with torch.autocast(batch.t.device.type, precision, precision != torch.float32, cache_enabled=False):
                loss = diffusion_loss(unet, schedule, part, options.min_snr_gamma or None).mean() / parts
            loss.backward()
        total += loss.detach()
    return total, clip_and_step(optimizer, options.gradient_clip)


@torch.no_grad()
def validation_losses(
    unet: nn.Module, data: CaptionedLatents, held_out: Tensor, model: StableDiffusion, reporter: Reporter
) -> list[float]:
    """Unweighted losses on held-out images at fixed noise, in the order of their timesteps, which are evenly spread.

    Chunks go to processes in turn, and are put in one order, so that nothing depends on how many there are.
    Between them a stop is looked for, which all processes heed together (`PostponedError`).
    """
    device, processes = held_out.device, reporter.processes
    which, timesteps = spread(len(held_out), model.schedule.num_timesteps, device)
    losses: dict[int, list[float]] = {}
    chunks = list(zip(held_out[which].split(VALIDATED_AT_ONCE), timesteps.split(VALIDATED_AT_ONCE), strict=True))
    for first in range(0, len(chunks), processes.count):
        reporter.check_stop(together=True)
        if (k := first + processes.rank) >= len(chunks):
            break
        indices, t = chunks[k]
        never = torch.zeros_like(indices, dtype=torch.bool)
        moments, context = data.gather(indices, mirrored=never, drop_caption=never)
        latents = model.vae.scale_latents(DiagonalGaussian.from_moments(moments).mode())
        noise = torch.randn(latents.shape, generator=generator_for(device, "validation", k), device=device)
        losses[k] = diffusion_loss(unet, model.schedule, Batch(latents, noise, t, context), None).tolist()
    merged = {k: values for share in processes.gather(losses) for k, values in share.items()}
    return [value for k in sorted(merged) for value in merged[k]]


# ----------------------------------------------------------------------------------------------------------------------
# A run: the loop, and what is done now and then
# ----------------------------------------------------------------------------------------------------------------------


class Run:
    """Model, data, optimizer and average of one training run, on one of its processes."""

    TENTHS = tuple(f"validation_loss_{i}" for i in range(1, BINS + 1))  # of the timesteps: 1 has the least noise
    VALIDATION = ("validation_loss", *TENTHS)
    COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "skipped_steps", *TENTHS)

    def __init__(self, options: Options, processes: Processes, folder: RunFolder | None) -> None:
        self.options, self.processes, self.folder = options, processes, folder
        device = self.device = processes.device
        self.precision = resolve_precision(options.precision, device)
        # What can be wrong is looked at first: the checkpoint, the data set, the model. Only then anything is written.
        low_rank.check(options)
        state = load_common_checkpoint(Path(options.output_dir), processes) if options.resume else None
        source = (options.dataset, options.split, options.revision, options.caption_column, options.caption)
        images = load_captioned_images(*source, drawn_size=options.resolution)
        built = low_rank.build_model(options, self.precision) if options.lora_rank else (build_model(options), "")
        self.model, self.base = model, _ = built  # `base`: a digest of what a LoRA belongs to
        networks = (model.vae, model.text_encoder)
        how = (self.precision, options.on_bad_image, options.mirror)
        self.data = prepare(images, *networks, options.resolution, processes, *how)
        self.chosen, self.held_out = split_images(len(self.data), options.validation_share, options.seed, device)
        for frozen in (model.vae, model.text_encoder.model):
            frozen.to("cpu")  # idle until the next preview
        model.schedule.to(device)
        self.unet = model.unet.laid_out(device).train()
        self.trained = {name for name, p in self.unet.named_parameters() if p.requires_grad}
        self.unet.gradient_checkpointing = options.gradient_checkpointing
        average_on = "cpu" if options.ema_on_cpu else device
        self.ema = EMA(self.unet, options.ema_decay, average_on) if options.ema_decay else None
        self.optimizer = make_optimizer(options.optimizer, self.unet, options.learning_rate, options.weight_decay)
        model.unet = self.ema.module if self.ema else self.unet  # what is measured, sampled and saved
        duties = {"validation": options.validate_every if len(self.held_out) else 0}
        duties |= {"preview": options.preview_every, "checkpoint": options.checkpoint_every}
        self.reporter = Reporter(options, folder, processes, duties, state, self.data.digest)
        if state is not None:
            self.load(state)
        self.wrapped: nn.Module = torch.compile(self.unet) if options.compile else self.unet
        if processes.count > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.wrapped, device_ids=ids)
        if folder is not None:
            if state is None:
                folder.start(options, self.COLUMNS)
            else:
                undone = list(self.VALIDATION) if "validation" in state["undone"] else []
                folder.resume(options, state["step"], self.COLUMNS, undone)
                self.write_results(state.get("is_best", False))  # a kill may have come before they were written
            self.reporter.start_wandb("stable-diffusion-from-scratch")
            print(self.summary(), flush=True)

    def train(self) -> None:
        options, reporter = self.options, self.reporter
        with reporter.running():
            self.after_step()  # what a stop left undone at the step that a resumed run begins after
            for step in reporter.steps():
                rate = learning_rate_at(step, options.learning_rate, options.warmup_steps, options.max_steps)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                batch = draw_batch(self.data, self.chosen, self.model, options, step, self.processes)
                loss, norm = train_step(
                    self.wrapped, self.model.schedule, batch, self.optimizer, options, self.precision
                )
                if self.ema:
                    self.ema.update(self.unet, step)
                reporter.record(loss=loss, gradient_norm=norm, learning_rate=rate)
                self.after_step()

    def after_step(self) -> None:
        """Validation, preview and checkpoint, each when it is due."""
        score = math.inf
        if self.reporter.due("validation"):
            with self.reporter.interruptible("validation"), self.evaluation_mode():
                losses = validation_losses(self.model.unet, self.data, self.held_out, self.model, self.reporter)
                score = fmean(losses)
                self.reporter.log(validation_loss=score, **dict(zip(self.TENTHS, by_tenths(losses), strict=True)))
                self.reporter.say(f"step {self.reporter.step}: validation loss {score:.4f}")
        if self.reporter.due("preview"):
            with self.reporter.interruptible("preview"):
                if self.folder is not None:
                    self.preview()
        if self.reporter.due("checkpoint"):
            self.save(is_best=self.reporter.is_best(score))

    @contextlib.contextmanager
    def evaluation_mode(self) -> Iterator[None]:
        """Moves the averaged U-Net to the device, in eval mode and under autocast, and back afterwards."""
        unet, home, was_training = self.model.unet, self.model.device, self.model.unet.training
        unet.to(self.device).eval()
        try:
            with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
                yield
        finally:
            unet.to(home).train(was_training)

    def sample(self, prompts: list[str], seed: int = 0, callback: Callable | None = None) -> list[Image.Image]:
        """One image for each prompt, from fixed noise."""
        options, vae = self.options, self.model.vae
        how = {"steps": options.preview_steps, "guidance_scale": options.preview_guidance, "seeds": seed}
        how |= {"height": options.resolution, "width": options.resolution, "progress": False, "callback": callback}
        try:
            vae.to(self.device)
            with self.evaluation_mode():
                return self.model.sample(prompts, **how)
        finally:
            vae.to("cpu")

    def preview(self) -> None:
        """A sheet of samples of fixed prompts, samples/step_*.png, and once more as samples/latest.png."""
        options, folder, step = self.options, self.folder, self.reporter.step
        prompts = self.data.prompts(options.preview_prompts)
        try:
            images = self.sample(prompts, callback=lambda *_: self.reporter.check_stop())
        except (torch.OutOfMemoryError, FloatingPointError) as error:  # a failed preview must not end the run
            self.reporter.say(f"step {step}: no preview ({str(error).splitlines()[0]})")
            return
        file, sheet = folder.path / "samples" / f"step_{step:06d}.png", image_sheet(images, columns=4)
        for path in (file, file.with_name("latest.png")):  # the second to keep open while it trains
            with atomically(path) as temporary:
                save_png(sheet, temporary)
        folder.write_text("samples/prompts.txt", "\n".join(prompts) + "\n")
        self.reporter.log_image("samples", file)

    def save(self, is_best: bool) -> None:
        """A checkpoint, and model/ (of a LoRA: lora/); best_… as well if no validation loss was lower."""
        networks = {"unet": self.unet} | ({"ema": self.ema.module} if self.ema else {})
        state = {name: low_rank.trained_state(network, self.trained) for name, network in networks.items()}
        state |= self.reporter.state() | {"optimizer": self.optimizer.state_dict(), "base": self.base}
        if self.folder is not None:
            self.folder.save_checkpoint(state | {"is_best": is_best}, self.options.keep_checkpoints, is_best)
            self.write_results(is_best)
            part = self.model.schedule.num_timesteps // BINS
            tenths = {name: f"held out, t = {i * part}…{(i + 1) * part - 1}" for i, name in enumerate(self.TENTHS)}
            curves = {"loss": "training (weighted)", "validation_loss": "held out"}
            self.folder.plot(curves, "loss", beside=tenths if len(self.held_out) else None)
        self.reporter.saved()

    def write_results(self, is_best: bool) -> None:
        result = low_rank.result(self.options)
        for name in [result] + [f"best_{result}"] * is_best:
            self.folder.write_folder(name, lambda path: low_rank.write(path, self.model, self.options))

    def load(self, state: dict) -> None:
        """Takes up weights, average and optimizer from a checkpoint; UserError if they are another U-Net's."""
        try:
            if state.get("base", "") != self.base:
                raise ValueError(f"{self.options.pretrained} has other weights than when the run was begun")
            low_rank.load_trained(self.unet, state["unet"], self.trained)
            if self.ema:  # none yet if it was off until now
                low_rank.load_trained(self.ema.module, state.get("ema", state["unet"]), self.trained)
            load_optimizer(self.optimizer, state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"--resume: the checkpoint does not fit this U-Net ({str(error).splitlines()[0]}); start a new run."
            ) from error

    def summary(self) -> str:
        """What is about to happen: the network, the data, the memory it will take."""
        data = self.data, VALIDATED_AT_ONCE * bool(len(self.held_out))
        memory = forecast_run(self.options, self.unet, self.model, *data, self.processes, self.precision)
        return (
            f"U-Net of {sum(p.numel() for p in self.unet.parameters()) / 1e6:.1f} M parameters; {len(self.chosen)} "
            f"images to train on, {len(self.held_out)} held out; {self.processes.count} × {self.device.type}, "
            f"{str(self.precision).removeprefix('torch.')}; results in {self.options.output_dir}\n{memory}"
        )

    def finish(self) -> None:
        """Says how it ended, and what to do next."""
        if not self.reporter.finish() or self.folder is None:
            return
        options, path, side = self.options, self.folder.path, str(self.options.resolution)
        made = ["samples"] * bool(options.preview_every) + ["loss.png", low_rank.result(options)]
        print(f"\nDone: {', '.join(str(path / name) for name in made)}")
        if self.device.type == "cuda":
            print(f"Peak GPU memory: {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB")
        command = ["python", str(Path(__file__).with_name("sample_stable_diffusion.py")), "PROMPT", "--height", side]
        command += ["--width", side, "--guidance_scale", f"{options.preview_guidance:g}"]
        print("Sample from it:", shlex.join([*command, *low_rank.chosen_by(options, path)]))
        if options.final_samples and monsters.is_spec(options.dataset):
            print(judge_monsters(self.sample, options.final_samples, path, options.dataset))


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv, PRESETS, default_preset="pokemon")
    with user_errors():
        processes = join_processes(choose_device(options.device))
    if was_restarted(processes) and processes.any(is_own(Path(options.output_dir))):  # goes on with what it has saved
        options = parse_options(Options, [*argv, "--resume"], PRESETS, default_preset="pokemon")
    if options.batch_size % (processes.count * options.gradient_accumulation):
        raise UserError(
            f"--batch_size {options.batch_size} must be divisible by processes × --gradient_accumulation "
            f"({processes.count} × {options.gradient_accumulation})."
        )
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with RunFolder(options) if processes.is_main else contextlib.nullcontext() as folder:
        training_run = Run(options, processes, folder)
        training_run.train()
        training_run.finish()


if __name__ == "__main__":
    run(main)
