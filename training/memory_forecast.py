"""Estimates, before training starts, how much memory it will take: what stays, and a rehearsal of what comes and goes.

What stays (weights, the optimizer's two moments, the average, the latents) is counted. What comes and goes (gradients,
activations, autocast's copies in low precision) overlaps in ways no formula gets right, with gradient checkpointing
least of all. So the real networks take a real step on fake tensors, which have shapes and lifetimes but no numbers, and
a meter adds up those that are alive; then they encode an image, validate, and decode a preview, which may need more
than a step of a LoRA. That takes seconds, ten of them for Stable Diffusion's size on one core, and no memory.

Numbers are bytes; texts say GB (10⁹ bytes).
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_model import UNet, UNetConfig
from stable_diffusion_model import StableDiffusion
from training import low_rank
from training.captioned_latents import CaptionedLatents, batches_at_once, images_at_once, memory_of
from training.presets import UNetOptions
from training.reproducible import Processes
from vae_model import VAE, VAEConfig

# What PyTorch itself takes: Python and the libraries' own memory on a CPU, a context and workspaces on a GPU.
RUNTIME = {"cpu": 1_000_000_000, "cuda": 600_000_000, "mps": 600_000_000}


class Meter(TorchDispatchMode):
    """Bytes of the tensors made while it is on: `now` alive, and at the `peak`."""

    def __init__(self, already_there: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        # Views share their storage, so storages are what is counted. The list keeps the first ones alive.
        self.first = [tensor.untyped_storage() for tensor in already_there]
        self.known = weakref.WeakSet(self.first)

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage()) not in self.known:
                self.known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return result

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def as_it_is(unet: UNet) -> UNet:
    """For a U-Net all of whose weights are trained."""
    return unet


def rehearse_step(
    config: UNetConfig,
    latents: tuple[int, int, int],
    length: int,
    accumulates: bool,
    precision: torch.dtype,
    checkpointing: bool,
    device_type: str = "cpu",
    adapt: Callable[[UNet], UNet] = as_it_is,
) -> int:
    """Most bytes that gradients, activations and low-precision copies take together at one moment of a training step.

    `latents`: (images in a micro-batch, h, w); `length`: text tokens; `accumulates`: there are several micro-batches,
    so the gradients of the first are there when the second begins. `adapt` freezes what is not trained.
    """
    with FakeTensorMode(), torch.device(device_type):
        unet = adapt(UNet(config))
        unet.gradient_checkpointing = checkpointing
        n = latents[0]
        x, t = torch.empty(n, config.in_channels, *latents[1:]), torch.zeros(n)
        context = torch.empty(n, length, config.context_dim)
        with Meter([*unet.parameters(), x, t, context]) as meter:
            if accumulates:
                for parameter in unet.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            autocast = {"dtype": precision, "enabled": precision != torch.float32, "cache_enabled": False}
            with torch.autocast(device_type, **autocast):
                loss = unet(x, t, context).float().square().mean()
            loss.backward()
        return meter.peak


def rehearse_rest(
    config: UNetConfig,
    vae_config: VAEConfig,
    latents: tuple[int, int, int],
    length: int,
    precision: torch.dtype,
    encodes: int,
    previews: int,
    device_type: str = "cpu",
    adapt: Callable[[UNet], UNet] = as_it_is,
) -> dict[str, int]:
    """Most bytes that come and go together beside training: in "encoding", "validation", and a "preview".

    `latents`: (images that are validated at a time, h, w); `encodes` and `previews`: images that are encoded, or go
    through the U-Net for a preview, at a time. What is not done (0) is not in the result.
    """
    n, h, w = latents
    with FakeTensorMode(), torch.device(device_type), torch.no_grad():
        unet, vae = adapt(UNet(config)).requires_grad_(False), VAE(vae_config)
        pixels = (encodes, vae_config.in_channels, vae_config.downsampling * h, vae_config.downsampling * w)

        def denoise(images: int) -> None:
            context = torch.empty(images, length, config.context_dim)
            unet(torch.empty(images, config.in_channels, h, w), torch.zeros(images), context)

        def preview() -> None:
            denoise(2 * previews)  # guidance
            vae.decode(torch.empty(1, vae_config.latent_channels, h, w))

        works = {"encoding": lambda: vae.encode(torch.empty(pixels))}
        works |= ({"validation": lambda: denoise(n)} if n else {}) | ({"preview": preview} if previews else {})
        peaks = {}
        for name, work in works.items():
            with Meter([*unet.parameters(), *vae.parameters()]) as meter:
                with torch.autocast(device_type, precision, enabled=precision != torch.float32):
                    work()
            peaks[name] = meter.peak
    return peaks


def kernels_of(device: torch.device) -> str:
    """The device whose autocast and attention are rehearsed for another."""
    return device.type if device.type == "cuda" else "cpu"


def bytes_of(module: nn.Module, trained_only: bool = False) -> int:
    """Bytes of a network's weights, or of those that are trained."""
    return sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad or not trained_only)


@dataclass(frozen=True)
class Forecast:
    """Bytes by what they are for, on a device that `has` so many (None: unknown), and what would make it less."""

    parts: dict[str, int]
    device: str
    has: int | None = None
    remedies: list[str] = field(default_factory=list)
    rehearsed: bool = True

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {_gb(size)}" for name, size in self.parts.items() if size >= 5e6)
        text = f"Memory: about {_gb(self.total)} GB ({listed}{'' if self.rehearsed else ', activations not foreseen'})"
        text += f"; this {self.device} has {_gb(self.has)}." if self.has else "."
        if self.has and self.total > self.has:
            text += f"\nwarning: that is more than it has; try {', or '.join(self.remedies)}."
        return text


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}" if size >= 1e8 else f"{size / 1e9:.2f}"


def forecast(
    unet: UNet,
    frozen: list[nn.Module],
    latents: tuple[int, int, int],
    length: int,
    resident: int,
    device: torch.device,
    precision: torch.dtype,
    micro_batches: int = 1,
    checkpointing: bool = False,
    averaged: bool = False,
    average_on_cpu: bool = False,
    processes: int = 1,
    muon: bool = False,
    adapt: Callable[[UNet], UNet] = as_it_is,
    rest: Callable[[], dict[str, int]] = dict,
) -> Forecast:
    """What training `unet` with AdamW, or Muon, will take on `device`.

    `frozen`: the networks that are not trained, which wait in the CPU's memory; `latents` and `length` of a micro-batch
    as in `rehearse_step`; `resident`: bytes of the cached latents and texts on the device. `averaged`: an EMA is kept,
    perhaps `average_on_cpu`. `adapt` makes of a U-Net of the same shape what `unet` is, if that is a LoRA's. `rest`
    rehearses what is done beside training, and gives bytes beyond what stays, by name: see `rehearse_rest`.
    """
    on_cpu = device.type == "cpu"
    trained = bytes_of(unet, trained_only=True)
    is_lora = trained < bytes_of(unet)
    moments: dict[str, int] = {}
    with contextlib.suppress(Exception):  # a kernel that has no fake on this device keeps nobody from training
        step = rehearse_step(
            unet.config, latents, length, micro_batches > 1, precision, checkpointing, kernels_of(device), adapt
        )
        moments = {"activations": step}
        moments |= rest()
    optimizer = {"Muon": trained} if muon else {"AdamW": 2 * trained}
    average = trained if averaged and (on_cpu or not average_on_cpu) else 0
    # What comes and goes, at the worst moment, beside gradients, though not all of them may be there then; when images
    # are encoded, nothing is there yet that training needs.
    there = dict.fromkeys(moments, trained) | {"encoding": trained + sum(optimizer.values()) + average}
    sizes = {name: max(size - there[name], 0) for name, size in moments.items()} or {"activations": 0}
    worst = max(sizes, key=lambda name: sizes[name])
    parts = {
        "weights": bytes_of(unet),
        "gradients": trained,
        **optimizer,
        "EMA": average,
        worst: sizes[worst],
        "gradients in transit": trained if processes > 1 else 0,  # DistributedDataParallel's buckets
        "VAE and text encoder": sum(bytes_of(module) for module in frozen) if on_cpu else 0,
        "data": resident,
        "PyTorch": RUNTIME.get(device.type, 0),
    }
    remedies = {
        "--gradient_checkpointing": not checkpointing,
        f"--gradient_accumulation {micro_batches * latents[0]}": latents[0] > 1,
        # A LoRA's frozen matrices take half. Else autocast copies weights, which weighs more than one image saves.
        "--precision bfloat16": precision == torch.float32 and (is_lora or latents[0] > 1),
        "--ema_decay 0": bool(parts["EMA"]) and not is_lora,  # a LoRA's average is small, and stays where it is
        "--ema_on_cpu": bool(parts["EMA"]) and not is_lora and not on_cpu,
        "a lower --resolution": is_lora,
    }
    helpful = [option for option, helps in remedies.items() if helps] or ["a lower --resolution"]
    return Forecast(parts, "machine" if on_cpu else "GPU", memory_of(device), helpful, rehearsed=bool(moments))


def forecast_run(
    options: UNetOptions,
    unet: UNet,
    model: StableDiffusion,
    data: CaptionedLatents,
    validated: int,
    processes: Processes,
    precision: torch.dtype,
) -> Forecast:
    """`forecast` for a run of train_stable_diffusion.py.

    `unet` is what is trained; the model may hold its average. `validated`: images to validate on at a time.
    """
    side, device = options.resolution // model.vae.config.downsampling, processes.device
    adapt = partial(low_rank.adapt, options=options, precision=precision) if options.lora_rank else as_it_is

    def rest() -> dict[str, int]:
        latents = (validated if options.validate_every else 0, side, side)
        prompts = data.prompts(options.preview_prompts)[: 1 if device.type == "cpu" else None]  # that sample together
        encodes = images_at_once(options.resolution, device) * batches_at_once(model.vae, options.resolution, processes)
        counts = (encodes, len(prompts) * bool(options.preview_every))
        how = (model.text_encoder.length, precision, *counts, kernels_of(device), adapt)
        sizes = rehearse_rest(unet.config, model.vae.config, latents, *how)
        if device.type != "cpu":  # the VAE comes for the time of a preview; the U-Net is not there while it encodes
            sizes = {name: size + bytes_of(model.vae) * (name != "validation") for name, size in sizes.items()}
            sizes["encoding"] -= bytes_of(unet)
        return sizes

    return forecast(
        unet,
        frozen=[model.vae, model.text_encoder.model],
        latents=(options.batch_size // processes.count // options.gradient_accumulation, side, side),
        length=model.text_encoder.length,
        resident=data.nbytes,
        device=device,
        precision=precision,
        micro_batches=options.gradient_accumulation,
        checkpointing=options.gradient_checkpointing,
        averaged=bool(options.ema_decay),
        average_on_cpu=options.ema_on_cpu,
        processes=processes.count,
        muon=options.optimizer == "muon",
        adapt=adapt,
        rest=rest,
    )
