"""Images become pixels whatever their size and mode, sheets keep every pixel, and a PNG's text survives the journey."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from images import fit, format_parameters, image_sheet, pixels_to_images, read_parameters, show_images, to_pixels

ROOT = Path(__file__).parent.parent


def smooth_image(width: int, height: int) -> Image.Image:
    """Red rises from left to right, green from top to bottom."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=-1).round().astype(np.uint8))


# ----------------------------------------------------------------------------------------------------------------------
# Size and mode
# ----------------------------------------------------------------------------------------------------------------------


def test_an_image_that_fits_keeps_its_bits():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(fit(noise, 56, 40)), np.asarray(noise))
    (back,) = pixels_to_images(to_pixels(noise.crop((0, 0, 40, 40)), 40)[None] / 2 + 0.5)
    assert np.array_equal(np.asarray(back), np.asarray(noise)[:, :40])


@pytest.mark.parametrize("size", [(64, 64), (100, 60), (61, 100), (33, 32), (300, 300)])
def test_scaled_and_cropped_as_pillow_does(size):
    """Pillow's own fit differs by half a pixel at most, where an odd number of columns has to go."""
    image = smooth_image(*size)
    expected = np.asarray(ImageOps.fit(image, (48, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(np.asarray(fit(image, 48, 32)) - expected).max() <= 255 / min(size)


@pytest.mark.parametrize("size", [(1, 1), (1, 100_000), (100_000, 1), (3, 2), (513, 7)])
def test_extreme_sizes(size):
    image = Image.new("RGB", size, (255, 0, 0))
    assert fit(image, 24, 16).size == (24, 16)
    red = torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 16, 16)
    assert torch.equal(to_pixels(image, 16), red)


def test_small_details_are_averaged_not_skipped():
    """Antialiasing: black and white columns, four to a pixel, become grey."""
    stripes = np.zeros((128, 128, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    assert to_pixels(Image.fromarray(stripes), 32)[:, 4:-4, 4:-4].abs().max() < 0.05


def test_a_turned_transparent_or_grey_image_is_fitted_upright_on_white(tmp_path):
    image = smooth_image(40, 80)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    image.save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        upright = image.transpose(Image.Transpose.ROTATE_270)
        assert np.array_equal(np.asarray(fit(turned, 64, 32)), np.asarray(fit(upright, 64, 32)))
    assert fit(Image.new("RGBA", (30, 20), (0, 0, 0, 0)), 16, 16).getextrema() == ((255, 255),) * 3
    assert fit(Image.new("L", (30, 20), 77), 16, 16).getextrema() == ((77, 77),) * 3


# ----------------------------------------------------------------------------------------------------------------------
# Sheets
# ----------------------------------------------------------------------------------------------------------------------


def test_a_sheet_holds_every_image_in_rows_on_white():
    images = [smooth_image(12, 8).point(lambda v, k=k: v // (k + 1)) for k in range(5)]
    sheet = np.asarray(image_sheet(images, columns=3, gap=2))
    assert sheet.shape == (2 * (8 + 2) + 2, 3 * (12 + 2) + 2, 3)
    for i, image in enumerate(images):
        top, left = 2 + (i // 3) * 10, 2 + (i % 3) * 14
        assert np.array_equal(sheet[top : top + 8, left : left + 12], np.asarray(image))
    assert (sheet[12:, 2 + 2 * 14 :] == 255).all()  # the sixth place is empty
    assert (sheet[:2] == 255).all() and (sheet[:, :2] == 255).all()


def test_a_sheet_of_one_image_is_the_image():
    image = smooth_image(12, 8).convert("RGBA")
    assert np.array_equal(np.asarray(image_sheet([image], columns=4)), np.asarray(image.convert("RGB")))


def test_images_and_channels_are_shown_in_rows(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    show_images([smooth_image(8, 8), torch.zeros(8, 8), smooth_image(8, 8)], columns=2, titles=["a", "b"])
    axes = pyplot.gcf().axes
    assert [len(axis.images) for axis in axes] == [1, 1, 1, 0]
    assert [axis.get_title() for axis in axes] == ["a", "b", "", ""]
    pyplot.close()


def test_importing_images_loads_neither_torchvision_nor_matplotlib():
    code = "import sys, images; print({'torchvision', 'matplotlib'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"


# ----------------------------------------------------------------------------------------------------------------------
# The text that a PNG carries
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "negative"),
    [("", ""), ("", "no"), ("a\n", "\nb"), ("Steps: 3, Sampler: x", ""), ("a, b: c", 'd "e", f'), (" a ", " b ")],
)
def test_awkward_texts_survive(prompt, negative):
    image = Image.new("RGB", (8, 8))
    settings = {"Steps": 3, "Model": 'a, "b": c\\d', "Empty": ""}
    image.info["parameters"] = format_parameters(prompt, negative, **settings)
    expected = {"prompt": prompt, "negative_prompt": negative} | {name: str(v) for name, v in settings.items()}
    assert read_parameters(image) == expected


def test_what_other_tools_wrote_is_read():
    image = Image.new("RGB", (8, 8))
    assert read_parameters(image) == {}
    image.info["parameters"] = (
        "masterpiece, (fox:1.2)\nNegative prompt: bad\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, "
        'Size: 512x512, Model hash: abc, Lora hashes: "a: 1, b: 2", Version: v1.9'
    )
    read = read_parameters(image)
    assert read["prompt"] == "masterpiece, (fox:1.2)"
    assert (read["Sampler"], read["Lora hashes"], read["Version"]) == ("DPM++ 2M Karras", "a: 1, b: 2", "v1.9")
    image.info["parameters"] = "only a prompt,\nin two lines"
    assert read_parameters(image) == {"prompt": "only a prompt,\nin two lines", "negative_prompt": ""}
