"""How good a model is: does it draw the colour it is asked for, does it copy, and what does its VAE allow?

    python evaluate_stable_diffusion.py stable_diffusion_results/monsters/model --dataset monsters:4000

samples images (for unseen captions of monsters, or for the data set's own captions), and writes into --output_dir:
`report.md` and `report.json`, `samples.png` (images with prompts), and `nearest.png` (the samples that are most like a
training image, beside it). Numbers come with the interval in which another such set of images would lie in 19 of 20.

- Obedience: R-precision, how often a CLIP finds an image's own prompt the nearest of all; the same for real images, and
  for images paired with other prompts. For monsters also the colour of the pixels, and each attribute by itself.
- Quality and variety, on that CLIP's features, against real images of the prompts: KID, precision, recall, coverage.
- Prediction error: how well the U-Net predicts the noise in real images, by tenths of the timesteps; with --checkpoint,
  the raw weights of the run as well as the averaged ones, which the model has.
- Memorisation: the distance of each sample to its nearest training image (or that image's mirror), as it is and
  calibrated, against the same for images that cannot be copies: monsters drawn afresh, or each training image against
  all others. Samples that are nearer than 99 % of those are called copies.
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

import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import lora
import monsters
from evaluation.attention import attention_sheet, score_parts, sharpest_layer
from evaluation.attributes import score_attributes
from evaluation.obedience import FIRST_UNSEEN, Judge, Unseen, dealt_out_anew, measure_monsters, unseen_monsters
from evaluation.report import in_words
from evaluation.statistics import kid, precision_recall_coverage
from evaluation.timestep_loss import by_tenths, intervals, prediction_errors, spread
from images import captioned_sheet, image_to_pixels, pixels_to_images, read_parameters, save_png, to_pixels, to_rgb
from monsters.workers import worker_processes
from pokemon_dataset import load_captioned_images, load_pixels
from published.weight_files import first_line
from stable_diffusion_model import StableDiffusion
from training.reconstruction import measure, to_bytes
from training.reproducible import resolve_precision
from training.script import UserError, run, user_errors

THUMBNAIL = 64  # pixels a side at which images are compared
ATTENTIVE = 64  # monsters, at most, whose words are looked at
NOISED = 16  # images, at most, on whose noise the U-Net's prediction is measured
CROWD = 50  # nearest training images that calibrate the distance to the very nearest


class TrainingImages:
    """What the model was trained on: captions, and images at any size. Monsters are drawn at that size at once."""

    def __init__(self, source: str) -> None:
        self.monsters = monsters.indices_of(source) if monsters.is_spec(source) else []
        self.found = None if self.monsters else load_captioned_images(source)

    def __len__(self) -> int:
        return len(self.monsters or self.found)

    def captions(self) -> list[str]:
        return [text or "" for text in self.found["text"]] if self.found else [*map(monsters.caption, self.monsters)]

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
    """One image per prompt, seeds counted from --seed; kept as PNGs in --output_dir/images.

    With --reuse, those that are there are taken if they say of themselves that they were made just so.
    """
    said = {"Steps": options.steps, "Sampler": options.sampler, "CFG scale": options.guidance_scale}
    said |= {"Size": f"{options.resolution}x{options.resolution}", "Model": model.name}
    said["LoRA"] = lora.in_words(model.loras)

    def is_there(file: Path, prompt: str, seed: int) -> bool:
        found = read_parameters(file) if file.is_file() else {}
        expected = {"prompt": prompt, "Seed": seed} | said
        return all(found.get(name) == (None if value is None else str(value)) for name, value in expected.items())

    folder = Path(options.output_dir) / "images"
    made: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), options.batch_size), desc="sampling", unit="batch", disable=None):
        part = prompts[start : start + options.batch_size]
        files = [folder / f"{start + k:04d}.png" for k in range(len(part))]
        seeds = range(options.seed + start, options.seed + start + len(part))
        if options.reuse and all(map(is_there, files, part, seeds)):
            made += [to_rgb(Image.open(file)) for file in files]
            continue
        how = {"steps": options.steps, "sampler": options.sampler, "guidance_scale": options.guidance_scale}
        how |= {"height": options.resolution, "width": options.resolution, "progress": False}
        try:
            made += model.sample(part, seeds=list(seeds), **how)
        except FloatingPointError as error:  # an overflow
            raise UserError(str(error)) from error
        for file, image in zip(files, made[start:], strict=True):
            save_png(image, file)
    return made


@dataclass
class Nearest:
    """Of each image (n,): RMS distance to the nearest training image, which that is, and whether mirrored.

    `calibrated`: that distance over the mean distance to the 50 nearest (Carlini et al. 2023, arXiv:2301.13188, Section
    5.1). An image with much white is near to many; a copy is near to one and far from the others.
    """

    distance: Tensor
    index: Tensor
    mirrored: Tensor
    calibrated: Tensor


def nearest(queries: Tensor, training: Tensor, but: Tensor | None = None) -> Nearest:
    """For thumbnails (n, 3, s, s) among `training` and mirrors.

    `but` (n,): of each, one that does not count, nor does any that is equal to it within a level of 255.
    """
    flat, n = queries.flatten(1), len(training)
    both = torch.cat([training, training.flip(-1)]).flatten(1)
    distances = torch.cdist(flat, both) / flat.shape[1] ** 0.5  # (n, 2·training)
    if but is not None:
        distances[torch.arange(len(flat)), but] = distances[torch.arange(len(flat)), but + n] = torch.inf
        distances[distances < 2 / 255] = torch.inf
    several, indices = distances.topk(min(CROWD, max(n - 1, 1)), dim=1, largest=False)  # (n, 50), rising
    distance, index = several[:, 0], indices[:, 0]
    return Nearest(distance, index % n, index >= n, distance / several.mean(dim=1).clamp(min=1e-12))


def thumbnails(made: list[Image.Image]) -> Tensor:
    return torch.stack([to_pixels(image, THUMBNAIL) for image in made])


def measure_obedience(
    made: list[Image.Image], real: list[Image.Image], prompts: list[str], asked: list[Unseen], judge: Judge
) -> dict:
    """R-precision; for monsters (`asked`) also colours, and each attribute of the captions."""
    if not asked:
        return {"obedience": judge.with_controls(made, real, prompts)}
    sets = {"samples": made, "real_images": real, "shuffled_samples": dealt_out_anew(made)}
    return {
        "obedience": measure_monsters(made, asked, judge),
        "attributes": score_attributes(sets, [monster.index for monster in asked], judge),
    }


def measure_prediction(model: StableDiffusion, pixels: Tensor, prompts: list[str]) -> dict:
    """The U-Net's squared error on images (n, 3, H, W) with their prompts, by tenths of the timesteps."""
    errors = prediction_errors(model, pixels, prompts)
    which, _ = spread(len(pixels), model.schedule.num_timesteps, torch.device("cpu"))
    interval, of_tenths = intervals(errors, which)
    return {
        "mean": fmean(errors),
        "interval": interval,
        "by_tenths": by_tenths(errors),
        "intervals_of_tenths": of_tenths,
    }


def with_raw_weights(model: StableDiffusion, checkpoint: str) -> StableDiffusion:
    """The model with the U-Net as it was trained, before averaging. UserError if the checkpoint is of another model."""
    unet = copy.deepcopy(model.unet)
    try:
        unet.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["unet"])
    except Exception as error:  # a damaged file fails anywhere
        raise UserError(
            f"--checkpoint {checkpoint}: cannot be read as one of this model's ({first_line(error)}); pass "
            "checkpoints/step_….pt of the run that made it."
        ) from error
    return StableDiffusion(*model.parts._replace(unet=unet))


def measure_copying(of_samples: Nearest, of_others: Nearest) -> dict:
    """How near samples come to training images, against images that cannot be copies (`of_others`)."""
    measures = ("distance", "calibrated")
    report: dict = {}
    for name, found in (("samples", of_samples), ("images_that_are_no_copies", of_others)):
        values = {measure: getattr(found, measure) for measure in measures}
        report[name] = {measure: {"mean": v.mean().item(), "smallest": v.min().item()} for measure, v in values.items()}
    for name in measures:
        limit = getattr(of_others, name).quantile(0.01)
        report[f"share_of_copies_by_{name}"] = (getattr(of_samples, name) < limit).float().mean().item()
    return report


def sheet_of_nearest(
    made: list[Image.Image], prompts: list[str], training: TrainingImages, found: Nearest
) -> Image.Image:
    """The 16 samples that are most like copies, the worst first, each beside its training image."""
    worst = found.calibrated.argsort()[:16].tolist()
    twins = pixels_to_images(training.pixels([found.index[i].item() for i in worst], 256) / 2 + 0.5)
    pairs, captions = [], []
    for i, twin in zip(worst, twins, strict=True):
        pairs += [made[i], twin.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if found.mirrored[i] else twin]
        captions += [prompts[i], f"nearest: distance {found.distance[i]:.3f}, calibrated {found.calibrated[i]:.2f}"]
    return captioned_sheet(pairs, captions, columns=8, side=160)


def main(argv: list[str]) -> None:
    options = parse_options(Options, with_model_named(argv))
    folder, side = Path(options.output_dir), options.resolution
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: cannot be written to; choose another folder.")
    with user_errors():
        training = TrainingImages(options.dataset)
        model = StableDiffusion.from_pretrained(options.model, device=options.device)
        model.to(model.device, resolve_precision(options.precision, model.device))
        for path in options.lora:
            model.load_lora(path)
        judge = Judge.load(options.clip)
    raw = with_raw_weights(model, options.checkpoint) if options.checkpoint else None
    if side % (factor := model.vae.config.downsampling):
        raise UserError(f"--resolution must be divisible by {factor}, not {side}.")
    if len(training) < 2:
        raise UserError(f"--dataset {options.dataset} holds one image: two at least are needed to tell any apart.")
    if training.monsters:
        asked, shown = unseen_monsters(options.num_samples), []
        prompts = [monster.caption for monster in asked]
        real = [monsters.draw(monster.index, max(side, 16)) for monster in asked]
    else:
        count = min(options.num_samples, len(training))  # no image twice: what is real must vary
        asked, shown = [], [i * len(training) // count for i in range(count)]
        captions = training.captions()
        prompts = [captions[i] for i in shown]
        real = pixels_to_images(training.pixels(shown, side) / 2 + 0.5)
    made = sample_all(model, prompts, options)
    kept = ("model", "lora", "dataset", "resolution", "steps", "sampler", "guidance_scale", "seed")
    report: dict = {name: getattr(options, name) for name in kept}
    report |= {"precision": str(model.dtype).removeprefix("torch."), "samples": len(made)}
    report |= measure_obedience(made, real, prompts, asked, judge)
    if len(made) >= 4:
        features = [judge.image_features(images) for images in (real, made)]
        report["against_real_images"] = kid(*features) | precision_recall_coverage(*features)
    noised = torch.stack([to_pixels(image, side) for image in real[:NOISED]])
    report["prediction_error"] = measure_prediction(model, noised, prompts[:NOISED])
    if raw:
        report["prediction_error_of_raw_weights"] = measure_prediction(raw, noised, prompts[:NOISED])
    if asked:
        indices = [monster.index for monster in asked[:ATTENTIVE]]
        attention = score_parts(model, indices, side)
        if attention:
            layer = sharpest_layer(attention)
            report["attention_on_parts"] = {"sharpest_layer": layer, "parts": attention}
            save_png(attention_sheet(model, indices, side, layer), folder / "attention.png")
    known = training.pixels(list(range(len(training))), THUMBNAIL)
    found = nearest(thumbnails(made), known)
    if asked:
        fresh = torch.stack([image_to_pixels(monsters.draw(FIRST_UNSEEN + i, THUMBNAIL)) for i in range(len(made))])
        others = nearest(fresh, known)
    else:
        others = nearest(known, known, but=torch.arange(len(known)))
    report["copying"] = measure_copying(found, others)
    some = training.pixels(list(range(0, len(training), max(len(training) // 16, 1)))[:16], side)
    psnr, ssim = measure(model.vae.float(), to_bytes(some))
    report["vae_ceiling"] = {"psnr": psnr, "ssim": ssim}

    save_png(captioned_sheet(made[:16], prompts[:16], columns=4), folder / "samples.png")
    save_png(sheet_of_nearest(made, prompts, training, found), folder / "nearest.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = in_words(report)
    (folder / "report.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run(main)
