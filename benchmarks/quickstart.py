"""Which recipe paints the best monsters in a few minutes on a CPU? One change at a time, trained equally long.

    python -m benchmarks.quickstart                                # all rows, seeds 0, 1 and 2: many hours
    python -m benchmarks.quickstart --rows preset adamw --seeds 0
    python -m benchmarks.quickstart --table                        # what was measured, as a table

A row is the preset `monsters` with other options, or with a change to the training step that is tried here only. Its
speed is measured beside the preset's and gives the number of steps that take as long as the preset's; drawing and
encoding are not counted. What comes out is added to quickstart.json: the validation loss, and for 64 monsters that were
never trained on (15 steps of DPM-Solver++(2M), guidance 3) the R-precision and the share in the colour asked for.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import train_stable_diffusion
from benchmarks.measuring import keep, kept, last_validation_loss, machine, parse, print_to_the_end
from train_stable_diffusion import Batch, draw_batch
from training.options import parse_options
from training.presets import PRESETS, UNetOptions
from training.reproducible import generator_for

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_suffix(".json")
TIMED_STEPS, UNSEEN = 40, 64

# ----------------------------------------------------------------------------------------------------------------------
# Rows: options, or another batch
# ----------------------------------------------------------------------------------------------------------------------


def middle_timesteps(batch: Batch, options: UNetOptions, step: int) -> None:
    """Timesteps from a logit-normal distribution, more of them in the middle (Esser et al. 2024, Equation 19)."""
    generator = generator_for(batch.t.device, options.seed, "logit-normal", step)
    normal = torch.randn(len(batch.t), generator=generator, device=batch.t.device)
    batch.t = (torch.sigmoid(normal) * 1000).long()


def independent_timesteps(batch: Batch, options: UNetOptions, step: int) -> None:
    """A timestep for each image by itself, as DDPM draws them, not spread evenly over the batch."""
    generator = generator_for(batch.t.device, options.seed, "independent", step)
    batch.t = torch.randint(1000, (len(batch.t),), generator=generator, device=batch.t.device)


def nearest_noise(batch: Batch, options: UNetOptions, step: int) -> None:
    """For each image the nearest of eight noises to its latents (Immiscible Diffusion, Li et al. 2024)."""
    generator = generator_for(batch.t.device, options.seed, "nearest", step)
    shape = (len(batch.noise), 8, *batch.noise.shape[1:])
    candidates = torch.randn(shape, generator=generator, device=batch.t.device)  # (N, 8, 4, h, w)
    distances = (candidates - batch.latents[:, None]).square().sum(dim=(2, 3, 4))  # (N, 8)
    batch.noise = candidates[torch.arange(len(candidates)), distances.argmin(dim=1)]


def changing(change: Callable[[Batch, UNetOptions, int], None]) -> Callable[..., Batch]:
    """`draw_batch` with a change to each batch."""

    def draw(data: object, chosen: object, model: object, options: UNetOptions, step: int, processes: object) -> Batch:
        batch = draw_batch(data, chosen, model, options, step, processes)
        change(batch, options, step)
        return batch

    return draw


ROWS: dict[str, list[str] | Callable] = {
    "preset": [],
    "adamw": ["--optimizer", "adamw", "--learning_rate", "2e-3"],
    "half the rate": ["--learning_rate", "3e-3"],
    "twice the rate": ["--learning_rate", "12e-3"],
    "batches of 32": ["--batch_size", "32"],
    "batches of 128": ["--batch_size", "128"],
    "narrower": ["--block_out_channels", "32", "64", "128"],
    "less weight decay": ["--weight_decay", "0.01"],
    "more weight decay": ["--weight_decay", "0.3"],
    "no text on 8x8": ["--attention_levels", "0", "0", "1"],
    "deeper": ["--layers_per_block", "2"],
    "1000 monsters": ["--dataset", "monsters:1000"],
    "4000 monsters": ["--dataset", "monsters:4000"],
    "shorter average": ["--ema_decay", "0.98"],
    "longer average": ["--ema_decay", "0.995"],
    "v-prediction": ["--prediction_type", "v_prediction"],
    "all timesteps weigh 1": ["--min_snr_gamma", "0"],
    "float32": ["--precision", "float32"],
    "192 pixels": ["--resolution", "192"],
    "independent timesteps": independent_timesteps,
    "logit-normal timesteps": middle_timesteps,
    "nearest of 8 noises": nearest_noise,
}

# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------


def command_of(row: str) -> list[str]:
    """What makes a row, but for seed and steps."""
    changes = ROWS[row]
    return ["--preset", "monsters", *(changes if isinstance(changes, list) else [])]


def train(row: str, folder: Path, *options: str) -> None:
    """One training run, in a process of its own."""
    argv = ["--output_dir", str(folder), "--preview_every", "0", "--overwrite", *options]
    command = [sys.executable, "-m", "benchmarks.quickstart", "--train", row, "--", *command_of(row), *argv]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def speed_of(row: str, folder: Path) -> float:
    """Images a second in training."""
    quiet = ("--validate_every", "0", "--final_samples", "0", "--log_every", "10")
    train(row, folder, "--max_steps", str(TIMED_STEPS), *quiet)
    with open(folder / "speed.csv", encoding="utf-8") as file:
        speeds = [float(line["images_per_second"]) for line in csv.DictReader(file)]
    return sorted(speeds[1:])[len(speeds[1:]) // 2]


def batch_size_of(row: str) -> int:
    return parse_options(UNetOptions, command_of(row), PRESETS, "monsters").batch_size


def measure(row: str, seed: int, steps: int, folder: Path) -> dict:
    """Trains for so many steps, which ends with drawing and judging the unseen monsters."""
    train(row, folder, "--max_steps", str(steps), "--seed", str(seed), "--final_samples", str(UNSEEN))
    report = json.loads((folder / "unseen.json").read_text(encoding="utf-8"))
    kept = ("r_precision", "on_white_in_the_colour", "r_precision_of_real_images", "r_precision_of_shuffled_images")
    measured = {"row": row, "seed": seed, "steps": steps, "validation_loss": last_validation_loss(folder)}
    return measured | {k: report[k] for k in kept} | {"recipe": recipe(row)}


def recipe(row: str) -> dict:
    """What the figures belong to: of an older preset, or of a row that has changed, they are not shown."""
    return {"preset": PRESETS["monsters"], "row": command_of(row)}


def table(results: list[dict]) -> str:
    """Markdown: for each row the mean over its seeds, with the range."""

    def cell(values: list[float], form: str) -> str:
        mean, low, high = sum(values) / len(values), min(values), max(values)
        return format(mean, form) + (f" ({format(low, form)}…{format(high, form)})" if low < high else "")

    lines = ["| row | options | steps | seeds | R-precision | colour | validation loss |", "| --- " * 7 + "|"]
    for row in ROWS:
        of_row = [result for result in results if result["row"] == row and result.get("recipe") == recipe(row)]
        if of_row:
            changes = ROWS[row]
            options = " ".join(changes) if isinstance(changes, list) else f"`{changes.__name__}`, tried here only"
            forms = {"r_precision": ".0%", "on_white_in_the_colour": ".0%", "validation_loss": ".4f"}
            cells = [cell([result[name] for result in of_row], form) for name, form in forms.items()]
            lines.append(f"| {' | '.join([row, options, str(of_row[0]['steps']), str(len(of_row)), *cells])} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--train"]:
        row, _, *argv = sys.argv[2:]
        if callable(ROWS[row]):
            train_stable_diffusion.draw_batch = changing(ROWS[row])
        train_stable_diffusion.main(argv)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parse(parser, RESULTS)
    with tempfile.TemporaryDirectory() as temporary:
        for row in [] if options.table else options.rows:
            folder, steps = Path(temporary) / "run", PRESETS["monsters"]["max_steps"]
            if row != "preset":
                speeds = [(speed_of("preset", folder), speed_of(row, folder)) for _ in range(2)]
                share = sum(b for _, b in speeds) / sum(a for a, _ in speeds)
                steps = round(steps * share * batch_size_of("preset") / batch_size_of(row))
            for seed in options.seeds:
                result = measure(row, seed, steps, folder) | machine("cpu")
                keep(RESULTS, [result], ("row", "seed", "recipe", "device_name"))
                print(json.dumps(result), flush=True)
    machines: dict[str, list[dict]] = {}
    for result in kept(RESULTS):
        machines.setdefault(result["device_name"], []).append(result)
    print_to_the_end("\n".join(f"{name}:\n{table(found)}" for name, found in machines.items()))


if __name__ == "__main__":
    main()
