"""What the training scripts share: options and presets, processes, randomness, averaging, and the run folder.

The loops themselves are in `train_stable_diffusion.py`, `train_vae.py` and `train_clip.py`: they are what you read.
"""

import argparse
import copy
import csv
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn
from transformers import HfArgumentParser

Options = TypeVar("Options")

# ----------------------------------------------------------------------------------------------------------------------
# Options: dataclass defaults < preset < config file (or the run being resumed) < command line
# ----------------------------------------------------------------------------------------------------------------------


def parse_options(
    cls: type[Options], argv: list[str], presets: dict[str, dict] | None = None, default_preset: str | None = None
) -> Options:
    """The options of a run. An unknown option or value ends the program with one sentence.

    `--config FILE` (YAML or JSON) sets options by name; `--resume` takes up those of the run in `--output_dir`.
    `--help` shows the defaults of the preset that stands beside it.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=None)
    first.add_argument("--config", default=None)
    first.add_argument("--output_dir", default=None)
    first.add_argument("--resume", action="store_true")
    early, _ = first.parse_known_args(argv)

    from_file = read_config_file(cls, early.config) if early.config else {}
    preset = early.preset or from_file.get("preset") or default_preset
    defaults: dict[str, Any] = {}
    if presets is not None:
        if preset not in presets:
            raise ValueError(f"--preset {preset}: choose one of {', '.join(presets)}.")
        defaults |= presets[preset] | {"preset": preset}
    defaults |= from_file
    if early.resume:
        output_dir = early.output_dir or defaults.get("output_dir") or _default(cls, "output_dir")
        defaults |= _options_of_run(cls, Path(output_dir))

    parser = HfArgumentParser(cls, allow_abbrev=False)
    parser.add_argument("--config", default=None, metavar="FILE", help="YAML or JSON file with options by name")
    parser.set_defaults(**defaults)
    namespace = vars(parser.parse_args(argv))
    namespace.pop("config")
    return cls(**namespace)


def read_config_file(cls: type, path: str) -> dict:
    """Options by name from a YAML or JSON file; ValueError names an unknown one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    try:
        content = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: not YAML or JSON ({str(error).splitlines()[0]}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must hold options as `name: value`.")
    known = {f.name for f in fields(cls)}
    for name in content:
        if name not in known:
            raise ValueError(f"--config {path}: there is no option {name!r}; see --help.")
    return content


def _default(cls: type, name: str) -> Any:
    field = next(f for f in fields(cls) if f.name == name)
    return field.default if field.default is not MISSING else field.default_factory()


def _options_of_run(cls: type, folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"--resume: {folder} holds no run to go on with (no config.json); check --output_dir.")
    options = json.loads((folder / "config.json").read_text())["options"]
    return {name: value for name, value in options.items() if name in {f.name for f in fields(cls)}}


def run(main: Callable[[list[str]], None]) -> None:
    """Runs a script's `main`: what the user can mend ends in one sentence, not a traceback."""
    try:
        main(sys.argv[1:])
    except (OSError, ValueError, FloatingPointError) as error:
        if os.environ.get("DEBUG"):
            raise
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError as error:
        sys.exit(
            f"error: out of memory ({str(error).splitlines()[0]}): lower --batch_size or raise --gradient_accumulation."
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# ----------------------------------------------------------------------------------------------------------------------
# Processes
# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """This process among those that `torchrun` started; one alone is rank 0 of 1."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        if self.count > 1:
            dist.all_reduce(value)
            value = value / self.count
        return value


def join_processes(device: torch.device) -> Processes:
    """Joins the group that `torchrun` describes in the environment, if it did; each process takes a GPU of its own."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Processes(0, 1, device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Processes(dist.get_rank(), count, device)


# ----------------------------------------------------------------------------------------------------------------------
# Randomness, precision, learning rate, averaging
# ----------------------------------------------------------------------------------------------------------------------


def generator_for(device: torch.device, *key: int | str) -> torch.Generator:
    """A generator that is a function of `key` alone, such as (seed, "noise", step): what a resumed run needs.

    The key is hashed, since the CPU's generator keeps 32 bits of its seed and neighbours must not look alike.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


def batch_indices(count: int, batch_size: int, step: int, seed: int, device: torch.device) -> Tensor:
    """Which pictures step `step` sees, (batch_size,): every picture once an epoch, shuffled by (seed, epoch)."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // count, positions[-1] // count + 1)
    shuffled = [torch.randperm(count, generator=generator_for(device, seed, "epoch", e), device=device) for e in epochs]
    start = positions[0] - epochs[0] * count
    return torch.cat(shuffled)[start : start + batch_size]


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type that autocast computes in: "auto" is bfloat16 where the hardware has it, else float32."""
    if name not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"--precision {name}: choose auto, float32 or bfloat16.")
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return torch.bfloat16 if _cpu_has_bf16() else torch.float32
    return torch.float32


def _cpu_has_bf16() -> bool:
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def learning_rate_at(step: int, peak: float, warmup: int, total: int, floor: float = 0.0) -> float:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` · peak at `total`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


class EMA:
    """An exponential moving average of a network's weights (Polyak): noisy steps, smooth pictures.

    The decay warms up as (1 + step) / (10 + step), so that the average forgets the random start soon. `device` is where
    it is kept, the module's own if None.
    """

    def __init__(self, module: nn.Module, decay: float, device: torch.device | str | None = None) -> None:
        self.decay = decay
        self.module = copy.deepcopy(module).eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        averages, current = list(self.module.parameters()), list(module.parameters())
        if averages[0].device == current[0].device:
            torch._foreach_lerp_(averages, current, 1 - decay)
        else:
            for average, parameter in zip(averages, current, strict=True):  # one by one: no second copy of the network
                average.lerp_(parameter.to(average.device), 1 - decay)


# ----------------------------------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------------------------------


class RunFolder:
    """A folder that explains itself: config.json, metrics.csv, loss.png, and files that are whole or not there."""

    COLUMNS = ("step", "loss", "validation_loss", "learning_rate", "gradient_norm", "pictures_per_second")

    def __init__(self, path: str | Path, options: Any, resume: bool, columns: tuple[str, ...] = COLUMNS) -> None:
        self.path, self.columns = Path(path), columns
        if (self.path / "training_state.pt").exists() and not resume:
            raise FileExistsError(
                f"--output_dir {path}: holds a run already; pass --resume to go on with it, or another folder."
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self.write_text("config.json", json.dumps({"options": asdict(options), **_surroundings()}, indent=2) + "\n")
        if not resume:
            self.write_text("metrics.csv", ",".join(columns) + "\n")
        self.wandb: Any = None

    def write_text(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        temporary.write_text(text)
        temporary.replace(self.path / name)

    def forget_after(self, step: int) -> None:
        """Drops the metrics of steps that a resumed run will take again."""
        if (self.path / "metrics.csv").exists():
            kept = [row for row in self.metrics() if int(row["step"]) <= step]
            lines = [",".join(self.columns), *(",".join(row[c] for c in self.columns) for row in kept)]
            self.write_text("metrics.csv", "\n".join(lines) + "\n")

    def log(self, step: int, **values: float) -> None:
        """Appends a row to metrics.csv, and sends it to W&B if that is on."""
        with open(self.path / "metrics.csv", "a", newline="") as file:
            row = {name: f"{value:.6g}" for name, value in values.items()} | {"step": step}
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        if self.wandb is not None:
            self.wandb.log(values, step=step)

    def log_picture(self, step: int, name: str, file: Path) -> None:
        if self.wandb is not None:
            import wandb

            self.wandb.log({name: wandb.Image(str(file))}, step=step)

    def metrics(self) -> list[dict[str, str]]:
        with open(self.path / "metrics.csv", newline="") as file:
            return list(csv.DictReader(file))

    def plot(self, curves: dict[str, str], ylabel: str, file: str = "loss.png", log_scale: bool = False) -> None:
        """Draws columns of metrics.csv against the step; `curves` maps a column to its label."""
        from matplotlib.figure import Figure  # imported when used: it is slow to load

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=ylabel)
        rows = self.metrics()
        for column, label in curves.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 40 else None)
        if axes.lines:
            axes.legend()
        if log_scale:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
        figure.savefig(self.path / file, dpi=110)

    def save_state(self, state: dict) -> None:
        """Writes training_state.pt whole or not at all."""
        temporary = self.path / ".training_state.pt.tmp"
        torch.save(state, temporary)
        temporary.replace(self.path / "training_state.pt")

    @staticmethod
    def load_state(folder: Path, device: torch.device) -> dict:
        """What `save_state` wrote; a missing or damaged file is one sentence.

        For a GPU it stays mapped from the disk, so that resuming takes no more memory than training does.
        """
        path = folder / "training_state.pt"
        if not path.is_file():
            raise FileNotFoundError(
                f"--resume: {path} is missing: this run has not reached a checkpoint; start without --resume."
            )
        try:
            return torch.load(path, map_location="cpu", mmap=device.type != "cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path}: cannot be read ({str(error).splitlines()[0]}); start again without --resume."
            ) from error

    def replace_folder(self, name: str, write: Callable[[Path], None]) -> None:
        """Lets `write` fill a temporary folder, then puts it in the place of `name`."""
        temporary, old = self.path / f".{name}.tmp", self.path / f".{name}.old"
        shutil.rmtree(temporary, ignore_errors=True)
        write(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if (self.path / name).exists():
            (self.path / name).rename(old)
        temporary.rename(self.path / name)
        shutil.rmtree(old, ignore_errors=True)

    def start_wandb(self, mode: str, project: str, options: Any) -> None:
        """auto: online if logged in, else offline with a line that says how to log in. Never a prompt that blocks."""
        if mode not in ("auto", "online", "offline", "off"):
            raise ValueError(f"--wandb {mode}: choose auto, online, offline or off.")
        if mode == "off" or os.environ.get("WANDB_MODE") == "disabled":
            return
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "--wandb: the package is not installed; pip install wandb, or pass --wandb off."
            ) from error
        logged_in = wandb.login(prompt=False)
        if mode == "online" and not logged_in:
            raise ValueError(
                "--wandb online: you are not logged in; run `wandb login`, or pass --wandb offline or off."
            )
        if mode == "auto" and not logged_in:
            print(
                "W&B: not logged in, so this run is kept offline; `wandb login` changes that, --wandb off silences it."
            )
        online = logged_in and mode != "offline"
        settings = wandb.Settings(silent=True, init_timeout=60)
        try:
            self.wandb = wandb.init(
                project=project,
                dir=self.path,
                config=asdict(options),
                mode="online" if online else "offline",
                settings=settings,
                name=self.path.name,
            )
        except Exception as error:  # W&B being down must not cost a training run
            print(f"W&B: could not start ({str(error).splitlines()[0]}); metrics.csv has everything.")

    def close(self) -> None:
        if self.wandb is not None:
            self.wandb.finish()


def _surroundings() -> dict:
    """What else decides a run: versions, commit, hardware."""
    packages = ("torch", "torchvision", "transformers", "datasets", "numpy", "pillow")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return {"versions": versions, "commit": git.stdout.strip() or "unknown", "hardware": device}


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to finish its step and save; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.asked = False
        self.process = os.getpid()
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:  # a worker that inherited this handler: it ends as workers do
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
