"""Prompts in, PNG files out: `python sample_stable_diffusion.py "a purple ghost type monster" --output monster.png`.

Options and files are checked before anything slow is imported, so `--help` and a wrong option answer at once. The
notebook of the same name shows what the options do.
"""

import argparse
import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from PIL import Image

from training.script import Terminated, UserError, quick_imports, run, user_errors

if TYPE_CHECKING:
    from stable_diffusion_model import StableDiffusion

SHIPPED_MODEL = Path(__file__).resolve().parent / "stable_diffusion_results" / "monsters" / "model"
SHIPPED_GUIDANCE, GUIDANCE = 5.0, 7.5  # by eye: the small model loses shapes above 5; 7.5 is usual for SD 1.x
SAMPLERS = ("ddpm", "ddim", "euler", "euler_a", "dpm++2m")  # the keys of samplers.SAMPLERS
KARRAS_SAMPLERS = ("euler", "dpm++2m")

# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says in one sentence what is wrong, without the list of all options."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')} (--help lists the options).")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers within [low, high]."""

    def parse_number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number from {low} to {high}")

    return parse_number


def side(text: str) -> int:
    """A parser of heights and widths."""
    pixels = number(int, 8, 2**16)(text)
    if pixels % 8:
        raise argparse.ArgumentTypeError(f"{text} is not divisible by 8, such as {pixels // 8 * 8}")
    return pixels


def parse(argv: list[str]) -> argparse.Namespace:
    """The options of one call, each of them valid by itself; UserError if not."""
    parser = Parser(
        usage="%(prog)s PROMPT [PROMPT …] [options]",
        description="Draws every prompt with every seed. The PNG files say in themselves how they were made.",
        epilog=f'example: python {Path(__file__).name} "a purple ghost type monster" --seeds 0 1 2 --output ghosts/',
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to draw").add_argument
    add("prompts", nargs="+", metavar="PROMPT", help='"(red:1.3) fox" asks for more red')
    add("--negative_prompt", default="", metavar="TEXT", help="what to stay away from (default: nothing)")
    add("--model", default=SHIPPED_MODEL, help="folder, single file or hub id (default: the model that ships)")
    add(
        "--lora", action="append", default=[], metavar="FILE",
        help="add a LoRA: file, folder or hub id; may be given several times",
    )  # fmt: skip
    add(
        "--lora_scale", type=number(float, -10, 10), action="append", default=[], metavar="SCALE",
        help="how strongly it counts, for each --lora in turn; 0 = not at all (default: 1)",
    )  # fmt: skip
    add(
        "--seeds", type=number(int, 0, 2**63 - 1), nargs="+", default=[0], metavar="SEED",
        help="one image for each prompt and seed (default: 0)",
    )  # fmt: skip
    add("--height", type=side, metavar="PIXELS", help="divisible by 8 (default: 512, or that of --init_image)")
    add("--width", type=side, metavar="PIXELS", help="divisible by 8 (default: 512, or that of --init_image)")

    add = parser.add_argument_group("how to draw it").add_argument
    add("--steps", type=number(int, 1, 1000), default=20, help="how often the U-Net is asked (default: %(default)s)")
    add("--sampler", choices=SAMPLERS, default="dpm++2m", help="%(choices)s (default: %(default)s)", metavar="NAME")
    add(
        "--eta", type=number(float, 0, 1), default=0.0,
        help="ddim only: from 0, deterministic, to 1, as random as ddpm (default: 0)",
    )  # fmt: skip
    add("--karras", action="store_true", help="euler and dpm++2m only: the noise levels of Karras et al. 2022")
    add(
        "--guidance_scale", type=number(float, 0, 100), metavar="SCALE",
        help="1 = off; more follows the prompt more closely, at the price of variety "
        f"(default: {SHIPPED_GUIDANCE:g} for the model that ships, {GUIDANCE} for others)",
    )  # fmt: skip
    add(
        "--guidance_rescale", type=number(float, 0, 1), default=0.0, metavar="SHARE",
        help="from 0 to 1: against burnt colours at large scales (default: 0)",
    )  # fmt: skip

    add = parser.add_argument_group("start from an image").add_argument
    add("--init_image", metavar="FILE", help="start from this image; scaled and cropped to --width and --height")
    add(
        "--strength", type=number(float, 0, 1),
        help="how much of it is drawn anew: near 0 little, 1 everything (default: 0.8)",
    )  # fmt: skip
    add("--mask", metavar="FILE", help="draw anew only where this image is white; the rest stays as it is")

    add = parser.add_argument_group("output").add_argument
    add(
        "--output", default="sample.png", metavar="FILE.png|FOLDER",
        help="a file, numbered if there are several images, or a folder (default: %(default)s)",
    )  # fmt: skip

    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cuda, mps or cpu (default: %(default)s)")
    add(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", metavar="TYPE",
        help="what the networks compute in: %(choices)s (default: %(default)s)",
    )  # fmt: skip
    add(
        "--batch_size", type=number(int, 1, 2**16), metavar="N",
        help="images drawn at the same time (default: 4; 1 on a CPU, where more are not faster)",
    )  # fmt: skip
    add("--vae_tiling", action="store_true", help="decode large images in tiles, which needs less memory")

    options = parser.parse_args(argv)
    if options.guidance_scale is None:
        shipped = Path(options.model).resolve() == SHIPPED_MODEL
        options.guidance_scale = SHIPPED_GUIDANCE if shipped else GUIDANCE
    check_together(options)
    options.strength = 0.8 if options.strength is None else options.strength
    return options


def check_together(options: argparse.Namespace) -> None:
    """UserError for options that do not fit each other, and for those that would have no effect."""
    if options.eta and options.sampler != "ddim":
        raise UserError(f"--eta applies to ddim only: leave it out for {options.sampler}.")
    if options.karras and options.sampler not in KARRAS_SAMPLERS:
        raise UserError(
            f"--karras applies to {' and '.join(KARRAS_SAMPLERS)} only: leave it out for {options.sampler}."
        )
    if options.negative_prompt and options.guidance_scale == 1:
        raise UserError("--negative_prompt has no effect at --guidance_scale 1: raise the scale.")
    if len(options.lora_scale) > len(options.lora):
        raise UserError("--lora_scale: give a --lora for each.")
    if options.init_image is None:
        for name in ("mask", "strength"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name} needs --init_image, the image to start from.")
    elif options.strength is not None and int(options.steps * options.strength) == 0:
        raise UserError(f"--strength {options.strength} of {options.steps} steps leaves no step: raise one of them.")


# ----------------------------------------------------------------------------------------------------------------------
# Files
# ----------------------------------------------------------------------------------------------------------------------


def output_paths(output: str, jobs: list[tuple[str, int]]) -> list[Path]:
    """Where the image of each (prompt, seed) goes: the file, numbered if there are several, or a name in the folder."""
    path = Path(output)
    if path.is_dir() or not path.suffix or output.endswith(("/", os.sep)):
        names = [re.sub(r"\W+", "_", prompt).strip("_")[:60] for prompt, _ in jobs]
        return [path / f"{i:03d}_{name}_seed{jobs[i][1]}.png" for i, name in enumerate(names)]
    if path.suffix.lower() != ".png":
        raise UserError(f"--output {output}: images are PNG files; name a FILE.png, or a FOLDER/.")
    return [path] if len(jobs) == 1 else [path.with_stem(f"{path.stem}_{i:03d}") for i in range(len(jobs))]


def check_writable(paths: list[Path]) -> None:
    """Creates the folder of the files; UserError if one of them could not be written."""
    folder = paths[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "there is a file of this name" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"--output: nothing can be written to the folder {folder} ({reason}).") from error
    for path in paths:
        if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
            raise UserError(f"--output: {path} exists and cannot be overwritten.")


def open_image(path: str, option: str) -> Image.Image:
    """An RGB image, upright and on white; UserError if there is none."""
    from images import to_rgb

    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except FileNotFoundError:
        raise UserError(f"{option} {path}: there is no such file.") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # SyntaxError: Pillow's for broken PNGs
        raise UserError(f"{option} {path}: not an image that can be read ({error}).") from error


def start_image(options: argparse.Namespace) -> tuple[Image.Image, Image.Image | None]:
    """--init_image and --mask in the size to draw: the one asked for, or the image's own, rounded down."""
    from images import fit

    start = open_image(options.init_image, "--init_image")
    images = {"--init_image": start} | ({"--mask": open_image(options.mask, "--mask")} if options.mask else {})
    sizes = {option: image.size for option, image in images.items()}
    if options.width is None and options.height is None and len(set(sizes.values())) == 1:
        images = {option: crop_to_multiples_of_8(image) for option, image in images.items()}
    width = options.width or max(start.width // 8 * 8, 8)
    height = options.height or max(start.height // 8 * 8, 8)
    for option, size in sizes.items():
        if size != (width, height):
            say(f"note: {option} is {size[0]}×{size[1]}; it is fitted to {width}×{height}.")
    fitted = {option: fit(image, width, height) for option, image in images.items()}
    return fitted["--init_image"], fitted.get("--mask")


def crop_to_multiples_of_8(image: Image.Image) -> Image.Image:
    """The middle of an image, not scaled, so that inpainting gives its pixels back; sides below 8 stay as they are."""
    from torchvision.transforms.v2.functional import center_crop

    return center_crop(image, [side // 8 * 8 or side for side in (image.height, image.width)])


# ----------------------------------------------------------------------------------------------------------------------
# Sampling
# ----------------------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """A line for whoever watches; standard output holds nothing but the names of the files."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows each warning once and without the line of code that it comes from."""
    said = set()

    def show(message: Warning | str, *_: object, **__: object) -> None:
        if str(message) not in said:
            said.add(str(message))
            say(f"warning: {message}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def load_model(options: argparse.Namespace, width: int, height: int) -> "StableDiffusion":
    """The model; UserError if there is none, or if it cannot do what is asked."""
    import torch

    from stable_diffusion_model import StableDiffusion, choose_device

    with user_errors():
        device = choose_device(options.device)
        model = StableDiffusion.from_pretrained(options.model, str(device), getattr(torch, options.dtype))
        for lora, scale in zip_longest(options.lora, options.lora_scale, fillvalue=1.0):
            model.load_lora(lora, scale)
    factor, timesteps = model.vae.config.downsampling, model.schedule.num_timesteps
    if width % factor or height % factor:
        raise UserError(f"This model draws sizes divisible by {factor}, not {width}×{height}.")
    if options.steps > timesteps:
        raise UserError(f"--steps {options.steps}: this model has {timesteps} timesteps.")
    return model


def draw(options: argparse.Namespace, jobs: list[tuple[str, int]], paths: list[Path]) -> Iterator[Path]:
    """Draws the image of each (prompt, seed) and yields its path when it is written."""
    start, mask = start_image(options) if options.init_image else (None, None)
    width, height = start.size if start else (options.width or 512, options.height or 512)
    with quick_imports():
        from images import save_png
        from sampling.packed import packed

        model = load_model(options, width, height)
    say(
        f"drawing {len(jobs)} image{'s' * (len(jobs) > 1)} of {width}×{height} with the model {model.name} "
        f"on {model.device}: {options.steps} steps, guidance {options.guidance_scale:g}"
    )
    batch_size = options.batch_size or (1 if model.device.type == "cpu" else 4)
    with packed(model.unet, options.steps):  # a CPU orders the weights once for all images
        for first in range(0, len(jobs), batch_size):
            batch = slice(first, first + batch_size)
            prompts, seeds = zip(*jobs[batch], strict=True)
            try:
                images = model.sample(
                    list(prompts),
                    negative_prompts=options.negative_prompt,
                    seeds=list(seeds),
                    steps=options.steps,
                    sampler=options.sampler,
                    eta=options.eta,
                    karras=options.karras or None,
                    guidance_scale=options.guidance_scale,
                    guidance_rescale=options.guidance_rescale,
                    height=height,
                    width=width,
                    init_images=start,
                    strength=options.strength,
                    masks=mask,
                    vae_tiling=options.vae_tiling,
                    progress=sys.stderr.isatty(),
                )
            except FloatingPointError as error:  # an overflow
                raise UserError(str(error)) from error
            for image, path in zip(images, paths[batch], strict=True):
                save_png(image, path)
                yield path


def main(argv: list[str]) -> None:
    """Prints the name of each file when it is written; Ctrl-C keeps those that are."""
    options = parse(argv)
    jobs = [(prompt, seed) for prompt in options.prompts for seed in options.seeds]
    paths = output_paths(options.output, jobs)
    check_writable(paths)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    written = 0
    try:
        with plain_warnings():
            for path in draw(options, jobs, paths):
                print(path, flush=True)
                written += 1
    except KeyboardInterrupt as stop:
        say(f"stopped: {written} of {len(jobs)} images are written.")
        sys.exit(143 if isinstance(stop, Terminated) else 130)


if __name__ == "__main__":
    run(main)
