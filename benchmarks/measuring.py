"""How the benchmarks measure: seconds, losses, the machine's name, and result files that machines may share."""

import argparse
import csv
import json
import os
import sys
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


def positive(text: str) -> int:
    """A number of the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {text}")
    return number


def device_option(name: str) -> torch.device:
    """--device of the command line: auto, cpu or cuda."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    choices = dict.fromkeys(("auto", "cpu", best))
    if name not in choices:
        raise argparse.ArgumentTypeError(f"{name} is not available here; choose from {', '.join(choices)}")
    return torch.device(best if name == "auto" else name)


def parse(parser: argparse.ArgumentParser, results: Path) -> argparse.Namespace:
    """The command line, and a look at the results so far: what is measured would be lost if they could not be read."""
    options = parser.parse_args()
    try:
        kept(results)
    except (OSError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")
    return options


def print_to_the_end(text: str) -> None:
    """To standard output, as far as it is read: `| head` ends it without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left in the buffer


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
    """What was measured until now. ValueError if the file is no list of results."""
    try:
        results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): mend it, or move it away to begin a new one.") from error
    if not isinstance(results, list) or not all(isinstance(r, dict) and "device_name" in r for r in results):
        raise ValueError(f"{file} is no list of results: mend it, or move it away to begin a new one.")
    return results


def keep(file: Path, new: list[dict], same: tuple[str, ...]) -> list[dict]:
    """Adds results; older ones that agree with a new one in the fields `same` go. Returns all that are kept now.

    A field that a result lacks, since it is older than the field, counts as False.
    """

    def key(result: dict) -> str:
        return json.dumps([result.get(name, False) for name in same], sort_keys=True)

    replaced = {key(result) for result in new}
    results = [old for old in kept(file) if key(old) not in replaced] + new
    with atomically(file) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results
