"""Images: any PIL image → pixels in [-1, 1] and back; rows of images; what a PNG says about how it was made.

Letters: N images, H × W their size, R resolution.
"""

import json
import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

# torchvision and matplotlib are imported where they are used: each takes a second or more, and reading the
# parameters of a PNG needs neither.

# ----------------------------------------------------------------------------------------------------------------------
# PIL images ↔ pixels
# ----------------------------------------------------------------------------------------------------------------------

TRANSFORM_VERSION = "exif, white ground, centre crop, lanczos: 2"  # part of cache keys; raise it if `to_pixels` changes


def to_rgb(image: Image.Image) -> Image.Image:
    """Turned upright by its EXIF tag, 8 bits a channel, transparent parts white."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16-bit and float greys: Pillow would clip them to white
        grey = np.asarray(image, dtype=np.float32)
        # Of "I" and "F", which only say how Pillow keeps the numbers, the range is a guess; I;16 is 16 bits for sure.
        top = 65535.0 if image.mode.startswith("I;16") or grey.max() > 255 else 255.0
        image = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)  # a plain convert("RGB") would turn the ground black
    return image.convert("RGB")


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """A PIL image of any size and mode → RGB of width × height, never squashed: what is too long is cropped.

    It is cropped before it is scaled, so a 10000 × 1 image needs no more memory than any other.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    image = to_rgb(image)
    scale = min(image.width / width, image.height / height)
    crop = [max(round(side * scale), 1) for side in (height, width)]
    return functional.resize(functional.center_crop(image, crop), [height, width], InterpolationMode.LANCZOS)


def to_pixels(image: Image.Image, resolution: int) -> Tensor:
    """A PIL image of any size and mode → float (3, R, R) in [-1, 1]: the square in its middle, scaled to R."""
    return image_to_pixels(fit(image, resolution, resolution))


def image_to_pixels(image: Image.Image) -> Tensor:
    """An RGB image as it is → float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1.0


def image_to_mask(image: Image.Image) -> Tensor:
    """An RGB image → float (1, H, W), 1 where it is lighter than middle grey."""
    return (torch.from_numpy(np.array(image.convert("L")))[None] > 127).float()


def pixels_to_images(pixels: Tensor) -> list[Image.Image]:
    """Float (N, 3, H, W) in [0, 1] → PIL images."""
    arrays = (pixels.permute(0, 2, 3, 1).float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


# ----------------------------------------------------------------------------------------------------------------------
# Many images at once
# ----------------------------------------------------------------------------------------------------------------------


def image_sheet(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images of one size side by side on white, row by row."""
    from torchvision.transforms.v2 import functional
    from torchvision.utils import make_grid

    tensors = [functional.pil_to_tensor(to_rgb(image)) for image in images]
    return functional.to_pil_image(make_grid(tensors, nrow=columns, padding=gap, pad_value=255))


def captioned_sheet(made: list[Image.Image], captions: list[str], columns: int, side: int = 224) -> Image.Image:
    """Images with their prompts below, whole, however many lines these take."""
    font, cells = ImageFont.load_default(size=12), []
    texts = [textwrap.fill(caption, side // 7) for caption in captions]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    height = max(math.ceil(pen.multiline_textbbox((0, 0), text, font=font)[3]) for text in texts) + 8
    for image, text in zip(made, texts, strict=True):
        cell = Image.new("RGB", (side, side + height), "white")
        cell.paste(image.resize((side, side), Image.Resampling.LANCZOS))
        ImageDraw.Draw(cell).multiline_text((6, side + 2), text, fill="#333", font=font)
        cells.append(cell)
    return image_sheet(cells, columns)


def show_images(
    images: Sequence[Any], columns: int | None = None, titles: Sequence[str] = (), inches: float = 1.75
) -> None:
    """Shows images or (H, W) tensors in rows, `inches` wide each, with a title above each that has one."""
    import matplotlib.pyplot as plt

    columns = columns or len(images)
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(inches * columns, inches * 1.12 * rows), squeeze=False)
    figure.set_layout_engine("constrained", w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, images, strict=False):
        axis.imshow(np.asarray(image), cmap="gray")
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=8)
    plt.show()


# ----------------------------------------------------------------------------------------------------------------------
# What a PNG says about how it was made: the text `parameters`, as web user interfaces write and read it. The prompt, a
# line "Negative prompt: …" (both may run over several lines), and a last line "Steps: 30, Sampler: ddim, …", in which a
# value with a comma or colon is quoted.
# ----------------------------------------------------------------------------------------------------------------------

_NEGATIVE = "Negative prompt: "
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def format_parameters(prompt: str, negative_prompt: str = "", **settings: object) -> str:
    """The `parameters` text of an image, for `read_parameters` and other tools; `settings` begin with Steps."""
    values = {name: str(value) for name, value in settings.items() if value is not None}
    values = {name: json.dumps(v) if set(v) & set(',:"\n') or v != v.strip() else v for name, v in values.items()}
    lines = [prompt] + ([_NEGATIVE + negative_prompt] if negative_prompt else [])
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])


def save_png(image: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG that keeps `image.info["parameters"]`, the text in which other tools look for the prompt."""
    info = PngInfo()
    if "parameters" in image.info:
        info.add_itxt("parameters", image.info["parameters"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG", pnginfo=info)


def read_parameters(image: Image.Image | str | os.PathLike) -> dict[str, str]:
    """How an image or PNG file was made: `prompt`, `negative_prompt` and the settings by name; {} if it does not say.

    Texts with commas, quotes and line breaks return as they were, unless a prompt holds a line "Negative prompt: …".
    """
    if not isinstance(image, Image.Image):
        with Image.open(image) as opened:
            opened.load()  # the text may stand behind the pixels
            image = opened
    text = image.info.get("parameters")
    if not text:
        return {}
    prompts, _, settings = text.rpartition("\n")
    if not settings.startswith("Steps: "):  # other tools may leave the settings out
        prompts, settings = text, ""
    prompt, _, negative = ("\n" + prompts).partition("\n" + _NEGATIVE)
    pairs = {name: json.loads(v) if v.startswith('"') else v for name, v in _SETTING.findall(settings)}
    return {"prompt": prompt.removeprefix("\n"), "negative_prompt": negative, **pairs}
