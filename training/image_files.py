"""Image files that nobody has looked at yet: their content, their pixels, and a list of all that cannot be used.

A cell is what the `image` column of a data set holds undecoded: {"bytes": …, "path": …}, one of them None.
"""

import hashlib
import io
import os
import warnings
from pathlib import Path

import datasets
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from images import to_pixels
from published import first_line
from training.background import Progress, decoding_threads, in_order
from training.reproducible import Processes
from training.script import UserError

_SUFFIXES = Image.registered_extensions()  # of what this Pillow reads, such as ".jfif": "JPEG"
_AVIF = ("AVIF",) * (".avif" in _SUFFIXES)  # since Pillow 11.3
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", *_AVIF, "BMP", "GIF", "TIFF")  # no EPS, for which Pillow starts Ghostscript
# What is called an image. Photos that cannot be read are among them: they shall be named, not passed over.
IMAGE_SUFFIXES = {suffix for suffix, name in _SUFFIXES.items() if name in IMAGE_FORMATS}
IMAGE_SUFFIXES |= {".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2"}
# How these files begin; for those without such a suffix. Not BMP, whose two letters could begin a text.
_BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")
_TIFF = (b"II*\0", b"MM\0*")  # only without any suffix: cameras' raw files begin so, too, and hold a small preview
_HEIF = tuple(b"ftyp" + kind for kind in (b"heic", b"heix", b"mif1", b"avif"))
MOST_PIXELS = 89_478_485  # of an image, 9,459 × 9,459, above which Pillow warns; what claims more is not unpacked
LISTED = 20  # files that a message lists by name


class BadImageError(UserError):
    """Why a file cannot be used as an image: the reason alone, without the file's name."""


def is_image(path: str) -> bool:
    """Whether a file is an image, by its suffix or by how it begins ("Dr. Fox", "a.png.1"); it may be damaged still."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in IMAGE_SUFFIXES or suffix == ".txt":  # captions, of which there may be very many, are not opened
        return suffix != ".txt"
    try:
        with open(path, "rb") as file:
            start = file.read(12)
    except OSError:
        return False
    known = start.startswith(_BEGINNINGS if suffix else _BEGINNINGS + _TIFF)
    return known or start[8:] == b"WEBP" or start[4:] in _HEIF


def content_of(cell: dict | None) -> bytes:
    """The bytes of the image file that a cell holds or names."""
    if not cell or (cell["bytes"] is None and not cell["path"]):
        raise BadImageError("no image in this row")
    try:
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error


def decode(content: bytes) -> Image.Image:
    """An image file's bytes → the PIL image, of an animation the first; BadImageError if anything is wrong."""
    if not content:
        raise BadImageError("an empty file")
    try:
        # Twice, since Pillow compares a PNG's checksums only when asked to verify, and then gives no pixels.
        for verify in (True, False):
            image = Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)
            if image.width * image.height > MOST_PIXELS:
                raise BadImageError(f"{image.width} × {image.height} pixels, more than {MOST_PIXELS:,}")
            if verify:
                image.verify()
        image.load()
        return image
    except UnidentifiedImageError as error:
        raise BadImageError(f"no {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}, or a damaged one") from error
    except BadImageError:
        raise
    except Exception as error:  # a damaged file can raise almost anything
        raise BadImageError(first_line(error)) from error


def pixels_of(content: bytes, resolution: int) -> Tensor:
    """An image file's bytes → (3, R, R) in [-1, 1]; BadImageError if they give none."""
    image = decode(content)
    try:
        return to_pixels(image, resolution)
    except Exception as error:  # a colour space that Pillow does not convert, damaged EXIF …
        raise BadImageError(first_line(error)) from error


def name_of(cell: dict | None, index: int) -> str:
    """What a message calls an image: its path, or its row."""
    return cell["path"] if cell and cell.get("path") else f"row {index}"


# ----------------------------------------------------------------------------------------------------------------------
# Over a whole data set, its processes sharing the work
# ----------------------------------------------------------------------------------------------------------------------


def content_keys(images: datasets.Dataset, processes: Processes) -> tuple[list[bytes], dict[int, str]]:
    """SHA-256 of each image file (b"" if it cannot be read), and by index, why some cannot be read."""

    def keys_of(part: slice) -> list[bytes | str]:
        found: list[bytes | str] = []
        for cell in images[part]["image"]:
            try:
                found.append(hashlib.sha256(content_of(cell)).digest())
            except BadImageError as error:
                found.append(str(error))
        return found

    first, end = (len(images) * i // processes.count for i in (processes.rank, processes.rank + 1))
    parts = [slice(start, min(start + 64, end)) for start in range(first, end, 64)]
    mine: list[bytes | str] = []
    with Progress(end - first, "reading images", processes) as progress:
        for some in in_order(keys_of, parts, decoding_threads(processes)):
            mine += some
            progress.add(len(some))
    everyone = [key for share in processes.gather(mine) for key in share]
    bad = {i: key for i, key in enumerate(everyone) if isinstance(key, str)}
    return [b"" if i in bad else key for i, key in enumerate(everyone)], bad


def undecodable(images: datasets.Dataset, indices: list[int], resolution: int, processes: Processes) -> dict[int, str]:
    """Why some of the images at `indices` (the same on all processes) give no pixels, by index."""

    def problem(i: int) -> str:
        try:
            pixels_of(content_of(images[i]["image"]), resolution)
        except BadImageError as error:
            return str(error)
        return ""

    share, bad = indices[processes.rank :: processes.count], {}
    with Progress(len(share), "checking images", processes) as progress:
        for i, reason in zip(share, in_order(problem, share, decoding_threads(processes)), strict=True):
            progress.add(1)
            if reason:
                bad[i] = reason
    return {i: reason for of_process in processes.gather(bad) for i, reason in of_process.items()}


def refuse_or_warn(images: datasets.Dataset, bad: dict[int, str], on_bad_image: str, processes: Processes) -> None:
    """UserError with the names of all bad images, or a warning if they are to be skipped and others are left."""
    names = [f"{name_of(images[i]['image'], i)} ({bad[i]})" for i in sorted(bad)[:LISTED]]
    more = f"; and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
    text = f"{len(bad)} of {len(images)} images cannot be used: {'; '.join(names)}{more}"
    if on_bad_image == "error":
        raise UserError(f"{text}. Replace or remove them, or train without them: --on_bad_image skip.")
    if len(bad) == len(images):
        raise UserError(f"{text}. None is left to train on.")
    if processes.is_main:
        warnings.warn(f"{text}. They are left out.", stacklevel=3)
