"""LoRA files: read in the layouts of diffusers, peft and kohya's scripts, written as diffusers and peft write them.

A file has two thin matrices for each adapted layer, `down` and `up`. All layouts agree on that, and differ in names:

    diffusers, peft       unet.down_blocks.0.….attn1.to_q.lora_A.weight          lora_B
    older diffusers       unet.down_blocks.0.….attn1.to_q.lora.down.weight       lora.up
    first diffusers       unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight
                          text_encoder.text_model.….self_attn.to_q_lora.down.weight, which is q_proj
    folders of peft       base_model.model. in front, for any network
    kohya                 lora_unet_down_blocks_0_…_attn1_to_q.lora_down.weight  lora_up, and a number `alpha`

diffusers keeps α in the file's metadata, peft in adapter_config.json beside it, and many files have none, which means
α = r. So α is multiplied into `up` when a file is written here, and it means the same to every reader.
"""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora import adapted, add_to
from published.ldm_layout import unet_to_ldm
from published.weight_files import (
    choose_weight_files,
    first_line,
    local_path,
    locate,
    read_checkpoint,
    read_json,
    write_safetensors,
)

STEMS = ("pytorch_lora_weights", "adapter_model")  # diffusers' name for it, and peft's
FILE = f"{STEMS[0]}.safetensors"
NETWORKS = {"unet": "U-Net", "text_encoder": "text encoder"}
PREFIXES = {
    "unet.": "unet", "lora_unet_": "unet",
    "text_encoder.": "text_encoder", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
}  # fmt: skip
# The beginnings that peft (0.21) computes from the base weights and takes out of them.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
OF_A_TEXT_ENCODER = ("text_model.", "encoder.layers.")  # how names without such a prefix begin there
ENDINGS = (  # of `down`, of `up`
    (".lora_A.weight", ".lora_B.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)


class Change(NamedTuple):
    """What a file says of one layer."""

    down: Tensor  # (r, in), or (r, in, 3, 3)
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def lora_file(path_or_hub_id: str | os.PathLike) -> tuple[Path, str]:
    """The file itself, it or the one in a folder or hub repository, and a name. FileNotFoundError if there is none."""
    path = locate(path_or_hub_id, "the LoRA", any_name=True)
    if not (path.is_file() or path.is_dir()):  # a device, say
        raise FileNotFoundError(f"the LoRA {str(path)!r} is no file and no folder; pass a .safetensors file.")
    file = path if path.is_file() else _file_in(path)
    return file, _name_of(path_or_hub_id, file)


def _file_in(path: Path) -> Path:
    names = [file.name for file in path.iterdir()]
    for stem in STEMS:
        if chosen := choose_weight_files(names, stem):
            return path / chosen[0]
    if (path / "lora").is_dir():  # a run's folder
        return _file_in(path / "lora")
    found = sorted(name for name in names if name.endswith(".safetensors"))
    if len(found) != 1:
        held = f"{len(found)} .safetensors files ({', '.join(found[:9])})" if found else "no LoRA"
        raise FileNotFoundError(f"{path} holds {held}; pass the file that is meant.")
    return path / found[0]


def _name_of(path_or_hub_id: str | os.PathLike, file: Path) -> str:
    """What to call a LoRA: its run's folder, its hub id, its folder or its file, whichever says most."""
    if local_path(str(path_or_hub_id)) is None:
        name = str(path_or_hub_id)
    elif file.stem.partition(".")[0] not in STEMS:
        name = file.stem
    else:
        folder = Path(os.path.abspath(file)).parent
        of_a_run = {"lora": "", "best_lora": "_best"}  # in such a folder training leaves it
        name = folder.parent.name + of_a_run[folder.name] if folder.name in of_a_run else folder.name
    return re.sub(r"\W", "_", name) or "lora"


def read_lora(path: Path) -> dict[str, dict[str, Change]]:
    """The changes in a file, as {"unet": {layer: Change}, "text_encoder": …}. ValueError, in one sentence, if bad.

    Names of layers are as in the file, without prefix and ending; `find_layers` finds the layers that they mean.
    """
    tensors, metadata = read_checkpoint(path)
    config = _config_of(path, metadata)
    rest, found = dict(tensors), {network: {} for network in NETWORKS}
    for name in tensors:
        of_peft = re.findall(r"\.lora_A(\.\w+\.weight)$", name)  # with the adapter's name, such as `default`
        for down_end, up_end in (*ENDINGS, *((f".lora_A{end}", f".lora_B{end}") for end in of_peft)):
            layer = name.removesuffix(down_end)
            if layer == name or layer + up_end not in tensors:
                continue
            down, up = rest.pop(name), rest.pop(layer + up_end)
            _check_matrices(path, layer, down, up)
            network, inside = _network_of(layer)
            if inside in found[network]:
                raise ValueError(f"{path} changes {layer} twice, in two layouts; download it again.")
            try:
                alpha = rest.pop(layer + ".alpha", metadata.get(layer + ".alpha"))  # or no tensor, in a pickle
                alpha = _alpha_in(config, network, inside, len(down)) if alpha is None else float(alpha)
            except (ValueError, TypeError, AttributeError, RuntimeError, OverflowError, re.error) as error:
                raise ValueError(
                    f"{path}: the α of {layer} cannot be read ({first_line(error)}); download it again."
                ) from error
            if not math.isfinite(alpha):
                raise ValueError(f"{path}: the α of {layer} is {alpha}, not a finite number.")
            found[network][inside] = Change(down, up, alpha)
            break
    if rest:
        raise ValueError(
            f"{path} is not (only) a LoRA: it holds {next(iter(rest))}{' and more' * (len(rest) > 1)}, "
            "which no LoRA of linear layers and convolutions has; pass a file made by diffusers, peft or kohya's tools."
        )
    if not any(found.values()):
        raise ValueError(f"{path} holds no low-rank matrices; pass a LoRA's file.")
    return found


def _check_matrices(path: Path, layer: str, down: Tensor, up: Tensor) -> None:
    for matrix in (down, up):
        if matrix.layout != torch.strided or matrix.is_meta or not matrix.is_floating_point():
            raise ValueError(
                f"{path}: the matrices of {layer} are sparse, empty, complex or integer; pass a LoRA of plain ones."
            )
    fit = down.ndim in (2, 4) and down.ndim == up.ndim and down.shape[0] == up.shape[1] and len(down)
    if not fit or up.shape[2:] not in ((), (1, 1)):
        raise ValueError(
            f"{path}: the matrices of {layer} do not fit each other ({tuple(down.shape)} and {tuple(up.shape)}); "
            "download it again."
        )
    if not (down.float().isfinite().all() and up.float().isfinite().all()):
        raise ValueError(f"{path}: the matrices of {layer} hold numbers that are not finite.")


def _network_of(layer: str) -> tuple[str, str]:
    """Which network a layer's full name belongs to, and its name there."""
    of_peft = "base_model.model."  # for any network, alone or before or behind a network's prefix
    layer = layer.removeprefix(of_peft)
    for prefix, network in PREFIXES.items():
        if layer.startswith(prefix):
            return network, layer.removeprefix(prefix).removeprefix(of_peft)
    return "text_encoder" if layer.startswith(OF_A_TEXT_ENCODER) else "unet", layer


def _config_of(path: Path, metadata: dict[str, Any]) -> Any:
    """peft's options: in diffusers' files as metadata, "unet.lora_alpha" and so on; in peft's folders beside them.

    ValueError if the base weights are not those that it was trained beside.
    """
    beside = path.with_name("adapter_config.json")
    if path.stem == "adapter_model" and beside.is_file():
        said = read_json(beside)
        config = {f"{network}.{name}": value for network in NETWORKS for name, value in said.items()}
    else:
        try:
            config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        except (ValueError, TypeError, RecursionError):
            return {}
    for network in NETWORKS if isinstance(config, dict) else ():
        start = str(config.get(f"{network}.init_lora_weights"))
        if start.lower().startswith(CHANGE_THE_BASE):
            raise ValueError(
                f"{path} was trained with init_lora_weights={start!r}, which changes the base weights, too, and those "
                "are not in the file; pass the plain LoRA that peft's path_initial_model_for_weight_conversion writes."
            )
    return config


def _alpha_in(config: dict[str, Any], network: str, layer: str, rank: int) -> float:
    """α by peft's options, as it counts here, where a change is α/r B A; the rank if they say nothing."""
    alpha = config.get(f"{network}.lora_alpha", rank)
    for pattern, other in (config.get(f"{network}.alpha_pattern") or {}).items():
        if fits(pattern, layer):
            alpha = other
            break
    # Rank-stabilised LoRA (Kalajdzievski 2023, arXiv:2312.03732) has α/√r in the place of α/r.
    stabilised = str(config.get(f"{network}.use_rslora")).lower() in ("true", "1")  # some write it as a string
    return float(alpha) * math.sqrt(rank) if stabilised else float(alpha)


# A piece of a pattern: a character and how often it may stand there, or what ties characters together.
PIECE = re.compile(r"(\\[.dw-]|\[\^?(?:\\[.dw-]|[\w.-])+\]|[\w.-])([*+?]?)|[()|^$]")
PIECES = re.compile(rf"(?:{PIECE.pattern})*")


def fits(pattern: str, layer: str) -> bool:
    """Whether `pattern` is the layer's name or its end behind a dot, as in peft: re.fullmatch(rf"(.*\\.)?({pattern})").

    It comes from a stranger's file, and `re` would take years for "(a+)+b". So all ways through it are followed at
    once, and brackets cannot be repeated. ValueError for what is no such pattern.
    """
    if not PIECES.fullmatch(pattern):
        raise ValueError(f"{pattern[:99]!r} is no simple pattern of names")
    at = {0} | {i + 1 for i, letter in enumerate(layer) if letter == "."}  # where we may be in the layer's name
    opened = [(at, set())]  # of each open bracket: where we were before it, and where its alternatives led
    for piece in PIECE.finditer(pattern):
        one, times = piece.groups()
        if one:
            once = further = {i + 1 for i in at if re.fullmatch(one, layer[i : i + 1])}
            while times in ("*", "+") and further:
                further = {i + 1 for i in further if re.fullmatch(one, layer[i : i + 1])} - once
                once = once | further
            at = once | at if times in ("*", "?") else once
            if not at and "|" not in pattern:
                return False
        elif piece[0] == "(":
            opened.append((at, set()))
        elif piece[0] == "|":
            opened[-1][1].update(at)
            at = opened[-1][0]
        elif piece[0] == ")":
            at = at | opened.pop()[1]
        else:
            at = at & {0 if piece[0] == "^" else len(layer)}
        if not opened:
            break
    if len(opened) != 1:
        raise ValueError(f"{pattern[:99]!r} has a bracket without its other half")
    return len(layer) in at | opened[0][1]


def find_layers(
    network: nn.Module, changes: dict[str, Change], kind: str, source: Path
) -> list[tuple[nn.Module, Change]]:
    """The layers of a network ("unet" or "text_encoder") that a file means, each with its change.

    ValueError, in one sentence, if it was made for a network of another shape.
    """
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    known = {alias: name for name in layers for alias in _aliases(name)}
    if kind == "unet":
        ldm = unet_to_ldm(network.config, {name: name for name in layers})  # some of kohya's files have LDM's names
        known |= {theirs.replace(".", "_"): ours for theirs, ours in ldm.items()}
    found = []
    for given, change in changes.items():
        name = known.get(given)
        if name is None:
            raise ValueError(
                f"{source} changes {given}, which the {NETWORKS[kind]} of this model does not have: it was made for "
                "another base model."
            )
        shape, rank = tuple(layers[name].weight.shape), len(change.down)
        theirs = (change.up.shape[0], *change.down.shape[1:])
        if _without_ones(theirs) != _without_ones(shape):
            raise ValueError(
                f"{source} changes {name} by a matrix of {theirs} (rank {rank}), but that of this model is {shape}: "
                "it was made for another base model."
            )
        if any(layers[name] is other for other, _ in found):
            raise ValueError(f"{source} changes {name} twice, under two names; download it again.")
        found.append((layers[name], change))
    return found


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if shape[2:] == (1, 1) else shape  # a 1×1 convolution is a linear layer


def _aliases(name: str) -> list[str]:
    """How files may call our layer `name`."""
    names = [name, name.removeprefix("text_model."), f"text_model.{name.removeprefix('text_model.')}"]
    first_diffusers = [re.sub(r"\.(to_[qkv]|to_out)(\.0)?$", r".processor.\1", name)]
    first_diffusers += [re.sub(r"\.([qkv]|out)_proj$", r".to_\1", other) for other in names]
    return [*names, *first_diffusers, *(other.replace(".", "_") for other in names)]


@torch.no_grad()
def attach(layers: list[tuple[nn.Module, Change]], name: str) -> None:
    """Gives each layer its change, under one name, as `find_layers` found them."""
    for layer, change in layers:
        made = add_to(layer, len(change.down), change.alpha, name).to(layer.weight.dtype).requires_grad_(False)
        made.down.weight.copy_(change.down.view_as(made.down.weight))
        made.up.weight.copy_(change.up.view_as(made.up.weight))


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def write_lora(path: Path, unet: nn.Module, name: str = "default", dtype: torch.dtype = torch.float32) -> None:
    """Writes the change `name` of a U-Net to a .safetensors file that diffusers' `load_lora_weights` reads.

    α is multiplied into `up`; `scale` is left to whoever loads it. A matrix that `dtype` cannot hold, since it is too
    large or too small for it, is written in float32. ValueError if no layer has such a change.
    """
    tensors = {}
    changes = {layer: module.changes[name] for layer, module in adapted(unet).items() if name in module.changes}
    if not changes:
        raise ValueError(f"{path}: the U-Net has no LoRA {name!r} that could be written.")
    for layer, change in changes.items():
        up = change.up.weight.detach() * change.alpha / change.rank
        for letter, matrix in (("A", change.down.weight.detach()), ("B", up)):
            exact, lower = matrix.float(), matrix.to(dtype)
            rounded = (lower.float() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()  # not if ∞, not if lost
            tensors[f"unet.{layer}.lora_{letter}.weight"] = lower if rounded else exact
    write_safetensors(path, tensors)
