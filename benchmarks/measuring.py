"""How the benchmarks measure: seconds, losses, the machine's name, and result files that machines may share."""

import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch

from training.reproducible import resolve_precision
from training.run_folder import atomically


def seconds(work: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def last_validation_loss(run_folder: Path) -> float:
    """Of a training run, from its metrics.csv."""
    with open(run_folder / "metrics.csv", encoding="utf-8") as file:
        return [float(line["validation_loss"]) for line in csv.DictReader(file) if line["validation_loss"]][-1]


def machine(device: str) -> dict:
    """What the figures were measured on."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        file = Path("/proc/cpuinfo")
        info = file.read_text(encoding="utf-8") if file.is_file() else ""
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.splitlines())}
        low = "with" if resolve_precision("auto", torch.device("cpu")) == torch.bfloat16 else "without"
        name = f"{fields.get('model name', 'CPU')}, {torch.get_num_threads()} threads, {low} bfloat16"
    return {"device_name": name, "torch": torch.__version__, "diffusers": diffusers.__version__}


def kept(file: Path) -> list[dict]:
    """What was measured until now."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def keep(file: Path, new: list[dict], same: tuple[str, ...]) -> list[dict]:
    """Adds results; older ones that agree with a new one in the fields `same` go. Returns all that are kept now."""

    def key(result: dict) -> str:
        return json.dumps([result.get(name) for name in same], sort_keys=True)

    replaced = {key(result) for result in new}
    results = [old for old in kept(file) if key(old) not in replaced] + new
    with atomically(file) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
