"""How good a model is: does it draw the colour it is asked for, does it copy, and what does its VAE allow?

    python evaluate_stable_diffusion.py stable_diffusion_results/monsters/model --dataset monsters:4000

samples images (for unseen captions of monsters, or for the data set's own captions), and writes into --output_dir:
`report.json`, `samples.png` (images with prompts) and `nearest.png` (each sample beside the nearest training image).

- Obedience: R-precision, how often a CLIP finds an image's own prompt the nearest of all; the same for real images, and
  for images paired with other prompts. For monsters, whose prompts name a colour, also the colour of the pixels.
- Memorisation: the distance of each sample to its nearest training image (or that image's mirror), against the same
  distance for images that cannot be copies: monsters drawn afresh, or each training image against all others. Samples
  that are nearer than 99 % of those are called copies.
- Attention (monsters): how much the words for wings, tail and so on look at these parts of real drawings, against the
  area of the parts' boxes, by layer of the U-Net and by timestep; 1 = no preference. `attention.png` shows it.
- VAE ceiling: PSNR and SSIM of images that only went through the VAE; no sample can be sharper than these.
"""

import sys

from training.options import answer_early, parse_options
from training.presets import EvaluationOptions as Options


def with_model_named(argv: list[str]) -> list[str]:
    """MODEL may stand first, without --model."""
    return ["--model", *argv] if argv and not argv[0].startswith("-") else argv


if __name__ == "__main__":
    sys.argv[1:] = with_model_named(sys.argv[1:])
    answer_early(Options)  # before the imports below, which take seconds

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import monsters
from evaluation.attention import attention_sheet, score_parts, sharpest_layer
from evaluation.obedience import FIRST_UNSEEN, Judge, measure_monsters, unseen_monsters
from images import captioned_sheet, image_to_pixels, pixels_to_images, save_png, to_pixels, to_rgb
from monsters.workers import worker_processes
from pokemon_dataset import load_captioned_images, load_pixels
from stable_diffusion_model import StableDiffusion
from training.reconstruction import measure, to_bytes
from training.script import UserError, run, user_errors

THUMBNAIL = 64  # pixels a side at which images are compared
ATTENTIVE = 64  # monsters, at most, whose words are looked at


class TrainingImages:
    """What the model was trained on: captions, and images at any size. Monsters are drawn at that size at once."""

    def __init__(self, source: str) -> None:
        self.monsters = monsters.indices_of(source) if monsters.is_spec(source) else []
        self.found = None if self.monsters else load_captioned_images(source)

    def __len__(self) -> int:
        return len(self.monsters or self.found)

    def captions(self) -> list[str]:
        return self.found["text"] if self.found else [monsters.caption(i) for i in self.monsters]

    def pixels(self, indices: list[int], size: int) -> Tensor:
        """(n, 3, size, size) in [-1, 1]."""
        if self.found is None:
            with worker_processes(os.cpu_count() or 1) as pool:
                which = [self.monsters[i] for i in indices]
                drawn = pool.map(monsters.draw, which, [size] * len(indices), chunksize=64)
                return torch.stack([image_to_pixels(image) for image in tqdm(drawn, total=len(indices), disable=None)])
        with ThreadPoolExecutor() as pool:
            cells = self.found.select(indices)["image"]
            parts = range(0, len(cells), 64)  # so that no more than 64 large images are in memory
            return torch.cat(
                [load_pixels(cells[start : start + 64], size, pool) for start in tqdm(parts, disable=None)]
            )


def sample_all(model: StableDiffusion, prompts: list[str], options: Options) -> list[Image.Image]:
    """One image per prompt, seeds counted from --seed; kept as PNGs in --output_dir/images."""
    folder = Path(options.output_dir) / "images"
    made: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), options.batch_size), desc="sampling", unit="batch", disable=None):
        part = prompts[start : start + options.batch_size]
        files = [folder / f"{start + k:04d}.png" for k in range(len(part))]
        if options.reuse and all(file.is_file() for file in files):
            made += [to_rgb(Image.open(file)) for file in files]
            continue
        made += model.sample(
            part,
            steps=options.steps,
            sampler=options.sampler,
            guidance_scale=options.guidance_scale,
            seeds=options.seed + start,
            height=options.resolution,
            width=options.resolution,
            progress=False,
        )
        for file, image in zip(files, made[start:], strict=True):
            save_png(image, file)
    return made


def nearest(queries: Tensor, training: Tensor, but: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """For thumbnails (n, 3, s, s): RMS distance (n,) to the nearest of `training` or mirrors, which, mirrored?

    `but` (n,): of each, one training image that does not count, nor its mirror.
    """
    flat, n = queries.flatten(1), len(training)
    both = torch.cat([training, training.flip(-1)]).flatten(1)
    distances = torch.cdist(flat, both) / flat.shape[1] ** 0.5  # (n, 2·training)
    if but is not None:
        distances[torch.arange(len(flat)), but] = distances[torch.arange(len(flat)), but + n] = torch.inf
    distance, index = distances.min(dim=1)
    return distance, index % n, index >= n


def thumbnails(made: list[Image.Image]) -> Tensor:
    return torch.stack([to_pixels(image, THUMBNAIL) for image in made])


def main(argv: list[str]) -> None:
    options = parse_options(Options, with_model_named(argv))
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: cannot be written to; choose another folder.")
    with user_errors():
        training = TrainingImages(options.dataset)
        model = StableDiffusion.from_pretrained(options.model, device=options.device)
        for path in options.lora:
            model.load_lora(path)
        judge = Judge.load(options.clip)
    if training.monsters:
        asked, shown = unseen_monsters(options.num_samples), []
        prompts = [monster.caption for monster in asked]
    else:
        asked, shown = [], [i * len(training) // options.num_samples for i in range(options.num_samples)]
        captions = training.captions()
        prompts = [captions[i] for i in shown]
    made = sample_all(model, prompts, options)
    kept = ("model", "steps", "sampler", "guidance_scale", "seed")
    report: dict = {name: getattr(options, name) for name in kept} | {"samples": len(made)}
    if asked:
        report["obedience"] = measure_monsters(made, asked, judge)
    else:
        real = pixels_to_images(training.pixels(shown, 256) / 2 + 0.5)
        report["obedience"] = judge.with_controls(made, real, prompts)

    # Where words look
    if asked:
        indices = [monster.index for monster in asked[:ATTENTIVE]]
        attention = score_parts(model, indices, options.resolution)
        if attention:
            layer = sharpest_layer(attention)
            report["attention_on_parts"] = {"sharpest_layer": layer, "parts": attention}
            save_png(attention_sheet(model, indices, options.resolution, layer), folder / "attention.png")

    # Memorisation, at thumbnail size
    known = training.pixels(list(range(len(training))), THUMBNAIL)
    distance, which, mirrored = nearest(thumbnails(made), known)
    report["nearest_training_image"] = {"mean": distance.mean().item(), "smallest": distance.min().item()}
    if asked:
        fresh = torch.stack([image_to_pixels(monsters.draw(FIRST_UNSEEN + i, THUMBNAIL)) for i in range(len(made))])
        baseline, _, _ = nearest(fresh, known)
    else:
        baseline, _, _ = nearest(known, known, but=torch.arange(len(known)))
    of = "unseen_monsters" if asked else "other_training_images"
    means = {"mean": baseline.mean().item(), "smallest": baseline.min().item()}
    report[f"nearest_training_image_of_{of}"] = means
    report["share_of_copies"] = (distance < baseline.quantile(0.01)).float().mean().item()

    # What the VAE allows
    some = training.pixels(list(range(0, len(training), max(len(training) // 16, 1)))[:16], options.resolution)
    psnr, ssim = measure(model.vae, to_bytes(some))
    report["vae_ceiling"] = {"psnr": psnr, "ssim": ssim}

    # Sheets
    count = min(16, len(made))
    save_png(captioned_sheet(made[:count], prompts[:count], columns=4), folder / "samples.png")
    twins = pixels_to_images(training.pixels(which[:count].tolist(), 256) / 2 + 0.5)
    pairs, captions = [], []
    for i, twin in enumerate(twins):
        pairs += [made[i], twin.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored[i] else twin]
        captions += [prompts[i], f"nearest training image, distance {distance[i]:.3f}"]
    save_png(captioned_sheet(pairs, captions, columns=8, side=160), folder / "nearest.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run(main)
