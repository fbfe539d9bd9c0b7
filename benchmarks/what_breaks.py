"""What breaks if … One line of the code is spoiled at a time, and a model is trained or sampled with it: a gallery.

    python -m benchmarks.what_breaks                        # everything; about an hour on two CPU cores
    python -m benchmarks.what_breaks --rows "α for ᾱ" "guidance of 16"
    python -m benchmarks.what_breaks --page                 # only write the page anew from what was measured

A row is the preset `monsters` with one fault, same seed, same data, same steps; or the model without fault,
sampled with one. Of each, eight samples from the same noise (a PNG in what_breaks/), and of 64 captions that were never
trained on the R-precision and the share in the colour asked for. Figures go to what_breaks.json; what_breaks.md shows
all. A fault is put in here, from outside: the code has no switch for it.
"""

import argparse
import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from PIL import Image, ImageDraw
from torch import Tensor

import stable_diffusion_model
import train_stable_diffusion
import training.captioned_latents
from benchmarks.contestants import ROOT
from benchmarks.measuring import keep, kept, last_validation_loss, machine, parse
from evaluation.attention import SHIPPED_MODEL
from evaluation.obedience import Judge, measure_monsters, unseen_monsters
from guidance import Guidance
from images import image_sheet, save_png, to_pixels, to_rgb
from noise_schedule import NoiseSchedule
from stable_diffusion_model import StableDiffusion
from training.image_files import decode
from training.presets import PRESETS
from vae_model import VAE

FOLDER = Path(__file__).with_suffix("")  # of the sheets
RESULTS, PAGE = Path(__file__).with_suffix(".json"), Path(__file__).with_suffix(".md")
STEPS, UNSEEN, SHOWN = PRESETS["monsters"]["max_steps"], 64, 8
HOW = {"steps": 15, "guidance_scale": 3.0, "sampler": "dpm++2m", "height": 128, "width": 128}

# ----------------------------------------------------------------------------------------------------------------------
# The faults
# ----------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One fault: how it is put in, and what a reader should learn from it."""

    lesson: str
    options: tuple[str, ...] = ()  # of training
    fault: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    sampling: dict | None = None  # options of `sample`: a fault of sampling, on the model without fault
    model: Path | None = None  # another model to sample from


def without_scaling() -> contextlib.AbstractContextManager:
    """Raw latents as the VAE gives them, in training and in sampling."""
    same = {"scale_latents": lambda self, latents: latents, "unscale_latents": lambda self, latents: latents}
    return mock.patch.multiple(VAE, **same)


def without_unscaling() -> contextlib.AbstractContextManager:
    return mock.patch.object(VAE, "unscale_latents", lambda self, latents: latents)


def alpha_for_alpha_bar() -> contextlib.AbstractContextManager:
    """Training noises as if every timestep were the first: α_t = 1 - β_t is near 1 for all."""

    def add_noise(self: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha = (1 - self.betas)[t][:, None, None, None]
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    return mock.patch.object(NoiseSchedule, "add_noise", add_noise)


@contextlib.contextmanager
def images_changed_by(change: Callable[[Image.Image], Image.Image]) -> Iterator[None]:
    """Training sees other images; their latents go into a cache of their own."""

    def pixels_of(content: bytes, resolution: int) -> Tensor:
        return to_pixels(change(to_rgb(decode(content))), resolution)

    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.object(training.captioned_latents, "pixels_of", pixels_of),
        mock.patch.object(training.captioned_latents, "cache_folder", lambda kind: Path(cache) / kind),
    ):
        yield


def on_black(image: Image.Image) -> Image.Image:
    """What `convert("RGB")` makes of a transparent ground."""
    for corner in ((0, 0), (image.width - 1, 0), (0, image.height - 1), (image.width - 1, image.height - 1)):
        ImageDraw.floodfill(image, corner, (0, 0, 0), thresh=40)
    return image


def squashed(image: Image.Image) -> Image.Image:
    """An image of 16:9 pressed into a square."""
    wide = Image.new("RGB", (image.width * 16 // 9, image.height), "white")
    wide.paste(image, ((wide.width - image.width) // 2, 0))
    return wide.resize(image.size, Image.Resampling.BICUBIC)


def previous_timestep() -> contextlib.AbstractContextManager:
    """DDIM that goes from t to t-1 whatever its stride."""

    def grid_of(sampler: str, schedule: NoiseSchedule, steps: int, **options: object) -> object:
        grid = original(sampler, schedule, steps, **options)
        levels = tuple(schedule.alphas_cumprod[max(int(t) - 1, 0)].item() for t in grid.timesteps)
        return dataclasses.replace(grid, next_levels=levels)

    original = stable_diffusion_model.timestep_grid
    return mock.patch.object(stable_diffusion_model, "timestep_grid", grid_of)


def guidance_reversed() -> contextlib.AbstractContextManager:
    """The two halves of the guidance batch taken for each other."""

    def combine(self: Guidance, unconditional: Tensor, conditional: Tensor) -> Tensor:
        return conditional + self.scale * (unconditional - conditional)

    return mock.patch.object(Guidance, "combine", combine)


def noise_of_mean_0() -> contextlib.AbstractContextManager:
    """The shipped model starts above the mean of its latents; here it starts at 0, as diffusers would."""
    return mock.patch.object(StableDiffusion, "_start", lambda self, grid, noise: grid.start(noise))


ROWS = {
    "no fault": Row(
        "What the quickstart gives, seed 0. Here samples are made in float32; the training script makes them in "
        "bfloat16 and finds one image of 64 more, 94 %."
    ),
    "no caption dropout": Row(
        "Guidance needs the prediction for *no* caption, which was never trained: it pushes away from something "
        "arbitrary. `draw_batch` drops one caption in ten.",
        options=("--caption_dropout", "0"),
    ),
    "no scaling factor": Row(
        "Raw latents have a standard deviation of 4, not 1, so the noise of most timesteps leaves them readable: "
        "the schedule is made for data of unit variance (`VAE.scale_latents`). Sampling "
        "begins with pure noise, which training never showed: colours stay pale.",
        fault=without_scaling,
    ),
    "α for ᾱ": Row(
        "Training never shows more noise than one step adds. The U-Net has met nothing like the noise that sampling "
        "begins with; its validation loss, noised in the same wrong way, says nothing of that (`noised`).",
        fault=alpha_for_alpha_bar,
    ),
    "no average": Row(
        "The last weights instead of their moving average (`EMA`). The learning rate has come down to almost 0 by "
        "then, which averages as well: here nothing is lost.",
        options=("--ema_decay", "0"),
    ),
    "unweighted loss": Row(
        "All timesteps weigh the same in ε, so those with little noise, whose errors are largest, take most of "
        "the gradient; min-SNR evens that out (`loss_weight`). The validation loss, unweighted as well, is a little "
        "lower for it; what is drawn differs within chance.",
        options=("--min_snr_gamma", "0"),
    ),
    "transparent ground turned black": Row(
        '`convert("RGB")` makes a transparent ground black. The model learns that faithfully '
        "(`images.to_rgb` lays images on white).",
        fault=lambda: images_changed_by(on_black),
    ),
    "squashed instead of cropped": Row(
        "Images of 16:9 pressed into a square: the model learns thin monsters (`images.fit` crops). Its validation "
        "loss is the lowest of all, since there is more white: losses on other data cannot be compared.",
        fault=lambda: images_changed_by(squashed),
    ),
    "DDIM that goes from t to t-1": Row(
        "With 15 steps the stride is 66, not 1: each step takes away a 66th of the noise that it should, and what "
        "is left is noise (`timestep_grid`: `next_levels`).",
        fault=previous_timestep,
        sampling={"sampler": "ddim"},
    ),
    "DDIM as it should be": Row("For comparison.", sampling={"sampler": "ddim"}),
    "guidance of 16": Row(
        "Far beyond the training data: colours burn out, lines break.",
        sampling={"guidance_scale": 16.0},
    ),
    "guidance of 16, rescaled": Row(
        "The same with the spread of the conditional prediction restored (`guidance_rescale` 0.7, `Guidance.combine`): "
        "of little help to a model that predicts ε.",
        sampling={"guidance_scale": 16.0, "guidance_rescale": 0.7},
    ),
    "the halves of guidance swapped": Row(
        "Away from the prompt instead of towards it: the batch holds the empty prompt first (`Guidance.contexts`).",
        fault=guidance_reversed,
        sampling={},
    ),
    "latents not unscaled": Row(
        "The decoder gets a fifth of the contrast that it expects (`VAE.unscale_latents`).",
        fault=without_unscaling,
        sampling={},
    ),
    "the shipped model": Row(
        "512×512; its latents have a mean, and sampling starts above it.",
        sampling={"height": 512, "width": 512},
        model=SHIPPED_MODEL,
    ),
    "the shipped model from noise of mean 0": Row(
        "The last timestep keeps a little of the image, above all its mean brightness, which the U-Net has learned to "
        "read: it takes noise of mean 0 for a dark image (`StableDiffusion._start`).",
        fault=noise_of_mean_0,
        sampling={"height": 512, "width": 512},
        model=SHIPPED_MODEL,
    ),
}

# ----------------------------------------------------------------------------------------------------------------------
# Running them
# ----------------------------------------------------------------------------------------------------------------------


def file_of(row: str) -> str:
    return f"{list(ROWS).index(row):02d}.png"


def train(row: str, folder: Path) -> None:
    """Trains with the fault, to be called in a process of its own."""
    argv = ["--preset", "monsters", "--max_steps", str(STEPS), "--output_dir", str(folder), "--overwrite"]
    quiet = ["--preview_every", "0", "--final_samples", "0", "--wandb", "off"]
    train_stable_diffusion.main([*argv, *quiet, *ROWS[row].options])


def judge(row: str, model_folder: Path) -> dict:
    """Samples with the fault: the figures; the sheet goes into what_breaks/."""
    model = StableDiffusion.from_pretrained(model_folder)
    if ROWS[row].model:  # at 512×512 a CPU takes a third of the time in bfloat16, and half as many must do
        model.to(model.device, torch.bfloat16)
    asked = unseen_monsters(UNSEEN // 2 if ROWS[row].model else UNSEEN)
    how, made = HOW | (ROWS[row].sampling or {}), []
    for start in range(0, len(asked), SHOWN):
        prompts = [monster.caption for monster in asked[start : start + SHOWN]]
        made += model.sample(prompts, seeds=start, progress=False, **how)
    FOLDER.mkdir(exist_ok=True)
    sheet = image_sheet([image.resize((128, 128)) for image in made[:SHOWN]], columns=SHOWN)
    save_png(sheet.quantize(128).convert("RGB"), FOLDER / file_of(row))
    report = measure_monsters(made, asked, Judge.load())
    return {name: report[name] for name in ("r_precision", "on_white_in_the_colour")} | {"images": len(made)}


def measure(row: str, folder: Path) -> dict:
    """In this process: training if the fault is one of training, then samples."""
    with ROWS[row].fault():
        figures: dict = {"row": row, "validation_loss": None}
        if ROWS[row].sampling is None:
            train(row, folder)
            figures["validation_loss"] = last_validation_loss(folder)
        return figures | judge(row, ROWS[row].model or folder / "model")


def page(results: list[dict]) -> str:
    """Markdown: a table, then the samples of each row above what they teach."""
    found = {result["row"]: result for result in results}
    lines = [
        "# What breaks if …",
        "",
        "Made by `python -m benchmarks.what_breaks`, whose source says how each fault is put in. The same eight "
        "captions and noises everywhere; R-precision and colours are of "
        f"{UNSEEN} captions that were never trained on (of the shipped model {UNSEEN // 2}).",
        "",
        "| | R-precision | colour | validation loss |",
        "| --- | --- | --- | --- |",
    ]
    rows = [row for row in ROWS if row in found]
    for row in rows:
        shares = [f"{found[row][name]:.0%}" for name in ("r_precision", "on_white_in_the_colour")]
        loss = found[row]["validation_loss"]
        lines.append(f"| {' | '.join([f'[{row}](#{anchor(row)})', *shares, f'{loss:.4f}' if loss else ''])} |")
    for row in rows:
        lines += ["", f"## {row}", "", ROWS[row].lesson, "", f"![{row}]({FOLDER.name}/{file_of(row)})"]
    lines += [
        "",
        "What makes no difference here: a VAE left in train mode. Ours has no dropout and normalises by groups, not by "
        "batches, so `vae.train()` and `vae.eval()` give the same bits; with batch norm they would not.",
        "",
    ]
    return "\n".join(lines)


def anchor(row: str) -> str:
    """How GitHub names a heading."""
    return "".join(c for c in row.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        try:
            print(json.dumps(measure(sys.argv[2], Path(sys.argv[3]))))
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where runs are left, and the fault-free one found")
    parser.add_argument("--page", action="store_true", help="only write the page")
    options = parse(parser, RESULTS)
    with tempfile.TemporaryDirectory() as temporary:
        base = options.keep or Path(temporary)
        for row in [] if options.page else options.rows:
            sampled = ROWS[row].sampling is not None and not ROWS[row].model
            if sampled and not (base / "no fault" / "model").is_dir():
                parser.error(
                    f"--rows {row!r} is sampled from 'no fault', which is not there: name it before, or --keep."
                )
            folder = base / ("no fault" if sampled else row)
            command = [sys.executable, "-m", "benchmarks.what_breaks", "--one", row, str(folder)]
            ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
            if ended.returncode:  # why, it has said itself
                parser.exit(1, f"{row!r} was not measured; the rows before it are kept in {RESULTS.name}.\n")
            result = json.loads(ended.stdout.splitlines()[-1]) | machine("cpu")
            keep(RESULTS, [result], ("row",))
            print(json.dumps(result), flush=True)
    PAGE.write_text(page(kept(RESULTS)), encoding="utf-8")


if __name__ == "__main__":
    main()
