"""The folder of a run: config.json, metrics.csv, loss.png, samples/, model/, checkpoints/, each complete or not there.

Everything is written under a temporary name beside its place, flushed to the disk, and renamed: a kill, a full disk or
a power cut at any moment leaves the file that was there before. Checkpoints are zip files, whose checksums are verified
before one is trusted; if the newest is damaged, the one before it is used.
"""

import contextlib
import csv
import errno
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from training.reproducible import Processes, job_id
from training.script import UserError

# What a run leaves, which is never overwritten unasked; earlier versions wrote training_state.pt. The last
# is how a LoRA lies in a folder of its own, as the shipped one does.
PRODUCTS = (
    *("model", "best_model", "lora", "best_lora", "clip", "vae_model.pth", "training_state.pt"),
    "pytorch_lora_weights.safetensors",
)
FILES = ("config.json", "metrics.csv", "speed.csv", "scores.json", "loss.png", "psnr.png", "retrieval.png")


class DivergedError(UserError, FloatingPointError):
    """Training has left the finite numbers."""


# ----------------------------------------------------------------------------------------------------------------------
# Files that are written completely or not at all
# ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomically(path: Path, then: str = "go on with --resume") -> Iterator[Path]:
    """Gives a temporary name to write to; after the block the file or folder is on the disk and takes its own name.

    UserError if the disk is full: to make room, and `then` what goes on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    _remove(temporary)
    try:
        yield temporary
        for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
            _flush(file)
        if path.is_dir():  # cannot be renamed onto; `RunFolder` puts the old one back after a kill here
            _remove(old)
            path.rename(old)
        temporary.replace(path)
        _flush(path.parent)
        _remove(old)
    except Exception as error:
        told = re.search(r"os error (\d+)", str(error))  # safetensors' own errors have no errno
        if (int(told[1]) if told else getattr(error, "errno", None)) in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk is full; what was there before is untouched: make room and {then}."
            ) from error
        raise
    finally:
        _remove(temporary)


def _flush(path: Path) -> None:
    """Waits until the content of a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:  # file systems that cannot sync folders say so; a full disk is another matter
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """The folder of one run, held by one process at a time; made and locked at once, written to from `start` on."""

    def __init__(self, options: Any) -> None:
        """`options`: those of a training script, of which output_dir, resume and overwrite are read here."""
        path, resume, overwrite = options.output_dir, options.resume, options.overwrite
        self.path = Path(path)
        self._lock: IO | None = None
        try:
            self._is_new = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
        except OSError as error:
            raise UserError(
                f"--output_dir {path}: cannot be written to ({error.strerror}); choose another folder."
            ) from error
        self._put_back()
        present = [name for name in PRODUCTS if (self.path / name).exists()]
        present += ["checkpoints"] if any((self.path / "checkpoints").glob("*.pt")) else []
        if present and not resume and not overwrite:
            self.close()
            raise UserError(
                f"--output_dir {path}: holds a {present[0]} already; pass --resume to go on with that run, another "
                "folder, or --overwrite to lose it."
            )
        self.overwrite = overwrite and not resume
        for leftover in [self.path / f".{name}.tmp" for name in (*PRODUCTS, *FILES)]:
            _remove(leftover)
        for leftover in [*self.path.glob("checkpoints/.*.pt.tmp"), *self.path.glob("samples/.*.tmp")]:
            _remove(leftover)

    def _put_back(self) -> None:
        """Undoes what a kill between the two renames of `atomically` left."""
        for name in PRODUCTS:
            path, old = self.path / name, self.path / f".{name}.old"
            if old.exists():
                _remove(old) if path.exists() else old.rename(path)

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = self.path / ".lock"
        while self._lock is None:
            handle = open(file, "a+", encoding="utf-8")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                process = handle.read().strip() or "unknown"
                handle.close()
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    return  # a disk without locks, such as some network ones
                raise UserError(
                    f"--output_dir {self.path}: process {process} is writing there; wait for it to end, or choose "
                    "another folder."
                ) from error
            if file.exists() and os.path.samestat(os.fstat(handle.fileno()), os.stat(file)):
                handle.truncate(0)
                handle.write(str(os.getpid()))
                handle.flush()
                self._lock = handle
                if hasattr(os, "register_at_fork"):  # a worker that outlives this process must not hold the folder
                    os.register_at_fork(after_in_child=handle.close)
            else:  # the one before us removed it in between
                handle.close()

    def close(self) -> None:
        """Gives the folder free; one that was made for this run, and is still empty, goes again."""
        if self._lock is not None:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None
        if self._is_new:
            with contextlib.suppress(OSError):  # it holds something
                self.path.rmdir()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, options: Any, columns: tuple[str, ...]) -> None:
        """Begins a new run: config.json and an empty metrics.csv."""
        if self.overwrite:
            for name in (*PRODUCTS, "checkpoints", "samples", "metrics.csv", "speed.csv"):
                _remove(self.path / name)
        config = {"kind": type(options).__name__, "job": job_id(), "options": asdict(options), **environment()}
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")
        self.columns = columns
        self.write_text("metrics.csv", ",".join(columns) + "\n")

    def resume(self, options: Any, step: int, columns: tuple[str, ...], undone: list[str]) -> None:
        """Goes on after `step`: drops the rows of metrics.csv that will come again (`undone`: columns, of `step`).

        config.json keeps the options that the run started with, and gains a note of when it was resumed and with what.
        """
        self.columns = columns
        config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        now = asdict(options)
        changed = {
            name: value for name, value in now.items() if value != config["options"].get(name) and name != "resume"
        }
        config.setdefault("resumed", []).append({"after_step": step, "changed": changed, **environment()})
        config["options"] |= changed
        config["job"] = job_id()
        if not (self.path / "metrics.csv").is_file():
            print(f"{self.path / 'metrics.csv'} is missing: its rows up to step {step} are lost.", file=sys.stderr)
        rows = [row for row in self.metrics() if int(row["step"]) <= step]
        rows = [row for row in rows if int(row["step"]) < step or not any(row[column] for column in undone)]
        lines = [",".join(columns), *(",".join(row[c] for c in columns) for row in rows)]
        self.write_text("metrics.csv", "\n".join(lines) + "\n")
        self.write_text("config.json", json.dumps(config, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Writes a text file as UTF-8, whole or not at all."""
        with atomically(self.path / name) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a temporary folder, then puts it in the place of `name`."""
        with atomically(self.path / name) as temporary:
            temporary.mkdir()
            write(temporary)

    # ------------------------------------------------------------------------------------------------------------------
    # Metrics
    # ------------------------------------------------------------------------------------------------------------------

    def log(self, step: int, **values: float) -> None:
        """Appends a row to metrics.csv."""
        row = {"step": str(step)} | {name: f"{value:.6g}" for name, value in values.items()}
        self._append("metrics.csv", self.columns, row)

    def log_speed(self, step: int, images_per_second: float) -> None:
        """Appends to speed.csv: clocks differ between runs, the rows of metrics.csv do not."""
        columns = ("step", "images_per_second")
        if not (self.path / "speed.csv").exists():
            self.write_text("speed.csv", ",".join(columns) + "\n")
        self._append("speed.csv", columns, {"step": str(step), "images_per_second": f"{images_per_second:.4g}"})

    def _append(self, name: str, columns: tuple[str, ...], row: dict[str, str]) -> None:
        with open(self.path / name, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, lineterminator="\n").writerow(row)

    def metrics(self) -> list[dict[str, str]]:
        """The rows of metrics.csv. A last row that was cut short is left out; another damaged one is a UserError."""
        file = self.path / "metrics.csv"
        if not file.is_file():
            return []
        text = file.read_text(encoding="utf-8", errors="replace")
        header, *lines = text.splitlines() or [""]
        names = header.split(",")
        if names[0] != "step":
            raise UserError(f"{file}: the first line must be {','.join(self.columns)}; mend it, or delete the file.")
        rows = []
        for number, line in enumerate(lines, 2):
            cells = line.split(",")
            is_whole = len(cells) == len(names) and (number <= len(lines) or text.endswith("\n"))
            if is_whole and cells[0].isascii() and cells[0].isdigit() and all(map(_is_number, cells)):
                rows.append({column: "" for column in self.columns} | dict(zip(names, cells, strict=True)))
            elif number <= len(lines):
                raise UserError(f"{file}: line {number} is damaged ({line[:60]!r}); delete that line to go on.")
        return rows

    def plot(self, curves: dict[str, str], ylabel: str, file: str = "loss.png", **how: Any) -> None:
        """Draws columns of metrics.csv against the step; see `training.plots.draw_columns`."""
        from training.plots import draw_columns  # imported when used: matplotlib is slow to load

        figure = draw_columns(self.metrics(), curves, ylabel, **how)
        with atomically(self.path / file) as temporary:
            figure.savefig(temporary, dpi=110, format="png")

    # ------------------------------------------------------------------------------------------------------------------
    # Checkpoints
    # ------------------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, state: dict, keep: int, is_best: bool = False) -> None:
        """Writes a checkpoint and removes all but the last `keep`; the best one so far is kept as checkpoints/best.pt.

        UserError if the disk has no room for it, DivergedError if a tensor is not finite: earlier ones are untouched.
        """
        tensors = _tensors(state)
        # What is logged may well not be finite: a step that was skipped is counted there.
        if not all_finite([t for name, part in state.items() if name != "recent" for t in _tensors(part)]):
            raise DivergedError(
                f"step {state['step']}: NaN or infinity in the weights, which are not saved: --resume from the last "
                "checkpoint with a lower --learning_rate, or with --precision float32."
            )
        path = self.path / "checkpoints" / f"step_{state['step']:08d}.pt"
        needed, free = sum(t.nbytes for t in tensors), shutil.disk_usage(self.path).free
        with atomically(path) as temporary:
            if needed > free:
                raise UserError(
                    f"{path}: a checkpoint takes {_size(needed)} and the disk has {_size(free)} left; "
                    "earlier ones are untouched: make room and go on with --resume."
                )
            try:
                torch.save(state, temporary)
            except (
                RuntimeError
            ) as error:  # how PyTorch's zip writer reports a failed write, depending on where it fails
                if not any(
                    word in str(error) for word in ("PytorchStreamWriter", "write", "inline_container", "iostream")
                ):
                    raise
                raise OSError(errno.ENOSPC, str(error).splitlines()[0]) from error
        _flush(self.path / "metrics.csv")  # its rows up to here belong to this checkpoint
        if is_best:
            with atomically(path.with_name("best.pt")) as temporary:
                try:
                    os.link(path, temporary)  # a second name: no copy
                except OSError:
                    shutil.copyfile(path, temporary)
        for later in [p for p in checkpoints_in(self.path) if p.name > path.name]:
            later.unlink()  # damaged ones, which were passed over when this run was resumed from an earlier one
        for old in checkpoints_in(self.path)[keep:]:
            old.unlink()


def checkpoints_in(folder: Path) -> list[Path]:
    """checkpoints/step_00000500.pt and the like, the newest first."""
    return sorted((folder / "checkpoints").glob("step_*.pt"), reverse=True)


def load_checkpoint(folder: Path, device: torch.device) -> dict:
    """The newest checkpoint that is whole; says which ones are not. UserError if there is none.

    For a GPU it stays mapped from the disk, so that resuming takes no more memory than training does.
    """
    found = checkpoints_in(folder) + [p for p in [folder / "checkpoints" / "best.pt"] if p.exists()]
    if not found:
        raise UserError(
            f"--resume: {folder} has no checkpoint yet; start it again without --resume"
            + (", with --overwrite." if any((folder / name).exists() for name in PRODUCTS) else ".")
        )
    for path in found:
        try:
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
            state = torch.load(path, map_location="cpu", mmap=device.type != "cpu", weights_only=True)
            if not isinstance(state, dict) or not isinstance(state.get("step"), int):
                raise ValueError("it holds no step")
            return state
        except Exception as error:  # a damaged file fails anywhere: zipfile, pickle, struct, torch …
            print(f"{path}: damaged ({str(error).splitlines()[0][:120]}); trying the one before.", file=sys.stderr)
    raise UserError(f"--resume: no checkpoint in {folder / 'checkpoints'} can be read; start again with --overwrite.")


def is_own(folder: Path) -> bool:
    """Whether the run in `folder` was begun by this very job, and has saved something."""
    try:
        job = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("job")
    except (OSError, ValueError, AttributeError):
        return False
    return bool(job) and job == job_id() and bool(checkpoints_in(folder))


def load_common_checkpoint(folder: Path, processes: Processes) -> dict:
    """The newest checkpoint, on every process; UserError if they do not see the same one."""
    state = load_checkpoint(folder, processes.device)
    steps = sorted(set(processes.gather(state["step"])))
    if len(steps) > 1:
        raise UserError(
            f"--resume: the processes see checkpoints of different steps ({steps}): --output_dir {folder} must be on a "
            "disk that all machines share."
        )
    return state


def _tensors(state: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


def _is_number(cell: str) -> bool:
    try:
        return cell == "" or float(cell) is not None
    except ValueError:
        return False


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every number of all tensors is finite; one answer from the device."""
    floating = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    return not floating or bool(torch.stack([t.isfinite().all().cpu() for t in floating]).all())


def environment() -> dict:
    """What else decides a run: command, versions, commit, hardware."""
    packages = ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    git = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20, check=False)
        commit = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git here
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"command": command, "versions": versions, "commit": commit or "unknown", "hardware": device}


def _size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"
