"""How do time and memory of training grow, and how near is a step to what the machine can do?

    python -m benchmarks.scaling                     # the quickstart's U-Net; some minutes on two CPU cores
    python -m benchmarks.scaling --rows images --model pokemon
    python -m benchmarks.scaling --table             # what was measured, as a table

Five rows of numbers: images in the data set (the latents of up to 20,000 are made up on disk, in the files of the
training cache), images in a batch, side of the images in pixels, and steps since the start. All values of one of the
first three are timed in turn, several rounds over. Memory is what the run of a value has added after two steps: on
a CPU without the mapped files (Linux), on a GPU the peak. The optimizer is AdamW, and there is no average. The fifth,
encoding, is what comes before the steps: seconds for an image when that many are encoded into an empty cache (monsters
and their mirrors, drawn beforehand, and their captions), each value once. `--values` measures some values instead of a
whole row, and leaves the others of the row as they were.

The share of the limit: the floating-point operations of a step, as PyTorch counts them (not those of fused attention in
float32 on a CPU), over the rate at which this machine multiplied two large matrices of the same type in the same run.
Results go to scaling.json.
"""

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contestants import MODELS, Case, Training, build
from benchmarks.measuring import device_option, keep, kept, machine, parse, positive, print_to_the_end, seconds
from pokemon_dataset import load_captioned_images
from training.captioned_latents import memory_for_data, prepare
from training.encoded_cache import EncodedCache, Rows, sha256
from training.reproducible import Processes, resolve_precision

RESULTS = Path(__file__).with_suffix(".json")
ROWS = {
    "images": [500, 2000, 5000, 20_000],
    "batch": [8, 16, 32, 64, 128],
    "side": [64, 128, 192, 256],
    "steps": [1, 100, 200, 300],
    "encoding": [125, 250, 500, 1000],
}
ROUNDS = 9


def training(model: str, device: torch.device, folder: Path, images: int, batch: int, side: int) -> Training:
    """A run on made-up images of that many pixels a side."""
    h, budget = side // 8, memory_for_data(device)
    unet = build(Case("train", model, "float32", device.type), "ours").unet
    moments = made_up(folder, (1, 8, h, h), images, device, budget)
    contexts = made_up(folder, (77, unet.config.context_dim), images + 1, device, budget - moments.nbytes)
    return Training(unet, moments, contexts, batch, resolve_precision("auto", device))


def made_up(folder: Path, shape: tuple[int, ...], count: int, device: torch.device, budget: int) -> Rows:
    """Random rows in a cache as training leaves one; those that are there already are taken."""
    cache = EncodedCache(folder, {"made_up": "yes"}, shape)
    keys = [sha256(f"{shape} {i}".encode()) for i in range(count)]
    missing, rng = cache.missing(keys), np.random.default_rng(0)
    for start in range(0, len(missing), 256):
        some = missing[start : start + 256]
        cache.append(some, rng.standard_normal((len(some), *shape), np.float32).astype(np.float16))
    cache.close()
    cache.missing(keys)
    return Rows(cache, keys, device, budget)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in the product of two matrices of 2048×2048 (8192 on a GPU); best of five."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device.type) for _ in range(5))


def operations(trainer: Training) -> int:
    """Of one step, counted (matrix products and convolutions)."""
    with FlopCounterMode(display=False) as counter:
        trainer.step()
    return counter.get_total_flops()


def values_of(name: str, chosen: list[int] | None) -> list[int]:
    """What a row is measured at, rising: its own values or those chosen. ValueError if they cannot be measured."""
    values = sorted(set(chosen or ROWS[name]))
    if name == "side" and any(value % 8 for value in values):
        raise ValueError("--values of the row side must be multiples of 8, of which latents have one.")
    if name == "steps" and any(after - before < ROUNDS for before, after in pairwise(values)):
        raise ValueError(f"--values of the row steps must be {ROUNDS} apart or more: so many steps are timed at each.")
    return values


def row(name: str, model: str, device: torch.device, folder: Path, values: list[int] | None = None) -> list[dict]:
    """For each value of a row: seconds of a step, memory that the run added, and operations of a step."""
    shape, values = MODELS[model], values_of(name, values)
    usual = {"images": 500} | dict(zip(("side", "batch"), shape.training_on(device.type), strict=True))
    if name == "steps":
        return list(along_a_run(training(model, device, folder, **usual), device, values))
    if name == "encoding":
        return [encoding(model, device, folder / str(images), images) for images in values]
    results, trainers = [], []
    for value in values:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before = memory(device)
        trainers.append(training(model, device, folder, **usual | {name: value}))
        results.append({"value": value, "operations": operations(trainers[-1])})
        trainers[-1].step()
        results[-1]["memory_mb"] = memory(device) - before
    times: list[list[float]] = [[] for _ in trainers]
    for _ in range(ROUNDS):
        for of_trainer, trainer in zip(times, trainers, strict=True):
            of_trainer.append(seconds(trainer.step, device.type))
    return [result | {"seconds": values} for result, values in zip(results, times, strict=True)]


def along_a_run(trainer: Training, device: torch.device, values: list[int]) -> Iterator[dict]:
    """One run, timed for some steps from each step of the row on."""
    before, count, taken = memory(device), operations(trainer), 1
    for value in values:
        while taken < value:
            trainer.step()
            taken += 1
        times = [seconds(trainer.step, device.type) for _ in range(ROUNDS)]
        taken += ROUNDS
        yield {"value": value, "operations": count, "seconds": times, "memory_mb": memory(device) - before}


def encoding(model: str, device: torch.device, folder: Path, images: int) -> dict:
    """Seconds for an image of so many, from a drawn data set to rows that training can gather."""
    shape, before = MODELS[model], memory(device)
    drawn = load_captioned_images(f"monsters:{images}", drawn_size=shape.train_side)
    networks = build(Case("pictures", model, "float32", device.type), "ours")
    how = (shape.train_side, Processes(0, 1, device), resolve_precision("auto", device))
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", folder):
        taken = seconds(lambda: prepare(drawn, networks.vae, networks.text_encoder, *how), device.type)
    return {"value": images, "seconds": [taken / images], "memory_mb": memory(device) - before}


def memory(device: torch.device) -> float:
    """What this process holds, in MB: on a CPU now and without mapped files, on a GPU at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def table(results: list[dict]) -> str:
    """Markdown, a line for each value; times relative to the first value of the row, since machines differ."""
    results = sorted(results, key=lambda result: (list(ROWS).index(result["row"]), result["value"]))
    lines = ["| row | value | time of a step, or an image | memory (MB) | share of the limit |", "| --- " * 5 + "|"]
    first: dict[str, float] = {}
    for result in results:
        median = statistics.median(result["seconds"])
        start = first.setdefault(result["row"], median)
        share = f"{result['operations'] / median / result['rate']:.0%}" if "operations" in result else ""
        cells = [result["row"], f"{result['value']:,}", f"{median / start:.2f}×", f"{result['memory_mb']:+.0f}"]
        lines.append(f"| {' | '.join([*cells, share])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--values", nargs="+", type=positive, metavar="N", help="instead of the row's own")
    parser.add_argument("--model", default="quickstart", choices=list(MODELS))
    parser.add_argument("--device", default="auto", type=device_option, help="auto, cpu or cuda")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parse(parser, RESULTS)
    try:
        values = {name: values_of(name, options.values) for name in options.rows}
    except ValueError as error:
        parser.error(str(error))
    device = options.device
    same = ("row", "model", "device_name", *(["value"] if options.values else []))  # else the whole row is another
    with tempfile.TemporaryDirectory() as folder:
        for name in [] if options.table else values:
            rate = matrix_rate(device, resolve_precision("auto", device))
            about = {"row": name, "model": options.model, "rate": rate} | machine(device.type)
            measured = [about | result for result in row(name, options.model, device, Path(folder), values[name])]
            keep(RESULTS, measured, same)
    groups: dict[tuple, list[dict]] = {}
    for result in kept(RESULTS):
        groups.setdefault((result["model"], result["device_name"]), []).append(result)
    print_to_the_end("\n".join(f"{model} on {name}:\n{table(found)}" for (model, name), found in groups.items()))


if __name__ == "__main__":
    main()
