"""How good a model is: does it draw the colour it is asked for, does it copy, and what does its VAE allow?

    python evaluate_stable_diffusion.py stable_diffusion_results/monsters/model --dataset monsters:5000

samples images (for unseen captions of monsters, or for the data set's own captions), and writes into --output_dir:
`report.md` and `report.json`, `samples.png` (images with prompts), and `nearest.png` (the samples that are most like a
training image, beside it). Shares, KID, prediction errors, PSNR and SSIM come with an interval that holds the true
value in 19 of 20 cases; distances to training images and scores of attention are bare numbers.

- Obedience: R-precision, how often a CLIP finds an image's own prompt the nearest of all; the same for real images, and
  for images paired with other prompts. For monsters also the colour of the pixels, and each attribute by itself.
- Quality and variety, on that CLIP's features, against real images of the prompts: KID, precision, recall, coverage;
  the same for other real images and for pure noise. Where noise scores as high, a number says nothing.
- Prediction error: how well the U-Net predicts the noise in real images (unseen drawings of monsters; of a folder or a
  hub id, training images), by tenths of the timesteps; with --checkpoint, the raw weights of the run as well as the
  averaged ones, which the model has.
- Memorisation: the distance of each sample to its nearest training image (or that image's mirror), as it is and
  calibrated, against the same for images that cannot be copies: monsters drawn afresh, or each training image against
  all others. Samples that are nearer than 99 % of those are called copies; the report says how many are by chance.
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
import hashlib
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from statistics import fmean

import datasets
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import lora
import monsters
from evaluation.attention import attention_sheet, score_parts, sharpest_layer
from evaluation.attributes import score_attributes
from evaluation.copying import THUMBNAIL, measure_copying, nearest, sheet_of_nearest, thumbnails
from evaluation.obedience import FIRST_UNSEEN, Judge, Unseen, dealt_out_anew, measure_monsters, unseen_monsters
from evaluation.report import in_words
from evaluation.statistics import kid, mean_interval, precision_recall_coverage
from evaluation.timestep_loss import by_tenths, intervals, prediction_errors, spread
from images import captioned_sheet, image_to_pixels, pixels_to_images, read_parameters, save_png, to_pixels, to_rgb
from monsters.workers import worker_processes
from pokemon_dataset import load_captioned_images, load_pixels
from published.diffusers_layout import schedule_dict
from published.weight_files import first_line
from samplers import grid_options, timestep_grid
from stable_diffusion_model import StableDiffusion
from training.encoded_cache import fingerprint
from training.image_files import refuse_or_warn, undecodable
from training.reconstruction import measure_each, to_bytes
from training.reproducible import Processes, resolve_precision
from training.run_folder import atomically
from training.script import UserError, run, user_errors

ATTENTIVE = 64  # monsters, at most, whose words are looked at
NOISED = 32  # images, at most, on whose noise the U-Net's prediction is measured
ENCODED = 16  # images, at most, that show what the VAE allows
HASH = "Model hash"  # by which an image says which model made it
WRITTEN = ("report.json", "report.md", "samples.png", "nearest.png", "attention.png")  # beside images/
OTHERS = 50_000  # from here on, counted from the first unseen one, are monsters that nobody asks for: a control


class TrainingImages:
    """What the model was trained on: captions, and images at any size. Monsters are drawn at that size at once."""

    def __init__(self, options: Options) -> None:
        self.monsters, self.found = [], None
        where = (options.split, options.revision, options.caption_column, options.caption)
        if not monsters.is_spec(options.dataset):
            self.found = without_bad_images(load_captioned_images(options.dataset, *where), options.on_bad_image)
        elif where == ("train", None, None, None):
            self.monsters = monsters.indices_of(options.dataset)
        else:
            raise UserError(
                f"--dataset {options.dataset}: --split, --revision, --caption_column and --caption are for folders and "
                "the hub; leave them out."
            )

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


def without_bad_images(found: datasets.Dataset, on_bad_image: str) -> datasets.Dataset:
    """All are decoded once, before anything expensive is done. UserError names those that cannot be."""
    alone = Processes(0, 1, torch.device("cpu"))
    if bad := undecodable(found, list(range(len(found))), THUMBNAIL, alone):
        refuse_or_warn(found, bad, on_bad_image, alone)
    return found.select([i for i in range(len(found)) if i not in bad]) if bad else found


def evenly(items: Sequence, count: int) -> list:
    """`count` of the items, or all if there are fewer, spread evenly: folders may be sorted by what they show."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def write(path: Path, content: str | Image.Image) -> None:
    """A text or a PNG, whole or not at all."""
    with atomically(path, then="start again with --reuse, which takes what is done") as temporary:
        if isinstance(content, str):
            temporary.write_text(content, encoding="utf-8")
        else:
            save_png(content, temporary)


def model_hash(model: StableDiffusion) -> str:
    """Another one for other weights or precision, and for another noise schedule or scheduler_config.json."""
    config = json.dumps(model.scheduler_config | schedule_dict(model.schedule), sort_keys=True)
    weights = fingerprint(model.unet, model.text_encoder.model, model.vae)
    return hashlib.sha256(f"{weights} {config}".encode()).hexdigest()[:16]


def numbered(folder: Path) -> list[Path]:
    """The images that an evaluation may have written there, and would overwrite or delete: 0000.png and so on."""
    return sorted(file for file in folder.glob("*.png") if re.fullmatch(r"\d{4,}", file.stem))


def checked_folder(options: Options) -> Path:
    """--output_dir, made if need be. UserError if it cannot be written, or if others' files stand where ours would."""
    folder = Path(options.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a file, a folder of others, a disk that is read only
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror}); choose another folder.") from error
    images = folder / "images"
    for place in [folder, images] if images.is_dir() else [folder]:
        if not os.access(place, os.W_OK):
            raise UserError(f"--output_dir {folder}: cannot write to {place}; choose another folder.")
    if images.exists() and not images.is_dir():
        raise UserError(f"--output_dir {folder}: {images} is a file, not a folder; choose another --output_dir.")
    for file in [*(folder / name for name in WRITTEN), *numbered(images)]:
        if file.is_dir():
            raise UserError(f"--output_dir {folder}: {file} is a folder, not a file; choose another --output_dir.")
    for file in numbered(images):
        try:
            is_ours = HASH in read_parameters(file)
        except Exception:  # a broken one is made anew: Pillow has many kinds
            continue
        if not is_ours:
            raise UserError(
                f"--output_dir {folder}: {file} was not made by an evaluation, and is not overwritten; choose another "
                "--output_dir."
            )
    return folder


def sample_all(model: StableDiffusion, prompts: list[str], options: Options) -> list[Image.Image]:
    """One image per prompt, seeds counted from --seed; kept as PNGs in --output_dir/images.

    With --reuse, those that are there are taken if they say of themselves that they were made just so, by networks of
    the same weights; a broken one is made anew.
    """
    said = {"Steps": options.steps, "Sampler": options.sampler, "CFG scale": options.guidance_scale}
    said |= {"Size": f"{options.resolution}x{options.resolution}", "Model": model.name}
    said["LoRA"] = lora.in_words(model.loras)
    said[HASH] = model_hash(model)

    def is_there(file: Path, prompt: str, seed: int) -> bool:
        try:
            found = read_parameters(file)
        except Exception:  # not there, or broken: Pillow has many kinds
            return False
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
            with user_errors():
                made += model.sample(part, seeds=list(seeds), **how)
        except FloatingPointError as error:  # an overflow
            raise UserError(str(error)) from error
        except KeyboardInterrupt:
            print(f"\n{start} of {len(prompts)} images are in {folder}: --reuse takes them.", file=sys.stderr)
            raise
        for file, image in zip(files, made[start:], strict=True):
            image.info["parameters"] += f", {HASH}: {said[HASH]}"
            write(file, image)
    for file in [] if options.reuse else numbered(folder):  # of an earlier evaluation of more images
        if int(file.stem) >= len(prompts):
            file.unlink()
    return made


def measure_obedience(
    made: list[Image.Image], real: list[Image.Image], prompts: list[str], asked: list[Unseen], judge: Judge
) -> dict:
    """R-precision; for monsters (`asked`) also colours, and each attribute. Nothing if all prompts are the same."""
    if len(set(prompts)) == 1:  # all are obeyed, or none
        return {}
    if not asked:
        return {"obedience": judge.with_controls(made, real, prompts)}
    sets = {"samples": made, "real_images": real, "shuffled_samples": dealt_out_anew(made)}
    return {
        "obedience": measure_monsters(made, asked, judge),
        "attributes": score_attributes(sets, [monster.index for monster in asked], judge),
    }


def measure_quality(made: list[Image.Image], real: list[Image.Image], other: list[Image.Image], judge: Judge) -> dict:
    """KID, precision, recall and coverage against `real`: of the samples, of `other` real images, and of pure noise."""
    generator = torch.Generator().manual_seed(0)
    noise = pixels_to_images(torch.rand(len(made), 3, THUMBNAIL, THUMBNAIL, generator=generator))
    expected, sampled = [judge.image_features(images) for images in (real, made)]
    controls = {"other_real_images": other, "noise": noise}

    def against_real(features: Tensor) -> dict[str, float]:
        return kid(expected, features) | precision_recall_coverage(expected, features)

    return against_real(sampled) | {
        "controls": {name: against_real(judge.image_features(images)) for name, images in controls.items() if images}
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
    """The model with the U-Net as it was trained, before averaging. UserError if the checkpoint is of another model.

    Its text encoder is one of its own, too: a LoRA, added to both models, changes each once.
    """
    unet, text_encoder = copy.deepcopy((model.unet, model.text_encoder))
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)["unet"]
        if any(name.endswith(".down.weight") for name in state):
            raise UserError(
                f"--checkpoint {checkpoint}: is of a LoRA run, and holds no whole U-Net; pass the run's lora folder "
                "with --lora instead."
            )
        unet.load_state_dict(state)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails anywhere
        raise UserError(
            f"--checkpoint {checkpoint}: cannot be read as one of this model's ({first_line(error)}); pass "
            "checkpoints/step_….pt of the run that made it."
        ) from error
    return StableDiffusion(*model.parts._replace(unet=unet, text_encoder=text_encoder))


def main(argv: list[str]) -> None:
    options = parse_options(Options, with_model_named(argv))
    if len(options.lora_scale) > len(options.lora):
        raise UserError("--lora_scale: give a --lora for each.")
    folder, side = checked_folder(options), options.resolution
    with user_errors():
        model = StableDiffusion.from_pretrained(options.model, device=options.device)
        model.to(model.device, resolve_precision(options.precision, model.device))
        config = grid_options(options.sampler, model.scheduler_config)
        timestep_grid(options.sampler, model.schedule, options.steps, **config)
        raw = with_raw_weights(model, options.checkpoint) if options.checkpoint else None
        for one in [model, raw] if raw else [model]:
            for path, scale in zip_longest(options.lora, options.lora_scale, fillvalue=1.0):
                one.load_lora(path, scale)
        judge = Judge.load(options.clip)
        training = TrainingImages(options)
    if side % (factor := model.vae.config.downsampling):
        raise UserError(f"--resolution must be divisible by {factor}, not {side}.")
    if training.monsters and side < 16:
        raise UserError(f"--resolution {side}: monsters are drawn at 16 pixels and more.")
    if len(training) < 2:
        raise UserError(f"--dataset {options.dataset} holds one image: two at least are needed to tell any apart.")
    if training.monsters:
        asked, shown = unseen_monsters(options.num_samples), []
        prompts = [monster.caption for monster in asked]
        real = [monsters.draw(monster.index, side) for monster in asked]
        other = [monsters.draw(FIRST_UNSEEN + OTHERS + i, side) for i in range(len(asked))]
    else:
        asked, shown = [], evenly(range(len(training)), options.num_samples)  # no image twice: what is real must vary
        captions = training.captions()
        prompts = [captions[i] for i in shown]
        real = pixels_to_images(training.pixels(shown, side) / 2 + 0.5)
        left = evenly(sorted(set(range(len(training))) - set(shown)), len(shown))
        other = pixels_to_images(training.pixels(left, side) / 2 + 0.5) if len(left) == len(shown) else []
    known = training.pixels(list(range(len(training))), THUMBNAIL)
    made = sample_all(model, prompts, options)
    kept = ("model", "lora", "lora_scale", "dataset", "resolution", "steps", "sampler", "guidance_scale", "seed")
    report: dict = {name: getattr(options, name) for name in kept}
    report |= {"precision": str(model.dtype).removeprefix("torch."), "samples": len(made)}
    report |= measure_obedience(made, real, prompts, asked, judge)
    if len(made) >= 4:
        report["against_real_images"] = measure_quality(made, real, other, judge)
    noised = torch.stack([to_pixels(image, side) for image in evenly(real, NOISED)])
    images = {"images": len(noised), "seen_in_training": not asked}
    report["prediction_error"] = measure_prediction(model, noised, evenly(prompts, NOISED)) | images
    if raw:
        report["prediction_error_of_raw_weights"] = measure_prediction(raw, noised, evenly(prompts, NOISED))
    pictures = {"samples": captioned_sheet(made[:16], prompts[:16], columns=4)}
    if asked:
        indices = [monster.index for monster in asked[:ATTENTIVE]]
        attention = score_parts(model, indices, side)
        if attention:
            layer = sharpest_layer(attention)
            report["attention_on_parts"] = {"sharpest_layer": layer, "parts": attention}
            pictures["attention"] = attention_sheet(model, indices, side, layer)
    found = nearest(thumbnails(made), known)
    if asked:
        fresh = torch.stack([image_to_pixels(monsters.draw(FIRST_UNSEEN + i, THUMBNAIL)) for i in range(len(made))])
        others = nearest(fresh, known)
    else:
        others = nearest(known, known, but=torch.arange(len(known)))
    report["copying"] = measure_copying(found, others)
    some = training.pixels(evenly(range(len(training)), ENCODED), side)
    report["vae_ceiling"] = {}
    for name, values in measure_each(model.vae.float(), to_bytes(some)).items():
        report["vae_ceiling"] |= {name: fmean(values), f"{name}_interval": mean_interval(values)}

    texts = {"report.json": json.dumps(report, indent=2, allow_nan=False) + "\n", "report.md": in_words(report)}
    for name, text in texts.items():  # before the pictures: numbers are what took long
        write(folder / name, text)
    print(texts["report.md"])
    pictures["nearest"] = sheet_of_nearest(made, prompts, training.pixels, found, report["copying"]["limits"])
    (folder / "attention.png").unlink(missing_ok=True)  # an earlier evaluation's
    for name, picture in pictures.items():
        write(folder / f"{name}.png", picture)


if __name__ == "__main__":
    run(main)
