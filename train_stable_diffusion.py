"""Trains the U-Net of a latent diffusion model on captioned pictures; VAE and text encoder stay frozen.

    python train_stable_diffusion.py --preset monsters                 # draws its own data; minutes on two CPU cores
    python train_stable_diffusion.py --dataset FOLDER_OR_HUB_ID        # the `pokemon` preset: from scratch, one GPU
    python train_stable_diffusion.py --preset finetune --dataset …     # from Stable Diffusion 1.5's own weights
    torchrun --nproc_per_node 2 train_stable_diffusion.py …            # the same maths on several GPUs

Papers: DDPM (Ho et al. 2020, Algorithm 1), latent diffusion (Rombach et al. 2022), classifier-free guidance (Ho &
Salimans 2022), min-SNR (Hang et al. 2023), zero-terminal SNR (Lin et al. 2024). Everything random is a function of
(seed, step) over the global batch, so a run that was stopped and resumed ends with the weights of one that was not.
"""

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from images import image_sheet, save_png
from diffusion_model import NoiseSchedule, UNet, UNetConfig
from memory_forecast import forecast
from pokemon_dataset import DEFAULT_DATASET, CaptionedLatents, load_captioned_images, prepare
from stable_diffusion_model import LATENTS_MEAN, StableDiffusion, choose_device
from text_encoder import TextEncoder
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
from training.reproducible import Processes, join_processes
from vae_model import VAE, DiagonalGaussian

# ----------------------------------------------------------------------------------------------------------------------
# Options and presets
# ----------------------------------------------------------------------------------------------------------------------


def _option(default: Any, help: str) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """Options of train_stable_diffusion.py; a preset sets some of them."""

    # What it learns from
    preset: str = _option("pokemon", "monsters, pokemon or finetune")
    dataset: str = _option(DEFAULT_DATASET, "hub id, folder of captioned pictures, monsters or monsters:N")
    split: str = _option("train", "split of the data set")
    revision: str | None = _option(None, "revision of a data set on the hub")
    caption_column: str | None = _option(
        None, "column with the captions; default: text, en_text or caption. CLIP reads English"
    )
    resolution: int = _option(512, "side of the pictures in pixels, divisible by 8")
    validation_share: float = _option(0.05, "share of the pictures held out to measure the validation loss")
    # What it starts from
    vae: str | None = _option(None, "VAE: file, folder or hub id; default: the preset's, or --pretrained's own")
    text_encoder: str | None = _option(None, "CLIP: folder or hub id; default: the preset's, or --pretrained's own")
    pretrained: str | None = _option(None, "start from this whole model: folder, hub id or single file")
    output_dir: str = _option("stable_diffusion_results/pokemon", "the run folder")
    resume: bool = _option(False, "go on with the run in --output_dir")
    seed: int = _option(0, "of everything random")
    # The U-Net, if it starts from scratch; one value per resolution, finest first
    block_out_channels: list[int] = _option([128, 256, 384, 512], "channels")
    attention_levels: list[int] = _option([0, 1, 1, 1], "1 where the level attends to the text")
    num_attention_heads: list[int] = _option([8], "one number, or one per level")
    layers_per_block: int = _option(2, "residual blocks per level")
    norm_num_groups: int = _option(32, "groups of the group norms")
    # The objective
    prediction_type: str | None = _option(None, "epsilon or v_prediction; default: --pretrained's own, else epsilon")
    zero_terminal_snr: bool = _option(False, "end the schedule in pure noise; needs v_prediction")
    min_snr_gamma: float = _option(5.0, "gamma of the min-SNR weighting; 0 = unweighted")
    noise_offset: float = _option(
        0.0, "strength of a noise shared by a whole channel, for dark and bright pictures; 0 = off"
    )
    caption_dropout: float = _option(0.1, "share of captions replaced by the empty one, which guidance needs")
    # Optimisation
    max_steps: int = _option(15_000, "training steps in all")
    batch_size: int = _option(32, "pictures per step, over all processes and accumulation")
    gradient_accumulation: int = _option(1, "parts in which a process works through its share of a step")
    learning_rate: float = _option(2e-4, "at its peak, after the warm-up; then a cosine down to 0")
    warmup_steps: int = _option(500, "steps of linear warm-up")
    weight_decay: float = _option(0.01, "of AdamW")
    gradient_clip: float = _option(1.0, "largest gradient norm")
    ema_decay: float = _option(
        0.9995, "of the averaged weights that are saved and sampled; 0 = no average, saves memory"
    )
    ema_on_cpu: bool = _option(False, "keep the average in the CPU's memory: less on the GPU, slower steps")
    precision: str = _option("auto", "auto, float32 or bfloat16")
    gradient_checkpointing: bool = _option(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    compile: bool = _option(False, "torch.compile the U-Net: slow to start, then faster")
    device: str = _option("auto", "auto, cuda, mps or cpu")
    # What it tells
    log_every: int = _option(20, "steps between rows of metrics.csv")
    validate_every: int = _option(500, "steps between validation losses; 0 = never")
    preview_every: int = _option(1000, "steps between sheets of samples; 0 = only at the end")
    checkpoint_every: int = _option(1000, "steps between checkpoints; 0 = only at the end")
    preview_prompts: list[str] = _option([], "prompts of the previews; default: captions of the data set")
    preview_steps: int = _option(25, "sampling steps of the previews")
    preview_guidance: float = _option(3.0, "guidance scale of the previews")
    save_precision: str = _option("float32", "of the weights in OUTPUT_DIR/model: float32, bfloat16 or float16")
    wandb: str = _option("auto", "auto (online if logged in), online, offline or off")


PRESETS: dict[str, dict] = {
    # The quickstart: everything is drawn, small and cheap. Two CPU cores, minutes, no download, no account.
    "monsters": {
        "dataset": "monsters:160",
        "resolution": 256,
        "output_dir": "stable_diffusion_results/my_monsters",
        "block_out_channels": [32, 64, 128, 256],
        "attention_levels": [0, 1, 1, 1],
        "num_attention_heads": [4],
        "layers_per_block": 1,
        "max_steps": 500,
        "batch_size": 8,
        "learning_rate": 6e-4,
        "warmup_steps": 50,
        "ema_decay": 0.99,
        "validate_every": 100,
        "preview_every": 250,
        "checkpoint_every": 250,
        "preview_steps": 15,
        "log_every": 10,
        "wandb": "off",
    },
    # From scratch on some hundred captioned pictures, with the published VAE and CLIP.
    "pokemon": {},
    # From the weights of Stable Diffusion 1.5: small steps, little memory.
    "finetune": {
        "pretrained": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "output_dir": "stable_diffusion_results/finetune",
        "max_steps": 3000,
        "batch_size": 4,
        "gradient_accumulation": 4,
        "learning_rate": 1e-5,
        "warmup_steps": 100,
        "ema_decay": 0.0,
        "gradient_checkpointing": True,
        "preview_guidance": 7.5,
        "save_precision": "float16",
    },
}
_HERE = Path(__file__).parent
_SHIPPED = {"vae": str(_HERE / "vae_model.pth"), "text_encoder": str(_HERE / "stable_diffusion_results" / "clip")}
_PUBLISHED = {"vae": "stabilityai/sd-vae-ft-mse", "text_encoder": "openai/clip-vit-large-patch14"}
PARTS = {"monsters": _SHIPPED, "pokemon": _PUBLISHED, "finetune": _PUBLISHED}  # where no --pretrained brings them


# ----------------------------------------------------------------------------------------------------------------------
# Model and data
# ----------------------------------------------------------------------------------------------------------------------


def build_model(options: Options) -> StableDiffusion:
    """The model to train: a pretrained one, or a fresh U-Net between a VAE and a text encoder."""
    name = Path(options.output_dir).name
    if options.pretrained:
        model = StableDiffusion.from_pretrained(options.pretrained, device="cpu")
        vae = VAE.load(options.vae) if options.vae else model.vae
        text_encoder = (
            TextEncoder.load(options.text_encoder, "--text_encoder") if options.text_encoder else model.text_encoder
        )
        _check_objective(options, model.schedule)
        return StableDiffusion(text_encoder, model.unet, vae, model.schedule, model.scheduler_config, name)
    parts = PARTS[options.preset]
    text_encoder = TextEncoder.load(options.text_encoder or parts["text_encoder"], "--text_encoder")
    vae = VAE.load(options.vae or parts["vae"])
    schedule = NoiseSchedule(
        prediction_type=options.prediction_type or "epsilon", zero_terminal_snr=options.zero_terminal_snr
    )
    heads = options.num_attention_heads
    config = UNetConfig(
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(options.block_out_channels),
        layers_per_block=options.layers_per_block,
        attention_levels=tuple(bool(a) for a in options.attention_levels),
        num_attention_heads=heads[0] if len(heads) == 1 else tuple(heads),
        context_dim=text_encoder.width,
        norm_num_groups=options.norm_num_groups,
    )
    return StableDiffusion(text_encoder, UNet(config), vae, schedule, name=name)


def _check_objective(options: Options, schedule: NoiseSchedule) -> None:
    """A pretrained U-Net goes on predicting what it has learned to predict; asked for something else, say so."""
    if options.prediction_type not in (None, schedule.prediction_type):
        raise ValueError(
            f"--prediction_type {options.prediction_type}: {options.pretrained} predicts {schedule.prediction_type}, "
            "which it goes on doing; leave the option out."
        )
    if options.zero_terminal_snr and not schedule.zero_terminal_snr:
        raise ValueError(
            f"--zero_terminal_snr: the schedule of {options.pretrained} ends before pure noise; leave the option out."
        )


def load_data(
    options: Options, model: StableDiffusion, processes: Processes, precision: torch.dtype
) -> CaptionedLatents:
    """Images and captions, encoded by all processes together."""
    found = load_captioned_images(options.dataset, options.split, options.revision, options.caption_column)
    return prepare(found, model.vae, model.text_encoder, options.resolution, processes, precision)


def split_pictures(count: int, share: float, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the pictures to train on and of those held out; the same in every run with this seed."""
    held_out = math.ceil(count * share) if share > 0 else 0
    if not 0 <= share < 1 or held_out >= count:
        raise ValueError(
            f"--validation_share {share}: of {count} pictures, {count - held_out} would be left to train on."
        )
    order = torch.randperm(count, generator=generator_for(torch.device("cpu"), seed, "split")).to(device)
    return order[held_out:], order[:held_out]


# ----------------------------------------------------------------------------------------------------------------------
# The training step
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """What one process sees of a step: latents, noise and context are (n, …), t is (n,)."""

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
    """The pictures, posterior samples, noise, timesteps and dropped captions of a step: a function of (seed, step).

    All are drawn for the global batch, of which each process takes its slice: two processes train what one would.
    """
    device, n = chosen.device, options.batch_size
    generator = generator_for(device, options.seed, "step", step)
    indices = chosen[batch_indices(len(chosen), n, step, options.seed, device)]
    mirrored = torch.rand(n, generator=generator, device=device) < 0.5
    dropped = torch.rand(n, generator=generator, device=device) < options.caption_dropout
    t = torch.randint(model.schedule.num_timesteps, (n,), generator=generator, device=device)

    mine = slice(processes.rank * n // processes.count, (processes.rank + 1) * n // processes.count)
    moments, context = data.gather(indices[mine], mirrored[mine], dropped[mine])
    posterior = DiagonalGaussian.from_moments(moments)
    shape = (n, *posterior.mean.shape[1:])
    spread = torch.randn(shape, generator=generator, device=device)[mine]
    noise = torch.randn(shape, generator=generator, device=device)[mine]
    if options.noise_offset:  # Guttenberg 2023: lets the mean of a picture drift
        noise = (
            noise + options.noise_offset * torch.randn((n, shape[1], 1, 1), generator=generator, device=device)[mine]
        )
    latents = (posterior.mean + torch.exp(0.5 * posterior.logvar) * spread) * model.vae.config.scaling_factor
    return Batch(latents, noise, t[mine], context)


def diffusion_loss(unet: nn.Module, schedule: NoiseSchedule, batch: Batch, gamma: float | None) -> Tensor:
    """Mean over the pictures of the weighted squared error of the prediction (DDPM, Equation 14; min-SNR weights)."""
    x_t = schedule.add_noise(batch.latents, batch.noise, batch.t)
    prediction = unet(x_t, batch.t, batch.context).float()
    error = (prediction - schedule.target(batch.latents, batch.noise, batch.t)).square().mean(dim=(1, 2, 3))  # (n,)
    return (schedule.loss_weight(batch.t, gamma) * error).mean()


@torch.no_grad()
def validation_loss(
    unet: nn.Module, data: CaptionedLatents, held_out: Tensor, model: StableDiffusion, options: Options
) -> float:
    """Unweighted loss on held-out pictures at fixed noise and evenly spread timesteps: numbers that can be compared."""
    schedule, device, total, count = model.schedule, held_out.device, 0.0, 0
    for i, indices in enumerate(held_out.split(8)):
        generator = generator_for(device, 0, "validation", i)
        moments, context = data.gather(
            indices, torch.zeros_like(indices, dtype=torch.bool), torch.zeros_like(indices) > 0
        )
        latents = moments[:, : moments.shape[1] // 2] * model.vae.config.scaling_factor  # the posterior's mean
        for quarter in range(4):
            noise = torch.randn(latents.shape, generator=generator, device=device)
            places = (torch.arange(len(indices), device=device) + 8 * i) % 8 * 4 + quarter  # 0…31
            t = ((places + 0.5) / 32 * schedule.num_timesteps).long()
            loss = diffusion_loss(unet, schedule, Batch(latents, noise, t, context), None)
            total, count = total + loss.item() * len(indices), count + len(indices)
    return total / count


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv, PRESETS, default_preset="pokemon")
    processes = join_processes(choose_device(options.device))
    device, is_main = processes.device, processes.is_main
    precision = resolve_precision(options.precision, device)
    if options.gradient_accumulation < 1 or options.batch_size % (processes.count * options.gradient_accumulation):
        raise ValueError(
            f"--batch_size {options.batch_size} must be divisible by processes × --gradient_accumulation "
            f"({processes.count} × {options.gradient_accumulation})."
        )
    if options.save_precision not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--save_precision {options.save_precision}: choose float32, bfloat16 or float16.")
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    model = build_model(options)
    folder = RunFolder(options.output_dir, options, options.resume) if is_main else None
    data = load_data(options, model, processes, precision)
    if not options.pretrained:  # a pretrained U-Net goes on from the start it knows
        model.scheduler_config[LATENTS_MEAN] = data.mean(model.vae.config.scaling_factor)
    chosen, held_out = split_pictures(len(data), options.validation_share, options.seed, device)
    for frozen in (model.vae, model.text_encoder.model):
        frozen.to("cpu")  # idle until the next preview
    model.schedule.to(device)

    unet = model.unet.to(device, memory_format=torch.channels_last).train()
    unet.gradient_checkpointing = options.gradient_checkpointing
    ema = EMA(unet, options.ema_decay, "cpu" if options.ema_on_cpu else device) if options.ema_decay else None
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay, fused=device.type != "mps"
    )
    model.unet = ema.module if ema else unet  # what is measured, sampled and saved
    first_step = 0
    if options.resume:
        state = RunFolder.load_state(Path(options.output_dir), device)
        unet.load_state_dict(state["unet"])
        if ema:
            ema.module.load_state_dict(state.get("ema", state["unet"]))  # none yet if it was off until now
        optimizer.load_state_dict(state["optimizer"])
        first_step = state["step"]
        del state  # as large as all that was just filled from it
    wrapped: nn.Module = unet
    if options.compile:
        wrapped = torch.compile(wrapped)
    if processes.count > 1:
        wrapped = DistributedDataParallel(wrapped, device_ids=[device.index] if device.type == "cuda" else None)
    if is_main:
        if options.resume:
            folder.forget_after(first_step)
        folder.start_wandb(options.wandb, "stable-diffusion-from-scratch", options)
        _say_hello(options, model, data, chosen, held_out, processes, precision)

    reporter = Reporter(options, model, data, held_out, folder, precision, device, first_step) if is_main else None
    gamma = options.min_snr_gamma or None
    stop = StopRequest()
    progress = tqdm(total=options.max_steps, initial=first_step, unit="step", disable=not is_main, smoothing=0.05)
    losses: list[Tensor] = []
    step = first_step
    while step < options.max_steps and not stop.asked:
        # One step: draw, predict, descend, average.
        rate = learning_rate_at(step, options.learning_rate, options.warmup_steps, options.max_steps)
        optimizer.param_groups[0]["lr"] = rate
        parts = draw_batch(data, chosen, model, options, step, processes).split(options.gradient_accumulation)
        for i, part in enumerate(parts):
            synchronise = processes.count == 1 or i == len(parts) - 1  # DDP adds up gradients once a step
            with contextlib.nullcontext() if synchronise else wrapped.no_sync():
                # No cache: a pass reads each weight once, so that its low-precision copy need not be kept.
                with torch.autocast(device.type, precision, precision != torch.float32, cache_enabled=False):
                    loss = diffusion_loss(wrapped, model.schedule, part, gamma) / len(parts)
                loss.backward()
            losses.append(loss.detach())
        norm = nn.utils.clip_grad_norm_(unet.parameters(), options.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(unet, step)
        step += 1
        progress.update()

        # What it tells, now and then; the device is waited for only here.
        is_last = step == options.max_steps or stop.asked
        if is_last or step % options.log_every == 0:
            mean = processes.mean(torch.stack(losses).sum() / len(losses) * len(parts)).item()
            losses.clear()
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"step {step}: the loss is {mean}; the last checkpoint is untouched: --resume from it with a lower "
                    "--learning_rate, or --precision float32."
                )
            if is_main:
                reporter.log(step, progress, loss=mean, learning_rate=rate, gradient_norm=norm.item())
        if is_main:
            reporter.after_step(step, is_last, unet, ema, optimizer)
    progress.close()
    if is_main:
        reporter.finish(step)


# ----------------------------------------------------------------------------------------------------------------------
# What it tells
# ----------------------------------------------------------------------------------------------------------------------


class Reporter:
    """Metrics, validation, previews and checkpoints of a run, kept out of the loop."""

    def __init__(
        self,
        options: Options,
        model: StableDiffusion,
        data: CaptionedLatents,
        held_out: Tensor,
        folder: RunFolder,
        precision: torch.dtype,
        device: torch.device,
        first_step: int,
    ) -> None:
        self.options, self.model, self.data, self.held_out, self.folder = options, model, data, held_out, folder
        self.device, self.precision = device, precision
        captions = data.captions[1:] or [""]
        evenly = [captions[i * len(captions) // 8] for i in range(min(8, len(captions)))]
        self.prompts = options.preview_prompts or evenly
        self.timed_step, self.timed_at = first_step, time.perf_counter()  # pictures/s leave out what is done here

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The U-Net that is judged, on the device and under autocast; then back to where its average is kept."""
        unet, home, was_training = self.model.unet, self.model.device, self.model.unet.training
        unet.to(self.device).eval()
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            yield
        unet.to(home).train(was_training)

    def log(self, step: int, progress: tqdm, **values: float) -> None:
        speed = (step - self.timed_step) * self.options.batch_size / (time.perf_counter() - self.timed_at)
        self.timed_step, self.timed_at = step, time.perf_counter()
        progress.set_postfix_str(f"loss {values['loss']:.4f}, {speed:.1f} pictures/s")
        self.folder.log(step, pictures_per_second=speed, **values)

    def after_step(
        self, step: int, is_last: bool, unet: UNet, ema: EMA | None, optimizer: torch.optim.Optimizer
    ) -> None:
        due = {name: is_last or (every and step % every == 0) for name, every in self._intervals().items()}
        if due["validate"] and len(self.held_out) and self.options.validate_every:
            with self.at_work():
                loss = validation_loss(self.model.unet, self.data, self.held_out, self.model, self.options)
            self.folder.log(step, validation_loss=loss)
            tqdm.write(f"step {step}: validation loss {loss:.4f}")
        if due["checkpoint"]:
            state = {"unet": unet.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            self.folder.save_state(state | ({"ema": ema.module.state_dict()} if ema else {}))
            dtype = getattr(torch, self.options.save_precision)
            self.folder.replace_folder("model", lambda path: self.model.save_pretrained(path, dtype))
            self.folder.plot({"loss": "training (weighted)", "validation_loss": "held out"}, "loss")
        if due["preview"]:
            self.preview(step)
        if any(due.values()):
            self.timed_step, self.timed_at = step, time.perf_counter()

    def _intervals(self) -> dict[str, int]:
        o = self.options
        return {"validate": o.validate_every, "checkpoint": o.checkpoint_every, "preview": o.preview_every}

    def preview(self, step: int) -> None:
        """A sheet of samples from fixed noise and fixed prompts."""
        model, size = self.model, self.options.resolution
        model.vae.to(self.device)
        with self.at_work():
            made = model.sample(
                self.prompts,
                steps=self.options.preview_steps,
                guidance_scale=self.options.preview_guidance,
                height=size,
                width=size,
            )
        model.vae.to("cpu")
        file = self.folder.path / "samples" / f"step_{step:06d}.png"
        save_png(image_sheet(made, columns=4), file)
        (file.parent / "prompts.txt").write_text("\n".join(self.prompts) + "\n")
        self.folder.log_picture(step, "samples", file)

    def finish(self, step: int) -> None:
        self.folder.close()
        path = self.folder.path
        if step < self.options.max_steps:
            print(f"Stopped at step {step} and saved; go on with --resume --output_dir {path}")
            return
        print(f"\nDone. Pictures: {path / 'samples'}, loss: {path / 'loss.png'}, model: {path / 'model'}")
        if self.device.type == "cuda":
            print(f"Peak GPU memory: {torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB")
        if self.options.preset == "monsters":
            print(
                "What to expect so soon: blotches on white, many in the colour asked for, not yet creatures.\n"
                "Next: open sample_stable_diffusion.ipynb, whose model was trained for longer, or point it here;\n"
                "on a GPU, train on real pictures: python train_stable_diffusion.py --dataset FOLDER_OR_HUB_ID"
            )


def _say_hello(
    options: Options,
    model: StableDiffusion,
    data: CaptionedLatents,
    chosen: Tensor,
    held_out: Tensor,
    processes: Processes,
    precision: torch.dtype,
) -> None:
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    type_ = str(precision).removeprefix("torch.")
    print(
        f"U-Net of {millions:.1f} M parameters; {len(chosen)} pictures to train on, {len(held_out)} held out, "
        f"{len(data.captions) - 1} captions; {processes.count} × {processes.device.type}, {type_}; "
        f"results in {options.output_dir}",
        file=sys.stderr,
    )
    side = options.resolution // model.vae.config.downsampling
    memory = forecast(
        model.unet,
        frozen=[model.vae, model.text_encoder.model],
        latents=(options.batch_size // processes.count // options.gradient_accumulation, side, side),
        length=model.text_encoder.length,
        resident=data.nbytes,
        device=processes.device,
        precision=precision,
        micro_batches=options.gradient_accumulation,
        checkpointing=options.gradient_checkpointing,
        averaged=bool(options.ema_decay),
        average_on_cpu=options.ema_on_cpu,
        processes=processes.count,
    )
    print(memory, file=sys.stderr)


if __name__ == "__main__":
    run(main)
