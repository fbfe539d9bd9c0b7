"""Pictures: from any PIL picture to pixels in [-1, 1] and back, and the words a PNG carries about how it was made."""

import json
import os
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_rgb(picture: Image.Image) -> Image.Image:
    """Turned upright by its EXIF tag, 8 bits a channel, transparency laid over white."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16-bit and float greys: Pillow would clip them to white
        grey = np.asarray(picture, dtype=np.float32)
        top = 65535.0 if grey.max() > 255 else 255.0
        picture = Image.fromarray((grey / top * 255).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)  # a plain convert("RGB") would turn the ground black
    return picture.convert("RGB")


def to_pixels(picture: Image.Image, resolution: int) -> Tensor:
    """A PIL picture of any size and mode → float (3, R, R) in [-1, 1]: shorter side to R, centre crop."""
    return image_to_pixels(ImageOps.fit(to_rgb(picture), (resolution, resolution), method=Image.Resampling.LANCZOS))


def image_to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture as it is → float (3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0


def image_to_mask(picture: Image.Image) -> Tensor:
    """An RGB picture → float (1, H, W), 1 where it is rather white than black."""
    return (torch.from_numpy(np.array(picture.convert("L")))[None] > 127).float()


def pixels_to_images(images: Tensor) -> list[Image.Image]:
    """Float (N, 3, H, W) in [0, 1] → PIL pictures."""
    arrays = (images.permute(0, 2, 3, 1).float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def image_sheet(pictures: list[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Pictures of one size side by side on white, row by row."""
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, ((i % columns) * (width + gap), (i // columns) * (height + gap)))
    return sheet


def save_png(picture: Image.Image, path: str | os.PathLike) -> None:
    """Writes a PNG that keeps `picture.info["parameters"]`, the text in which other tools look for the prompt."""
    info = PngInfo()
    if "parameters" in picture.info:
        info.add_itxt("parameters", picture.info["parameters"])
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG", pnginfo=info)


# The `parameters` text, as web user interfaces write and read it: the prompt, a line "Negative prompt: …" (both may run
# over several lines), and a last line "Steps: 30, Sampler: ddim, …", where a value with a comma or colon is quoted.
_NEGATIVE = "Negative prompt: "
_SETTING = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)')


def format_parameters(prompt: str, negative_prompt: str = "", **settings: object) -> str:
    """The `parameters` text of a picture, for `read_parameters` and other tools; `settings` begin with Steps."""
    values = {name: str(value) for name, value in settings.items() if value is not None}
    values = {name: json.dumps(v) if set(v) & set(',:"\n') or v != v.strip() else v for name, v in values.items()}
    lines = [prompt] + ([_NEGATIVE + negative_prompt] if negative_prompt else [])
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in values.items())])


def read_parameters(picture: Image.Image | str | os.PathLike) -> dict[str, str]:
    """What a PNG says of its making: `prompt`, `negative_prompt` and the settings by name; {} if it says nothing.

    Texts with commas, quotes and line breaks return as they were, unless a prompt holds a line "Negative prompt: …".
    """
    if not isinstance(picture, Image.Image):
        with Image.open(picture) as opened:
            opened.load()  # the text may stand behind the pixels
            picture = opened
    text = picture.info.get("parameters")
    if not text:
        return {}
    prompts, _, settings = text.rpartition("\n")
    if not settings.startswith("Steps: "):  # other tools may leave the settings out
        prompts, settings = text, ""
    prompt, _, negative = ("\n" + prompts).partition("\n" + _NEGATIVE)
    pairs = {name: json.loads(v) if v.startswith('"') else v for name, v in _SETTING.findall(settings)}
    return {"prompt": prompt.removeprefix("\n"), "negative_prompt": negative, **pairs}
