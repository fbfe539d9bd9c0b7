"""How weight files are found and read, without trusting them.

A published model is a folder (here or on the Hugging Face hub) of JSON files and weight files. Weight files come in
two formats: `safetensors` (a JSON header, then raw numbers: nothing to execute) and Python pickles (`.bin`, `.ckpt`,
`.pth`, `.pt`: a small program that builds objects, read here with PyTorch's `weights_only` unpickler, which builds
tensors and plain containers and refuses the rest). Whatever is wrong with a file, the answer is one sentence, and no
module is touched before every name and shape has been checked.
"""

import errno
import json
import os
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from huggingface_hub import errors as hub_errors
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Where: a local path or a hub id
# ----------------------------------------------------------------------------------------------------------------------

WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
# The names of the weights of diffusers, transformers, diffusers' LoRA and peft.
STEMS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
UNUSED_FOLDERS = ("safety_checker", "feature_extractor", "image_encoder")  # of a pipeline, up to 1.2 GB


def locate(name: str | Path, what: str, weights: bool = True, any_name: bool = False) -> Path:
    """Return the local file or folder `name`, or the local copy of the hub model `name`, downloaded if need be.

    `what` says where the name comes from (such as "--vae") and opens the error. Of a hub model only those files are
    downloaded that `read_folder_weights` would choose, and the JSON and vocabulary beside them (these alone unless
    `weights`; with `any_name`, if there are none but a single .safetensors, that one, as LoRAs are published); without
    a network, the hub's cache is used. Raises FileNotFoundError, in one sentence, if there is none.
    """
    text = str(name)
    if (path := local_path(text)) is not None:
        return path
    is_path = text.startswith((".", "/", "~")) or "\\" in text or text.count("/") > 1 or text.endswith(WEIGHT_SUFFIXES)
    if is_path or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text):
        raise FileNotFoundError(
            f"{what} {text!r} does not exist; pass an existing file or folder, or a hub id (OWNER/NAME)."
        )
    try:
        return _hub_folder(text, weights, any_name)
    except Exception as error:  # some thirty kinds, from three libraries; the user needs one sentence
        raise FileNotFoundError(
            f"{what} {text!r} is not a file or folder here, and the hub did not give it ({_reason(error)}); "
            f"pass the path of a downloaded copy, or the id of a public model."
        ) from error


def local_path(text: str) -> Path | None:
    """The file or folder `text`, where "~" is somebody's home; None if there is none."""
    try:
        path = Path(text).expanduser()
        return path if text and path.exists() else None
    except RuntimeError:  # there is nobody of this name
        return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # for any file
            return None
        raise


def _hub_folder(repository: str, weights: bool, any_name: bool) -> Path:
    try:
        # One request that fails at once without a network (the others try again for half a minute).
        listed = huggingface_hub.HfApi().model_info(repository, timeout=10).siblings or []
        wanted = _wanted_files([file.rfilename for file in listed], weights, any_name)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    except Exception:  # no network, hub down, model withdrawn: use what was downloaded before
        try:
            return Path(huggingface_hub.snapshot_download(repository, local_files_only=True))
        except hub_errors.LocalEntryNotFoundError:
            pass
        raise  # the first error says more than "not in the cache"


def _wanted_files(names: list[str], weights: bool, any_name: bool) -> list[str]:
    folders = sorted({os.path.dirname(name) for name in names} - set(UNUSED_FOLDERS))
    wanted = [name for name in names if os.path.dirname(name) in folders and name.endswith((".json", ".txt"))]
    if not weights:
        return wanted
    for folder in folders:
        inside = [os.path.basename(name) for name in names if os.path.dirname(name) == folder]
        chosen = next((files for stem in STEMS if (files := choose_weight_files(inside, stem))), [])
        wanted += [os.path.join(folder, name) for name in chosen]
    if not any(name.endswith(WEIGHT_SUFFIXES) for name in wanted):
        single = [name for name in names if name.endswith(".safetensors") and not os.path.dirname(name)]
        if any_name and len(single) == 1:
            return wanted + single
        raise LookupError("it holds no weights in the layout of diffusers or transformers")
    return wanted


def _reason(error: Exception) -> str:
    match error:
        case LookupError():
            return str(error)
        case hub_errors.GatedRepoError():
            return "its owner asks you to accept terms and log in first"
        case hub_errors.RepositoryNotFoundError():
            return "there is no such public model"
        case hub_errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set and it is not in the cache"
    return first_line(error)


def first_line(error: BaseException) -> str:
    """What an error says in its first line, after its kind: short enough for a one-sentence message."""
    text = str(error).strip().rpartition("WeightsUnpickler error:")[2].strip()  # after PyTorch's long explanation
    return f"{type(error).__name__}: {text.splitlines()[0][:200].rstrip(' .')}" if text else type(error).__name__


def choose_weight_files(names: Iterable[str], stem: str) -> list[str]:
    """Return which of a folder's file `names` hold its weights: one file, all shards of one set, or none ([]).

    Full precision is preferred to half (`fp16`), safetensors to pickles, and the EMA weights that a published folder
    holds under the plain name to `non_ema`; these are the files that diffusers and transformers read by default.
    """
    names = sorted(names)
    for variant in ("", ".fp16", ".non_ema"):
        for suffix in ("safetensors", "bin"):
            base = "pytorch_model" if (stem, suffix) == ("model", "bin") else stem  # transformers' name for its pickles
            whole = f"{base}{variant}.{suffix}"
            if whole in names:
                return [whole]
            # The variant was written after the number once, and before it now: model.fp16-00001-of-00002.safetensors
            b, v, number = re.escape(base), re.escape(variant), r"-\d{5}-of-\d{5}"
            shard = re.compile(rf"{b}({v}{number}|{number}{v})\.{suffix}")
            if shards := [n for n in names if shard.fullmatch(n)]:
                return shards
    return []


# ----------------------------------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> dict[str, Any]:
    """Return the JSON object in `path`; FileNotFoundError if there is none, ValueError if it is not a JSON object."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; pass a complete folder in diffusers' layout.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8 alike; brackets within brackets
        raise ValueError(f"{path} is not valid JSON ({first_line(error)}); download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__} where a JSON object belongs; download it again.")
    return content


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of one weight file by name, on the CPU, in the precision they are stored in.

    The format is recognised by the content, so a renamed file is read as well (but no pickle called `.safetensors`).
    Tensors may be mapped from the file: copy before writing to them. Raises ValueError, in one sentence, for a damaged,
    foreign or unsafe file, and FileNotFoundError.
    """
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return (tensors, the rest) of one weight file: as `read_weights`, with what else it holds, such as `global_step`.

    A training checkpoint keeps its tensors one level down, under "state_dict"; the rest is then what lies beside it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; pass a {', '.join(WEIGHT_SUFFIXES)} file.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(64)
    if len(start) > 8 and start[8:9] == b"{":
        if 8 + int.from_bytes(start[:8], "little") > size:  # the header alone is longer than the file
            raise ValueError(f"{path} is cut short or damaged; download it again.")
        return _read_safetensors(path)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        if path.suffix == ".safetensors":  # a name that promises no pickle, not even one read with care
            raise ValueError(f"{path} is a Python pickle under a false name; pass a real .safetensors file.")
        return _read_pickle(path, is_zip=start.startswith(b"PK"))
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer and not the weights; fetch them with `git lfs pull`.")
    raise ValueError(f"{path} ({size} bytes) is no safetensors file and no PyTorch checkpoint; download it again.")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({first_line(error)}); download it again.") from error


class _Inert:
    """Stands in for a class that a checkpoint names and that nothing here needs."""


# The checkpoints of SD 1.x name their trainer's callback as a dictionary key. A class that does nothing stands in for
# it, so that the file opens; the trainer itself is never imported.
INERT_NAMES = [(_Inert, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]


def _read_pickle(path: Path, is_zip: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:  # PyTorch itself doesn't look at the checksums
                    raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals(INERT_NAMES):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # a damaged pickle can fail anywhere: EOFError, KeyError, struct.error, RuntimeError …
        named = re.search(r"(?:GLOBAL|global|function) `?([\w.]+\.[\w.]+)", str(error))
        if "weights_only" in str(error).lower() and named:
            raise ValueError(
                f"{path} wants to run {named[1]} while it is read, which weights never need, so it was not opened; "
                f"pass a .safetensors version of it."
            ) from error
        raise ValueError(
            f"{path} is cut short, damaged or not a checkpoint ({first_line(error)}); download it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__} where a dictionary of tensors belongs; save a state_dict instead."
        )
    rest: dict[str, Any] = {}
    if isinstance(content.get("state_dict"), dict):
        rest = {str(key): value for key, value in content.items() if key != "state_dict"}
        content = content["state_dict"]
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    rest |= {str(key): value for key, value in content.items() if key not in tensors}
    if not tensors:
        keys = ", ".join(sorted(rest)[:5]) or "nothing"
        raise ValueError(f"{path} holds no tensors (only {keys}); pass a file that holds a state_dict.")
    return tensors, rest


def read_folder_weights(folder: str | Path, stem: str) -> dict[str, Tensor]:
    """Return the tensors of one model's `folder`, whole or in shards; `stem` is "diffusion_pytorch_model" or "model".

    Which file is read if there are several: see `choose_weight_files`. FileNotFoundError if there is none or a shard is
    missing, ValueError if one is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; pass a folder in diffusers' layout.")
    stem = "model" if stem == "pytorch_model" else stem
    chosen = choose_weight_files((entry.name for entry in folder.iterdir()), stem)
    if not chosen:
        raise FileNotFoundError(
            f"{folder} holds no weights ({stem}.safetensors, or .bin, .fp16, shards); pass a complete model folder."
        )
    if numbered := re.search(r"-of-(\d{5})", chosen[0]):
        count = int(numbered[1])
        if len(chosen) != count:
            raise FileNotFoundError(f"{folder} holds {len(chosen)} of {count} shards of weights; download the rest.")
    tensors: dict[str, Tensor] = {}
    for name in chosen:
        tensors |= read_weights(folder / name)
    return tensors


# ----------------------------------------------------------------------------------------------------------------------
# Into a module, all or nothing
# ----------------------------------------------------------------------------------------------------------------------

# The names of one layer over the years; the left one is read wherever the module has the right one.
OLD_NAMES = (
    (".query.", ".to_q."),  # diffusers before 0.15 in the VAE's attention
    (".key.", ".to_k."),
    (".value.", ".to_v."),
    (".proj_attn.", ".to_out.0."),
    ("text_model.", ""),  # transformers before 5.6 in CLIP's text model …
    ("", "text_model."),  # … and a folder of today read by one of those
)
NOT_WEIGHTS = ("position_ids",)  # 0, 1, 2 …: stored in old text encoders, made by the module itself today


def load_strict(
    module: nn.Module,
    tensors: dict[str, Tensor],
    source: str | Path,
    ignore: tuple[str, ...] = (),
    dtype: torch.dtype | None = torch.float32,
) -> None:
    """Copy `tensors` into `module`, each cast to its parameter's dtype; all of them fit, or none is copied.

    A module on the device "meta", which has no numbers yet, gets copies in `dtype`; with None the tensors themselves,
    as they lie in the file: they take no memory of their own, but the file must stay as it is while they are used.

    `source` is the file or folder they come from and opens the error; names that start with one of `ignore` are left
    out. Old names (`OLD_NAMES`) and 1×1 convolutions where a linear layer is meant are understood. Raises ValueError,
    in one sentence, for missing and unknown names, other shapes, and numbers that are not finite.
    """
    expected = module.state_dict()
    fitting: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name.startswith(ignore) or (name.rpartition(".")[2] in NOT_WEIGHTS and name not in expected):
            continue
        known = next((n for n in _names_over_the_years(name) if n in expected), None)
        if known is None:
            unknown.append(name)
        else:
            fitting[known] = _as_linear(tensor) if expected[known].ndim == 2 else tensor
    kind = type(module).__name__
    cause = f"it is no {kind} of this configuration"
    if missing := [name for name in expected if name not in fitting]:
        raise ValueError(f"{source} lacks {len(missing)} of {len(expected)} tensors, first {missing[0]!r}: {cause}.")
    if unknown:
        raise ValueError(f"{source} holds {len(unknown)} tensors too many, first {unknown[0]!r}: {cause}.")
    for name, tensor in fitting.items():
        if tensor.shape != expected[name].shape:
            shapes = f"the shape {tuple(tensor.shape)} where {tuple(expected[name].shape)} belongs"
            raise ValueError(f"{source} holds {name!r} with {shapes}: {cause}.")
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise ValueError(f"{source} holds {name!r} as {tensor.dtype}: pass weights that are not quantised.")
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float32)):
            raise ValueError(f"{source} holds NaN or infinity in {name!r}: it is damaged, download it again.")
    if any(tensor.is_meta for tensor in expected.values()):
        own = fitting if dtype is None else {name: tensor.to(dtype, copy=True) for name, tensor in fitting.items()}
        module.load_state_dict(own, assign=True)
    else:
        module.load_state_dict(fitting)  # copies, and casts to each parameter's own dtype and device


def _names_over_the_years(name: str) -> Iterable[str]:
    yield name
    for old, new in OLD_NAMES:
        if old == "":
            yield new + name
        elif old.startswith(".") and old in name:
            yield name.replace(old, new)
        elif name.startswith(old):
            yield name.removeprefix(old)


def _as_linear(weight: Tensor) -> Tensor:
    """A 1×1 convolution's weight (out, in, 1, 1) is that of a linear layer, (out, in)."""
    return weight.flatten(1) if weight.ndim > 2 and all(side == 1 for side in weight.shape[2:]) else weight


# ----------------------------------------------------------------------------------------------------------------------
# Writing
# ----------------------------------------------------------------------------------------------------------------------


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write `tensors` to `path` whole or not at all: under a temporary name beside it, then renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # safetensors refuses two names for one piece of memory (tied weights, views), so everything shared is copied.
    seen: set[int] = set()
    own: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        memory = tensor.untyped_storage()
        is_shared = memory.data_ptr() in seen or memory.nbytes() != tensor.numel() * tensor.element_size()
        own[name] = tensor.clone() if is_shared else tensor
        seen.add(memory.data_ptr())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        safetensors.torch.save_file(own, temporary, metadata={"format": "pt"} | (metadata or {}))
        temporary.chmod(0o644)  # the library makes it readable for its owner only, which surprises in shared folders
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
