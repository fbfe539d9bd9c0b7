"""From prompts to PNGs: `python sample_stable_diffusion.py "a blue water type pokemon, smiling" --output monster.png`.

Every prompt is painted with every seed. Pictures carry how they were made, for `images.read_parameters` and for other
tools. The notebook of the same name shows what the options do.
"""

import argparse
import re
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError

from images import save_png, to_rgb
from samplers import SAMPLERS
from stable_diffusion_model import StableDiffusion
from training import run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one call; `--help` shows them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help='what to paint; "(red:1.3) fox" asks for more red')
    add("--model", default="stable_diffusion_results/monsters/model", help="folder, file or hub id")
    add("--negative_prompt", default="", help="what to stay away from")
    add("--seeds", type=int, nargs="+", default=[0], metavar="SEED", help="one picture per prompt and seed")
    add("--steps", type=int, default=30, help="how often the U-Net is asked")
    add("--sampler", default="dpm++2m", help=", ".join(SAMPLERS))
    add("--eta", type=float, default=0.0, help="ddim only: 0 deterministic … 1 as random as ddpm")
    add("--karras", action="store_true", help="euler and dpm++2m only: Karras' noise levels")
    add("--guidance_scale", type=float, default=7.5, help="1 = off; more follows the prompt more closely")
    add("--guidance_rescale", type=float, default=0.0, help="0 … 1, against over-exposure at large scales")
    add("--height", type=int, default=None, help="pixels, divisible by 8; 512, or that of --init_image")
    add("--width", type=int, default=None, help="pixels, divisible by 8; 512, or that of --init_image")
    add("--init_image", default=None, metavar="FILE", help="start from this picture, not from noise")
    add("--strength", type=float, default=0.8, help="how much noise covers --init_image, up to 1")
    add("--mask", default=None, metavar="FILE", help="white where --init_image is painted anew")
    add("--vae_tiling", action="store_true", help="decode in tiles: less memory for large pictures")
    add("--batch_size", type=int, default=4, help="pictures painted together")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--dtype", choices=DTYPES, default="float32", help="what the networks compute in")
    add("--output", default="sample.png", metavar="FILE|FOLDER", help="FILE.png, numbered if there are several")
    return parser.parse_args(argv)


def open_picture(path: str, option: str) -> Image.Image:
    """An RGB picture; one sentence if there is none."""
    try:
        with Image.open(path) as picture:
            return to_rgb(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{option} {path}: there is no such file.") from None
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{option} {path}: not a picture that can be read ({error}).") from error


def output_paths(output: str, jobs: list[tuple[str, int]]) -> list[Path]:
    """Where the picture of each (prompt, seed) goes: the file, numbered if need be, or a own name in the folder."""
    path = Path(output)
    if path.is_dir() or not path.suffix:
        slugs = [re.sub(r"\W+", "_", prompt).strip("_")[:60] for prompt, _ in jobs]
        return [path / f"{i:03d}_{slug}_seed{jobs[i][1]}.png" for i, slug in enumerate(slugs)]
    if path.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: pictures are written as PNG; name a .png file or a folder.")
    return [path] if len(jobs) == 1 else [path.with_stem(f"{path.stem}_{i:03d}") for i in range(len(jobs))]


def main(argv: list[str]) -> None:
    options = parse(argv)
    jobs = [(prompt, seed) for prompt in options.prompts for seed in options.seeds]
    paths = output_paths(options.output, jobs)
    if options.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, not {options.batch_size}.")
    start = open_picture(options.init_image, "--init_image") if options.init_image else None
    mask = open_picture(options.mask, "--mask") if options.mask else None
    width, height = start.size if start else (512, 512)

    model = StableDiffusion.from_pretrained(options.model, options.device, DTYPES[options.dtype])
    for first in range(0, len(jobs), options.batch_size):
        batch = slice(first, first + options.batch_size)
        prompts, seeds = zip(*jobs[batch], strict=True)
        made = model.sample(
            list(prompts),
            negative_prompts=options.negative_prompt,
            seeds=list(seeds),
            steps=options.steps,
            sampler=options.sampler,
            eta=options.eta,
            karras=options.karras or None,
            guidance_scale=options.guidance_scale,
            guidance_rescale=options.guidance_rescale,
            height=height if options.height is None else options.height,
            width=width if options.width is None else options.width,
            init_images=start,
            strength=options.strength,
            masks=mask,
            vae_tiling=options.vae_tiling,
        )
        for picture, path in zip(made, paths[batch], strict=True):
            save_png(picture, path)
            print(path)


if __name__ == "__main__":
    run(main)
