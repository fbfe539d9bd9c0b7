"""Training by LoRA: a frozen U-Net with low-rank changes; what of it is trained, saved and averaged.

Frozen matrices are kept in the type that autocast computes in. It would make the same copies of them in every step, so
not a bit of the result changes, and they take half the memory.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

import lora
from diffusion_model import UNet
from published import load_model, write_lora
from published.lora_files import FILE
from sampling.packed import give_memory_back
from stable_diffusion_model import StableDiffusion
from training.encoded_cache import fingerprint
from training.presets import UNetOptions, check_objective, what_to_do
from training.script import UserError, user_errors


def check(options: UNetOptions) -> None:
    """UserError for options that make no sense together with --lora_rank, or without it."""
    if not options.lora_rank:
        for name, off in (("lora_alpha", 0), ("lora_layers", "attention")):
            if getattr(options, name) != off:
                raise UserError(
                    f"--{name}: without --lora_rank all weights are trained; give a rank, or leave the option out."
                )
        return
    for name in ("vae", "text_encoder"):
        if getattr(options, name):
            raise UserError(
                f"--{name}: only the LoRA is saved, and sampled with what --pretrained holds; leave the option out, or "
                f"pass a --pretrained that has this one (set model.{name} and call model.save_pretrained)."
            )
    if options.pretrained and options.overwrite and _lies_in(options.pretrained, options.output_dir):
        raise UserError(
            f"--overwrite: {options.output_dir} holds {options.pretrained}, without which its LoRA is of no use; pass "
            "another --output_dir."
        )
    if not options.pretrained:
        raise UserError("--lora_rank: LoRA changes a model that is trained already; say which with --pretrained.")
    if options.ema_on_cpu:
        raise UserError("--ema_on_cpu: the average of a LoRA is small; leave the option out, or --lora_rank.")


def _lies_in(path: str, folder: str) -> bool:
    return Path(path).exists() and Path(path).resolve().is_relative_to(Path(folder).resolve())


def build_model(options: UNetOptions, precision: torch.dtype) -> tuple[StableDiffusion, str]:
    """The pretrained model with low-rank changes in its U-Net, and a digest of its weights, by which it is known again.

    The weights as they lie in the file are read one after the other, so that they never take memory in float32.
    """
    with user_errors(hint=what_to_do(options)):
        parts = load_model(options.pretrained, dtype=None)
        check_objective(options, parts.schedule)
        digest = fingerprint(parts.unet, dtype=torch.float32)
        torch.manual_seed(options.seed)  # so that what the matrices begin with does not depend on what was read before
        adapt(parts.unet, options, precision)
        return StableDiffusion(*parts._replace(name=Path(options.output_dir).name)), digest


def adapt(unet: UNet, options: UNetOptions, precision: torch.dtype) -> UNet:
    """Freezes the U-Net and gives it the low-rank changes that the options ask for, if they do."""
    if options.lora_rank:
        for module in unet.modules():
            dtype = precision if isinstance(module, nn.Linear | nn.Conv2d) else torch.float32
            for name, p in module.named_parameters(recurse=False):  # copies, since they may lie in a file
                setattr(module, name, nn.Parameter(p.detach().to(dtype, copy=True), requires_grad=False))
        give_memory_back()  # what other weights took
        layers = lora.targets(unet, options.lora_layers)
        lora.add(unet, layers, options.lora_rank, options.lora_alpha or options.lora_rank)
    return unet


def trained_state(network: nn.Module, trained: set[str]) -> dict[str, Tensor]:
    """The weights whose names are in `trained`, by name: all of them, or those of the low-rank changes."""
    return {name: tensor for name, tensor in network.state_dict().items() if name in trained}


def load_trained(network: nn.Module, state: dict[str, Tensor], trained: set[str]) -> None:
    """Takes up what `trained_state` gave. RuntimeError if the names or shapes are others."""
    if state.keys() != trained:
        odd = min(state.keys() ^ trained)
        raise RuntimeError(f"{odd} is in one of them only")
    own = network.state_dict()
    for name, tensor in state.items():
        there, here = tuple(tensor.shape), tuple(own[name].shape)
        if there != here:
            is_rank = name.endswith(".down.weight") and there[0] != here[0]
            odd = f"a LoRA of rank {there[0]}, not {here[0]}" if is_rank else f"{name} is {there}, not {here}"
            raise RuntimeError(odd)
    network.load_state_dict(state, strict=False)


def result(options: UNetOptions) -> str:
    """The folder in the run folder that holds what was learned."""
    return "lora" if options.lora_rank else "model"


def write(folder: Path, model: StableDiffusion, options: UNetOptions) -> None:
    """Writes what was learned: the whole model in the standard folder, or the LoRA alone."""
    dtype = getattr(torch, options.save_precision)
    if options.lora_rank:
        write_lora(folder / FILE, model.unet, dtype=dtype)
    else:
        model.save_pretrained(folder, dtype)


def chosen_by(options: UNetOptions, run_folder: Path) -> list[str]:
    """The options of sample_stable_diffusion.py that take what was learned."""
    learned = str(run_folder / result(options))
    return ["--model", str(options.pretrained), "--lora", learned] if options.lora_rank else ["--model", learned]
