"""What does each trick bring? Our own networks with one trick more at a time, timed in turn in one process.

    python -m benchmarks.tricks                                       # the quickstart's networks and those of `pokemon`
    python -m benchmarks.tricks --models sd15 --rows unet --dtypes bfloat16 --rounds 3
    python -m benchmarks.tricks --table                               # what was measured, as a table

A U-Net's guidance batch is timed with none of them, then with each in the order of a sampling, on top of those before
it; so are an encoder and a decoder of one image (see layers.py); a training step without and with gradient
checkpointing. A ratio is the time of the line above over that of the line in the same round:
above 1, the trick is worth it. The table has the median over the rounds and, in brackets, the smallest and the largest.
All of it on a CPU, the only one that has these tricks but for checkpointing. Results are added to tricks.json.
"""

import argparse
import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import layers
import sampling.packed
from benchmarks.compare_diffusers import no_grad
from benchmarks.contestants import MODELS, Case, Training, build
from benchmarks.measuring import keep, kept, machine, parse, positive, print_to_the_end, seconds

RESULTS = Path(__file__).with_suffix(".json")
CHANNELS_LAST = "weights channels-last, not contiguous"
TEXT = "keys and values of the text beforehand"
ORDERED = "convolutions' weights ordered once"
LINEAR = "those of linear layers, too"
HALVED = "large 3×3 convolutions in half the multiplications"
BLOCKS = "attention in blocks"
CHECKPOINTING = "gradient checkpointing"
TRICKS = {
    "unet": (CHANNELS_LAST, TEXT, ORDERED, LINEAR, HALVED, BLOCKS),
    "vae_encode": (HALVED, BLOCKS),
    "vae_decode": (HALVED, BLOCKS),
    "train": (CHECKPOINTING,),
}
Tricks = tuple[str, ...]
Turn = Callable[[Tricks], contextlib.AbstractContextManager[Callable[[], object]]]  # gives the work with some tricks


def unet(case: Case) -> Turn:
    """The guidance batch of one image through the U-Net."""
    model, dtype, network = MODELS[case.model], case.torch_dtype, build(case, "ours").unet
    h = model.side // 8
    x, text = (torch.randn(2, *shape).to(dtype) for shape in ((4, h, h), (77, model.unet.context_dim)))
    t = torch.full((2,), 500)

    @contextlib.contextmanager
    def turn(tricks: Tricks) -> Iterator[Callable[[], object]]:
        network.to(memory_format=torch.channels_last if CHANNELS_LAST in tricks else torch.contiguous_format)
        with torch.no_grad():
            context = network.keys_and_values(text) if TEXT in tricks else text
        kinds = (nn.Conv2d,) * (ORDERED in tricks) + (nn.Linear,) * (LINEAR in tricks)
        ordered = {plain: packed for plain, packed in sampling.packed.PACKED.items() if issubclass(plain, kinds)}
        with layers_of(tricks), mock.patch.object(sampling.packed, "PACKED", ordered):
            sampling.packed.pack(network)
            try:
                yield no_grad(lambda: network(x, t, context))
            finally:
                sampling.packed.unpack(network)

    return turn


def vae_encode(case: Case) -> Turn:
    """One image through the encoder."""
    return vae_half(build(case, "ours").vae.encode, case, 3, MODELS[case.model].side)


def vae_decode(case: Case) -> Turn:
    """One image's latents through the decoder."""
    return vae_half(build(case, "ours").vae.decode, case, 4, MODELS[case.model].side // 8)


def vae_half(half: Callable[[torch.Tensor], object], case: Case, channels: int, side: int) -> Turn:
    x = torch.randn(1, channels, side, side).to(case.torch_dtype)

    @contextlib.contextmanager
    def turn(tricks: Tricks) -> Iterator[Callable[[], object]]:
        with layers_of(tricks):
            yield no_grad(lambda: half(x))

    return turn


def train(case: Case) -> Turn:
    """A training step on latents and text encodings that are at hand."""
    model, network = MODELS[case.model], build(case, "ours").unet
    pixels, N = model.training_on("cpu")
    h = pixels // 8
    moments = torch.randn(N, 1, 8, h, h, dtype=torch.float16)
    contexts = torch.randn(N + 1, 77, model.unet.context_dim, dtype=torch.float16)
    trainer = Training(network, moments, contexts, N, case.torch_dtype)

    @contextlib.contextmanager
    def turn(tricks: Tricks) -> Iterator[Callable[[], object]]:
        network.gradient_checkpointing = CHECKPOINTING in tricks
        yield trainer.step

    return turn


def layers_of(tricks: Tricks) -> contextlib.AbstractContextManager:
    """Within, convolutions and attention compute as they do, or as PyTorch's own."""
    never = float("inf")
    return mock.patch.multiple(
        layers,
        PIXELS_FROM=layers.PIXELS_FROM if HALVED in tricks else never,
        QUERIES_FROM=layers.QUERIES_FROM if BLOCKS in tricks else never,
    )


WORK = {"unet": unet, "vae_encode": vae_encode, "vae_decode": vae_decode, "train": train}


def measure(case: Case, rounds: int) -> dict:
    """Seconds in each round with none of the tricks, with the first, with the first two, and so on."""
    turn, names = WORK[case.row](case), tricks_of(case)
    times: dict[str, list[float]] = {name: [] for name in ("none", *names)}
    for _ in range(rounds):
        for count, name in enumerate(times):
            with turn(names[:count]) as work:
                work()  # which orders weights
                times[name].append(seconds(work, "cpu"))
    return {"row": case.row, "model": case.model, "dtype": case.dtype, "seconds": times}


def tricks_of(case: Case) -> Tricks:
    """Those of a row and a dtype; in bfloat16, multiplications are halved behind an upsampling only: an encoder has
    none."""
    without = BLOCKS if case.dtype == "float32" else HALVED if case.row == "vae_encode" else None
    return tuple(trick for trick in TRICKS[case.row] if trick != without)


def table(results: list[dict]) -> str:
    """Markdown, a line for each trick, a column for each model and dtype."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for result in results:
        column = f"{result['model']}, {result['dtype']}"
        for (_, before), (name, after) in itertools.pairwise(result["seconds"].items()):
            ratios = [b / a for b, a in zip(before, after, strict=True)]
            cell = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}…{max(ratios):.2f})"
            cells.setdefault((result["row"], name), {})[column] = cell
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    lines = [f"| row | trick | {' | '.join(columns)} |", "| --- " * (2 + len(columns)) + "|"]
    lines += [
        f"| {row} | {name} | {' | '.join(line.get(column, '') for column in columns)} |"
        for (row, name), line in cells.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(WORK), choices=list(WORK), metavar="ROW")
    parser.add_argument("--models", nargs="+", default=["quickstart", "pokemon"], choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=positive, default=5, metavar="N")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parse(parser, RESULTS)
    for row, model, dtype in [] if options.table else itertools.product(options.rows, options.models, options.dtypes):
        case = Case(row, model, dtype)
        if tricks_of(case):
            result = measure(case, options.rounds) | machine("cpu")
            keep(RESULTS, [result], ("row", "model", "dtype", "device_name"))
            print(table([result]), flush=True)
    for name in dict.fromkeys(result["device_name"] for result in kept(RESULTS)):
        print_to_the_end(f"{name}:\n{table([r for r in kept(RESULTS) if r['device_name'] == name])}")


if __name__ == "__main__":
    main()
