"""What people put into a data set: each kind works, or is named in one sentence; none crashes, none is silently wrong.

Images, captions, metadata, folders and damaged cache files are made here, one kind at a time.
"""

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, features

from pokemon_dataset import load_captioned_images
from tests.tiny import tiny_text_encoder, tiny_vae
from training import captioned_latents
from training.captioned_latents import CaptionedLatents, prepare
from training.encoded_cache import EncodedCache
from training.image_files import MOST_PIXELS, content_of, decode, pixels_of
from training.reproducible import Processes
from training.script import UserError

ALONE = Processes(0, 1, torch.device("cpu"))
R = 16  # side in pixels
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def models() -> tuple:
    torch.manual_seed(0)
    return tiny_vae(), tiny_text_encoder()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image that is fine, with its caption; each test adds something."""
    where = tmp_path / "images"
    where.mkdir()
    Image.new("RGB", (20, 20), RED).save(where / "good.png")
    (where / "good.txt").write_text("a good one")
    return where


def load_and_prepare(folder: Path, models: tuple, on_bad_image: str = "error", **options: str) -> CaptionedLatents:
    return prepare(load_captioned_images(str(folder), **options), *models, R, ALONE, on_bad_image=on_bad_image)


def in_format(image: Image.Image, name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, name, **options)
    return buffer.getvalue()


def noise(side: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG that claims a size, 8 bits RGB, with these chunks after its header."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + png_chunk(b"IEND", b"")


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


# ----------------------------------------------------------------------------------------------------------------------
# Images that cannot be used: listed by name before anything is encoded, or skipped
# ----------------------------------------------------------------------------------------------------------------------

PNG = in_format(noise(), "PNG")
IDAT = PNG.index(b"IDAT")
ZEROS = zlib.compress(bytes(10_000_000))
BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "an empty file"),
    "one_byte.png": (b"\x89", "no PNG, JPEG"),
    "text.png": (b"this is a text about a monster", "no PNG, JPEG"),
    "page_of_an_error.jpg": (b"<html><body>403 Forbidden</body></html>", "no PNG, JPEG"),
    "drawing.svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "no PNG, JPEG"),
    "document.png": (b"%PDF-1.7\n%\xe2\xe3", "no PNG, JPEG"),
    "pickle.png": (pickle.dumps(os.getcwd), "no PNG, JPEG"),
    "truncated.png": (PNG[: len(PNG) // 2], "Error"),
    "without_its_end.png": (PNG[:-12], "Error"),
    "truncated.jpg": (in_format(noise(), "JPEG")[:1500], "truncated"),
    "truncated.webp": (in_format(noise(), "WEBP")[:500], "Error"),
    "truncated.bmp": (in_format(noise(), "BMP")[:500], "truncated"),
    "truncated.tif": (in_format(noise(), "TIFF")[:500], "Error"),
    "truncated.gif": (in_format(noise(), "GIF")[:900], "Error|truncated"),
    "header_only.jpg": (in_format(noise(), "JPEG")[:4], "Error|no PNG"),
    "one_wrong_bit.png": (flipped(PNG, IDAT + 3000), "Error"),
    "wrong_header.png": (flipped(PNG, 20), "no PNG.*or a damaged one"),
    "stored_block_with_a_wrong_byte.png": (
        flipped(in_format(noise(), "PNG", compress_level=0), 5000),  # decodes without complaint: one pixel is wrong
        "Error",
    ),
    "no_pixels.png": (png(8, 8), "Error"),
    "bomb.png": (png(60_000, 60_000, png_chunk(b"IDAT", ZEROS)), "3600000000|bomb"),
    "half_a_bomb.png": (png(12_000, 9_000, png_chunk(b"IDAT", ZEROS)), f"12000 × 9000 pixels.* {MOST_PIXELS:,}"),
    "bomb.gif": (b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b",\0\0\0\0\1\0\1\0\0;", "bomb"),
    "text_bomb.png": (png(1, 1, png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(100_000_000)))), "Error"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "no PNG, JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_images_are_listed_or_skipped(
    folder: Path, models: tuple, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, reason = BAD_IMAGES[name]
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_text("a bad one")
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("a program was started"))
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=rf"1 of 2 images cannot be used: .*{name} \(.*({reason}).*\).*--on_bad_image"):
        load_and_prepare(folder, models)
    assert not list((folder.parent / "cache").rglob("*.rows"))  # nothing was encoded before
    with pytest.warns(UserWarning, match=rf"{name}.*left out"):
        data = load_and_prepare(folder, models, on_bad_image="skip")
    assert len(data) == 1 and data.captions == ["", "a good one"]


def test_all_bad_images_are_listed_up_to_a_limit(folder: Path, models: tuple) -> None:
    for i in range(30):
        (folder / f"bad_{i:02d}.png").write_bytes(b"no")
        (folder / f"bad_{i:02d}.txt").write_text("a bad one")
    with pytest.raises(UserError, match=r"30 of 31 images.*bad_00\.png.*bad_19\.png.*and 10 more") as caught:
        load_and_prepare(folder, models)
    assert "bad_20.png" not in str(caught.value)
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match=r"30 of 30 images.*None is left"):
        load_and_prepare(folder, models, on_bad_image="skip")


def test_files_that_may_not_be_read(folder: Path, models: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "secret.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)  # tests may run as root, who may read everything
    shutil.copy(folder / "good.png", folder / "secret.png")
    (folder / "secret.txt").write_text("a secret")
    with pytest.raises(UserError, match=r"secret\.png \(Permission denied\)"):
        load_and_prepare(folder, models)


def test_a_file_that_vanishes_or_changes_meanwhile(
    folder: Path, models: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = load_captioned_images(str(folder))
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match=r"good\.png \(No such file"):
        prepare(found, *models, R, ALONE)
    Image.new("RGB", (20, 20), RED).save(folder / "good.png")
    read = iter([content_of, content_of])  # for its key, and to see whether it can be decoded
    monkeypatch.setattr("training.image_files.content_of", lambda cell: next(read)(cell))
    monkeypatch.setattr(captioned_latents, "content_of", lambda cell: GOOD_PNG + b" ")  # for good, another time
    with pytest.raises(UserError, match=r"good\.png changed while images were encoded \(other content\); start again"):
        prepare(found, *models, R, ALONE)
    assert not list((folder.parent / "cache").rglob("images/*/*.rows"))


def test_random_damage_never_crashes() -> None:
    """Every kind of file with random bytes changed: pixels or a reason, no other exception."""
    rng = np.random.default_rng(0)
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        whole = np.frombuffer(in_format(noise(24), name), np.uint8)
        for _ in range(25):
            damaged = whole.copy()
            damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 255, 3)
            try:
                assert pixels_of(damaged.tobytes(), R).shape == (3, R, R)
            except UserError as error:
                assert str(error)


# ----------------------------------------------------------------------------------------------------------------------
# Images that are odd and work
# ----------------------------------------------------------------------------------------------------------------------


def frames(*colours: tuple) -> list[Image.Image]:
    return [Image.new("RGB", (20, 20), colour) for colour in colours]


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (40, 20), BLUE)
    image.paste(RED, (0, 0, 40, 10))  # above; on the right once it is turned
    return in_format(image, "PNG", exif=exif)


def animated(name: str) -> bytes:
    first, *rest = frames(RED, BLUE)
    return in_format(first, name, save_all=True, append_images=rest, **({"lossless": True} if name == "WEBP" else {}))


def palette() -> bytes:
    image = Image.new("P", (20, 20), 0)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return in_format(image, "PNG", transparency=0)


ODD_IMAGES: dict[str, tuple[bytes, tuple]] = {
    "cmyk.jpg": (in_format(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), "JPEG", quality=100), RED),
    "sixteen_bits.png": (in_format(Image.fromarray(np.full((20, 20), 65535, np.uint16)), "PNG"), WHITE),
    "sixteen_bits.tif": (in_format(Image.fromarray(np.full((20, 20), 32768, np.uint16)), "TIFF"), (128, 128, 128)),
    "floats.tif": (in_format(Image.fromarray(np.full((20, 20), 255, np.float32)), "TIFF"), WHITE),
    "lab.tif": (in_format(Image.new("LAB", (20, 20), (255, 128, 128)), "TIFF"), WHITE),
    "one_bit.png": (in_format(Image.new("1", (20, 20), 1), "PNG"), WHITE),
    "palette_with_transparency.png": (palette(), WHITE),
    "grey_with_transparency.png": (in_format(Image.new("LA", (20, 20), (0, 0)), "PNG"), WHITE),
    "transparent.png": (in_format(Image.new("RGBA", (20, 20), (0, 0, 0, 0)), "PNG"), WHITE),
    "turned_by_exif.png": (turned(), None),
    "animated.gif": (animated("GIF"), RED),
    "animated.webp": (animated("WEBP"), RED),
    "animated.png": (animated("PNG"), RED),
    "1x1.png": (in_format(Image.new("RGB", (1, 1), BLUE), "PNG"), BLUE),
    "1x10000.png": (in_format(Image.new("RGB", (1, 10_000), BLUE), "PNG"), BLUE),
    "10000x1.png": (in_format(Image.new("RGB", (10_000, 1), BLUE), "PNG"), BLUE),
    "png_inside.jpg": (in_format(Image.new("RGB", (20, 20), BLUE), "PNG"), BLUE),
    "UPPER.PNG": (in_format(Image.new("RGB", (20, 20), BLUE), "PNG"), BLUE),
    "progressive.jpeg": (in_format(Image.new("RGB", (20, 20), BLUE), "JPEG", progressive=True, quality=100), BLUE),
    "with spaces, a quote' and 红.png": (in_format(Image.new("RGB", (20, 20), BLUE), "PNG"), BLUE),
    "line\nbreak.png": (in_format(Image.new("RGB", (20, 20), BLUE), "PNG"), BLUE),
    "bytes_after_the_end.png": (in_format(Image.new("RGB", (20, 20), BLUE), "PNG") + b"more", BLUE),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_IMAGES)
def test_odd_images_work(folder: Path, models: tuple, name: str) -> None:
    content, colour = ODD_IMAGES[name]
    (folder / name).write_bytes(content)
    (folder / name).with_suffix(".txt").write_text("an odd one")
    data = load_and_prepare(folder, models)
    assert len(data) == 2 and data.captions == ["", "a good one", "an odd one"]
    pixels = (pixels_of(content, R) + 1) * 127.5  # (3, R, R)
    if name == "turned_by_exif.png":
        assert pixels[0, :, 12].min() > 250 and pixels[2, :, 3].min() > 250
    else:
        assert (pixels - torch.tensor(colour)[:, None, None]).abs().max() <= 1.5


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------

BAD_CAPTIONS: dict[str, tuple[bytes, str]] = {
    "latin-1": ("ein Käfer".encode("latin-1"), r"bad\.txt, line 1: not UTF-8"),
    "second line": (b"fine\n\xff", r"bad\.txt, line 2: not UTF-8"),
    "utf-16": ("a monster".encode("utf-16"), r"bad\.txt, line 1: not UTF-8"),
}
ODD_CAPTIONS: dict[str, tuple[bytes, str, str]] = {  # content, what is read, what is warned of
    "byte-order mark": ("a monster".encode("utf-8-sig"), "a monster", ""),
    "spaces and lines around": (b"\r\n  a \t monster\r\n\r\n", "a monster", ""),
    "empty": (b"", "", "1 of 2 images have an empty caption"),
    "only spaces": (b" \n\t ", "", "1 of 2 images have an empty caption"),
    "10,000 characters": (b"a " * 5000, " ".join("a" * 5000), "1 of 2 different captions are longer than 75 tokens"),
    "one word of 10,000": (b"a" * 10_000, "a" * 10_000, "1 of 2 different captions are longer than 75 tokens"),
    "Chinese": (
        "一只红色的宝可梦".encode(),
        "一只红色的宝可梦",
        "1 of 2 different captions are in a script.*CLIP reads English",
    ),
    "Russian": ("красный".encode(), "красный", "1 of 2 different captions are in a script"),
    "accents": ("a café".encode(), "a café", ""),
    "parentheses": (b"a clock (at 10:30)", "a clock (at 10:30)", ""),
    "a zero byte": (b"a\0b", "a\0b", ""),
    "a token's name": (b"a <|endoftext|> b", "a <|endoftext|> b", ""),
}


def caption(folder: Path, content: bytes) -> None:
    Image.new("RGB", (20, 20), BLUE).save(folder / "bad.png")
    (folder / "bad.txt").write_bytes(content)


@pytest.mark.parametrize("kind", BAD_CAPTIONS)
def test_bad_captions_are_named(folder: Path, kind: str) -> None:
    content, reason = BAD_CAPTIONS[kind]
    caption(folder, content)
    with pytest.raises(UserError, match=reason):
        load_captioned_images(str(folder))


@pytest.mark.parametrize("kind", ODD_CAPTIONS)
def test_odd_captions_work(folder: Path, models: tuple, kind: str) -> None:
    content, text, warning = ODD_CAPTIONS[kind]
    caption(folder, content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = load_and_prepare(folder, models)
    assert set(data.captions) == {"", "a good one", text}
    messages = [str(warned.message) for warned in caught]
    assert len(messages) == bool(warning) and re.search(warning, "".join(messages))


def test_captions_are_no_prompts(folder: Path, models: tuple) -> None:
    """What would weight a word in a prompt is literal text in a data set."""
    _, encoder = models
    caption(folder, b"a (red:1.5) \\(fox\\)")
    data = load_and_prepare(folder, models)
    row = torch.tensor([data.captions.index("a (red:1.5) \\(fox\\)")])
    ids = encoder.tokenizer("a (red:1.5) \\(fox\\)").input_ids
    with torch.no_grad():
        expected = encoder.model(torch.tensor([ids + [ids[-1]] * (77 - len(ids))])).last_hidden_state
    torch.testing.assert_close(data.contexts[row].float(), expected, rtol=2e-3, atol=2e-3)
    assert not torch.allclose(encoder(["a (red:1.5) \\(fox\\)"]), expected, atol=1e-2)


def test_missing_captions_are_named(folder: Path, models: tuple) -> None:
    for i in range(5):
        Image.new("RGB", (20, 20), BLUE).save(folder / f"mute_{i}.png")
    with pytest.raises(UserError, match=r"5 of 6 images have no caption \(mute_0\.png, .* and 2 more\)"):
        load_captioned_images(str(folder))
    with pytest.raises(UserError, match=r"--caption: .* has captions of its own \(.*good\.txt\)"):
        load_captioned_images(str(folder), caption="one for all")
    (folder / "good.txt").write_text(" \n")
    assert set(load_captioned_images(str(folder), caption="one for all")["text"]) == {"one for all"}
    assert len(load_and_prepare(folder, models, caption="one for all")) == 6


# ----------------------------------------------------------------------------------------------------------------------
# metadata.jsonl and metadata.csv
# ----------------------------------------------------------------------------------------------------------------------


def line(file_name: object = "good.png", text: object = "a caption", **more: object) -> str:
    return json.dumps({"file_name": file_name, "text": text, **more})


BAD_METADATA: dict[str, tuple[str, str | bytes, str]] = {  # which file, its content, what is said
    "a path out of the folder": (".jsonl", line("../secret.png"), r"line 1: file_name leads out of the folder"),
    "a path out, hidden": (".jsonl", line("a/../../secret.png"), r"line 1: file_name leads out of the folder"),
    "a path out, from Windows": (".jsonl", line("..\\secret.png"), r"line 1: file_name leads out of the folder"),
    "an absolute path": (".jsonl", line("/etc/passwd"), r"line 1: file_name is an absolute path"),
    "an absolute path of Windows": (".jsonl", line("C:\\x.png"), r"line 1: file_name is an absolute path"),
    "an address": (".jsonl", line("https://example.org/x.png"), r"line 1: there is no file"),
    "a missing file": (".jsonl", line() + "\n" + line("gone.png"), r"line 2: there is no file gone\.png"),
    "a name with a zero byte": (".jsonl", line("a\0.png"), r"line 1: there is no file"),
    "a name of half a character": (".jsonl", line("\ud800.png"), r"line 1: there is no file"),
    "a name that is too long": (".jsonl", line("a" * 5000 + ".png"), r"line 1: there is no file"),
    "a directory": (".jsonl", line("directory.png"), r"line 1: there is no file directory\.png"),
    "a link that leads nowhere": (".jsonl", line("nowhere.png"), r"line 1: there is no file nowhere\.png"),
    "a link to itself": (".jsonl", line("itself.png"), r"line 1: there is no file itself\.png"),
    "an image twice": (".jsonl", f"{line()}\n\n{line()}", r"line 3: good\.png stands already in line 1"),
    "an image twice, spelled otherwise": (".jsonl", f"{line()}\n{line('./good.png')}", r"line 2: .*already in line 1"),
    "no file_name": (".jsonl", '{"text": "a"}', r"line 1: file_name is missing"),
    "a number for file_name": (".jsonl", line(5), r"line 1: file_name is '5', which is no file's name"),
    "an empty file_name": (".jsonl", line(""), r"line 1: file_name is '', which is no file's name"),
    "no text in one line": (".jsonl", '{"file_name": "good.png"}\n' + line(), r"line 1: text is missing"),
    "no text at all": (".jsonl", '{"file_name": "good.png", "name": "a"}', r"no column is called text.*; it has name"),
    "a number for a caption": (".jsonl", line(text=5), r"line 1: text is 5, which is not a text in quotes"),
    "a list of captions": (".jsonl", line(text=["a", "b"]), r"line 1: text is \['a', 'b'\], which is not a text"),
    "half a character": (".jsonl", line(text="a \ud83d b"), r"line 1: text holds half a character"),
    "not JSON": (".jsonl", line() + "\n{'file_name': 'good.png'}", r"line 2: not JSON"),
    "cut short": (".jsonl", line()[:-5], r"line 1: not JSON"),
    "a list around it": (".jsonl", f"[\n{line()}\n]", r"line 1: not JSON"),
    "a list in a line": (".jsonl", f"[{line()}]", r"line 1: not an object like"),
    "nested without end": (".jsonl", "[" * 200_000, r"line 1: not JSON \(nested too deeply\)"),
    "a number without end": (".jsonl", "9" * 5000, r"line 1: not"),
    "nothing in it": (".jsonl", "", r"metadata\.jsonl: there are no lines|no column is called text"),
    "Latin-1": (".jsonl", f"{line()}\n".encode() + b'{"text": "K\xe4fer"}', r"line 2: not UTF-8"),
    "UTF-16": (".jsonl", line().encode("utf-16"), r"line 1: not UTF-8"),
    "a comma too many": (".csv", "file_name,text\ngood.png,red, round", r"line 2: 3 values for 2 columns; .*comma"),
    "a comma too few": (".csv", "file_name,text\ngood.png", r"line 2: 1 values for 2 columns"),
    "semicolons": (".csv", "file_name;text\ngood.png;red", r"line 1: the columns are \['file_name;text'\]"),
    "no header": (".csv", "good.png,red", r"line 1: the columns are"),
    "a column twice": (".csv", "file_name,text,text\ngood.png,a,b", r"line 1: the columns are"),
    "a quote left open": (".csv", 'file_name,text\ngood.png,"red\nblue.png,blue', r"line \d: not CSV"),
    "a field without end": (".csv", "file_name,text\ngood.png," + "a" * 200_000, r"line 2: not CSV \(field larger"),
    "an empty csv": (".csv", "", r"line 1: the columns are \[\]"),
    "Latin-1 csv": (".csv", b"file_name,text\ngood.png,K\xe4fer", r"line 2: not UTF-8"),
}  # fmt: skip
ODD_METADATA: dict[str, tuple[str, str | bytes, str]] = {  # which file, its content, the caption
    "a byte-order mark": (".jsonl", line().encode("utf-8-sig"), "a caption"),
    "Windows' line ends": (".jsonl", line() + "\r\n\r\n", "a caption"),
    "a line separator inside": (".jsonl", '{"file_name": "good.png", "text": "a\u2028b\u0085c"}', "a\u2028b\u0085c"),
    "null": (".jsonl", line(text=None), ""),
    "10,000 characters": (".jsonl", line(text="a" * 10_000), "a" * 10_000),
    "other columns of any kind": (".jsonl", line(boxes=[[1, 2], {"a": None}], id=7), "a caption"),
    "a path that stays inside": (".jsonl", line("directory.png/../good.png"), "a caption"),
    "a path from Windows": (".jsonl", line(".\\directory.png\\..\\good.png"), "a caption"),
    "a name with dots": (".jsonl", line("..good.png"), "a caption"),
    "a csv with a mark and spaces": (".csv", "\ufefffile_name, text\r\ngood.png, \"red, round\"\r\n", "red, round"),
    "a caption of two lines": (".csv", 'file_name,text\ngood.png,"red\nround"', "red\nround"),
    "a number in a csv": (".csv", "file_name,text\ngood.png,5", "5"),
    "an empty caption in a csv": (".csv", "file_name,text\ngood.png,", ""),
}  # fmt: skip


def metadata(folder: Path, suffix: str, content: str | bytes) -> Path:
    (folder / "good.txt").unlink()
    (folder / "directory.png").mkdir()
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "itself.png").symlink_to("itself.png")
    Image.new("RGB", (20, 20)).save(folder.parent / "secret.png")
    shutil.copy(folder / "good.png", folder / "..good.png")
    path = folder / f"metadata{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


@pytest.mark.parametrize("kind", BAD_METADATA)
def test_bad_metadata_is_one_sentence_with_file_and_line(folder: Path, kind: str) -> None:
    suffix, content, reason = BAD_METADATA[kind]
    path = metadata(folder, suffix, content)
    with pytest.raises(UserError, match=reason) as caught:
        load_captioned_images(str(folder))
    assert str(path) in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ODD_METADATA)
def test_odd_metadata_works(folder: Path, kind: str) -> None:
    metadata(folder, *ODD_METADATA[kind][:2])
    assert list(load_captioned_images(str(folder))["text"]) == [ODD_METADATA[kind][2]]


def test_one_caption_for_all_beside_metadata(folder: Path) -> None:
    metadata(folder, ".jsonl", line())
    with pytest.raises(UserError, match=r"--caption: .* has captions of its own \(.*metadata\.jsonl\)"):
        load_captioned_images(str(folder), caption="one for all")


def test_several_problems_are_counted(folder: Path) -> None:
    metadata(folder, ".jsonl", "\n".join(line(f"{i}.png") for i in range(9)))
    with pytest.raises(UserError, match=r"line 1: .*; .*line 3: .* \(and 6 lines more\)"):
        load_captioned_images(str(folder))


def test_two_metadata_files_in_one_folder(folder: Path) -> None:
    metadata(folder, ".jsonl", line())
    (folder / "metadata.csv").write_text("file_name,text\ngood.png,other")
    with pytest.raises(UserError, match=r"metadata\.csv: there is metadata\.jsonl beside it; remove one"):
        load_captioned_images(str(folder))


def test_metadata_of_a_folder_below_and_images_without_a_line(folder: Path) -> None:
    metadata(folder, ".jsonl", line())
    (folder / "more").mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "good.png", folder / "more" / name)
    (folder / "more" / "metadata.csv").write_text("file_name,text\na.png,another")
    with pytest.warns(UserWarning, match="1 images stand in no metadata file and are left out"):
        found = load_captioned_images(str(folder))
    assert list(found["text"]) == ["a caption", "another"]
    (folder / "more" / "metadata.csv").write_text("file_name,text\n../good.png,another")
    with pytest.raises(
        UserError, match=r"more/metadata\.csv, line 2: \.\./good\.png stands already in .*metadata\.jsonl"
    ):
        load_captioned_images(str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# Folders and other sources
# ----------------------------------------------------------------------------------------------------------------------


def test_links_hidden_files_and_pipes(folder: Path) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden.png").write_bytes(b"no")
    (folder / "._good.png").write_bytes(b"what a Mac leaves on other disks")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "good.png").write_bytes(b"no")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / ".ipynb_checkpoints" / "good-checkpoint.png").write_bytes(b"no")
    (folder / "directory.png").mkdir()
    (folder / "nowhere.png").symlink_to("gone.png")
    os.mkfifo(folder / "pipe.png")  # reading it would wait for ever
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(folder / "good.png", elsewhere / "linked.png")
    (elsewhere / "linked.TXT").write_text("linked")
    (folder / "link").symlink_to(elsewhere)
    found = load_captioned_images(str(folder))
    assert list(found["text"]) == ["a good one", "linked"]


def test_a_file_name_that_is_not_utf8(folder: Path) -> None:
    shutil.copy(folder / "good.png", os.fsencode(folder) + b"/\xff.png")
    with pytest.raises(UserError, match=r"\\udcff\.png' is not UTF-8; rename"):
        load_captioned_images(str(folder))


def test_a_folder_that_cannot_be_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "locked").mkdir()
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked cannot be listed \(Permission denied\)"):
        load_captioned_images(str(folder))


def test_images_are_found_behind_other_suffixes(folder: Path) -> None:
    """A dot in a name is not always a suffix; cameras' raw files, which begin as TIFF does, hold a small preview."""
    for name, form in (("Dr. Fox", "PNG"), ("x.jpg_large", "JPEG"), ("y.png.1", "PNG"), ("z.dng", "TIFF")):
        Image.new("RGB", (20, 20), BLUE).save(folder / name, form)
        (folder / f"{name}.txt").write_text(name)
    (folder / "notes.md").write_text("no image")
    assert list(load_captioned_images(str(folder))["text"]) == ["Dr. Fox", "a good one", "x.jpg_large", "y.png.1"]


def test_split_folders(folder: Path) -> None:
    for name in ("train", "Val"):
        (folder / name).mkdir()
        shutil.copy(folder / "good.png", folder / name / "x.png")
        (folder / name / "x.txt").write_text(name)
    assert list(load_captioned_images(str(folder), split="validation")["text"]) == ["Val"]
    assert list(load_captioned_images(str(folder))["text"]) == ["a good one", "train"]
    assert list(load_captioned_images(str(folder), split="train[1:]")["text"]) == ["train"]
    assert list(load_captioned_images(str(folder), split="train[:50%]")["text"]) == ["a good one"]
    for wrong in ("test", "nonsense[", "train[x]", "train+validation", "", "train[1:1]", "train[5:]"):
        with pytest.raises(UserError, match="--split"):
            load_captioned_images(str(folder), split=wrong)
    for text in folder.rglob("*.txt"):
        text.unlink()
    with pytest.warns(UserWarning, match=r": 1 images lie in folders of other splits and are left out\."):
        assert len(load_captioned_images(str(folder), caption="one for all")) == 2


def parquet(folder: Path, columns: dict, features: datasets.Features | None = None) -> None:
    shutil.rmtree(folder)
    (folder / "data").mkdir(parents=True)
    datasets.Dataset.from_dict(columns, features).to_parquet(str(folder / "data" / "train-00000-of-00001.parquet"))


def with_images(**columns: object) -> datasets.Features:
    return datasets.Features({"image": datasets.Image(), **columns})


GOOD_PNG = in_format(Image.new("RGB", (20, 20), RED), "PNG")
TEXT = datasets.Value("string")
BAD_PARQUET: dict[str, tuple[Callable[[Path], None], str]] = {
    "no images": (lambda f: parquet(f, {"text": ["a"]}), "no column holds images; it has text"),
    "no captions": (lambda f: parquet(f, {"image": [None]}, with_images()), "no captions: .*--caption"),
    "numbers for captions": (
        lambda f: parquet(f, {"image": [None], "text": [5]}, with_images(text=datasets.Value("int64"))),
        "--caption_column text: in .* that column holds no texts",
    ),
    "lists of captions": (
        lambda f: parquet(f, {"image": [None], "text": [["a"]]}, with_images(text=datasets.List(TEXT))),
        "--caption_column text: in .* that column holds no texts",
    ),
    "no rows": (lambda f: parquet(f, {"image": [], "text": []}, with_images(text=TEXT)), "--dataset"),
    "damaged": (
        lambda f: (parquet(f, {"text": ["a"]}), next(f.rglob("*.parquet")).write_bytes(b"PAR1" + bytes(50))),
        "cannot be read as a data set",
    ),
    "a pickle": (lambda f: (f / "train.parquet").write_bytes(pickle.dumps(os.getcwd)), "cannot be read as a data set"),
    "only a text": (lambda f: (f / "good.png").unlink(), "there are no images in this folder"),
    "an archive": (lambda f: ((f / "good.png").unlink(), (f / "x.zip").write_bytes(b"PK")), "--dataset"),
}


@pytest.mark.parametrize("kind", BAD_PARQUET)
def test_bad_parquet_is_one_sentence(folder: Path, kind: str) -> None:
    spoil, reason = BAD_PARQUET[kind]
    spoil(folder)
    with pytest.raises(UserError, match=reason) as caught:
        load_captioned_images(str(folder))
    assert "\n" not in str(caught.value)


HEIC = b"\0\0\0\x24ftypheic" + bytes(400)


def test_photos_that_cannot_be_read_are_named(folder: Path, models: tuple) -> None:
    """A telephone's: not passed over, as a film or a note is."""
    (folder / "good.txt").unlink()
    for name in ("a.HEIC", "b.jxl", "c"):
        (folder / name).write_bytes(HEIC)
    for name in ("film.mov", "LICENSE", "notes.txt"):
        (folder / name).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"3 of 4 images cannot be used: .*a\.HEIC \(no PNG.*b\.jxl .*/c \(no PNG"):
        load_and_prepare(folder, models, caption="a monster")
    with pytest.warns(UserWarning, match="3 of 4 .* left out"):
        assert len(load_and_prepare(folder, models, on_bad_image="skip", caption="a monster")) == 1
    (folder / "good.png").unlink()
    with pytest.raises(UserError, match="3 of 3 images cannot be used"):
        load_and_prepare(folder, models, caption="a monster")


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "b", "c", "d", "e", "f", "g.avif"])
def test_images_under_other_names_are_read(folder: Path, models: tuple, name: str) -> None:
    kinds = {"b": "PNG", "c": "GIF", "d": "WEBP", "e": "TIFF", "g.avif": "AVIF"}
    if name == "g.avif" and not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    (folder / name).write_bytes(in_format(Image.new("RGB", (20, 20), BLUE), kinds.get(name, "JPEG")))
    (folder / "good.txt").unlink()
    assert len(load_and_prepare(folder, models, caption="a monster")) == 2


def test_parquet_with_holes(folder: Path, models: tuple) -> None:
    cells = [
        {"bytes": GOOD_PNG, "path": None},
        None,
        {"bytes": b"no", "path": "b.png"},
        {"bytes": GOOD_PNG, "path": "c"},
    ]
    parquet(folder, {"image": cells, "text": ["a", "b", "c", None]}, with_images(text=TEXT))
    with pytest.raises(UserError, match=r"2 of 4 images .*row 1 \(no image in this row\); b\.png \(no PNG"):
        load_and_prepare(folder, models)
    with pytest.warns(UserWarning, match="left out"), pytest.warns(UserWarning, match="1 of 2 images have an empty"):
        data = load_and_prepare(folder, models, on_bad_image="skip")
    assert data.captions == ["", "a"] and data.caption_of.tolist() == [1, 0]


BAD_SOURCES = {
    "nowhere": "there is no such folder, and data sets .* OWNER/NAME; pass a folder .* --dataset monsters",
    "./nowhere": "there is no such folder",
    "/nowhere/at/all": "there is no such folder",
    "owner/name": "the Hugging Face hub does not give it .* --dataset monsters",
    "": "there is no such folder",
    "a/b/c": "there is no such folder",
    "x" * 5000: "there is no such folder",
    "a\0b": "there is no such folder",
    __file__: "this is a file; pass the folder",
    "monsters:": "needs a count",
    "monsters:0": "needs a count",
    "monsters:many": "needs a count",
}


@pytest.mark.parametrize("source", BAD_SOURCES, ids=lambda source: source[:20])
def test_sources_that_are_not_there(source: str) -> None:
    with pytest.raises(UserError, match=BAD_SOURCES[source]):
        load_captioned_images(source)


def test_options_that_do_not_fit(folder: Path, models: tuple) -> None:
    with pytest.raises(UserError, match=r"--revision v1: only data sets on the .* hub"):
        load_captioned_images(str(folder), revision="v1")
    with pytest.raises(UserError, match=r"--caption_column text: .* has no metadata"):
        load_captioned_images(str(folder), caption_column="text")
    with pytest.raises(UserError, match="--resolution 20 is not divisible by 8"):
        prepare(load_captioned_images(str(folder)), *models, 20, ALONE)
    with pytest.raises(UserError, match="--resolution 0"):
        prepare(load_captioned_images(str(folder)), *models, 0, ALONE)
    with pytest.raises(UserError, match="--on_bad_image ignore: choose error or skip"):
        load_and_prepare(folder, models, on_bad_image="ignore")


# ----------------------------------------------------------------------------------------------------------------------
# Cache files: damaged, cut short, foreign, lying
# ----------------------------------------------------------------------------------------------------------------------

KEYS = [bytes([i]) * 32 for i in range(6)]
VALUES = np.random.default_rng(0).standard_normal((6, 2, 3)).astype(np.float16)


def cache_in(folder: Path, maker: str = "a") -> EncodedCache:
    return EncodedCache(folder, {"made by": maker}, (2, 3))


def written(folder: Path, maker: str = "a") -> Path:
    cache = cache_in(folder, maker)
    cache.append(KEYS[:4], VALUES[:4])
    cache.append(KEYS[4:], VALUES[4:])
    cache.close()
    return next(cache.folder.glob("*.rows"))


RECORD = 4 + 32 + 2 * 6
BAD_CACHES: dict[str, tuple[Callable[[bytes], bytes], list[int]]] = {  # what happens to the file, which rows are left
    "untouched": (lambda c: c, [0, 1, 2, 3, 4, 5]),
    "cut short by a kill": (lambda c: c[:-1], [0, 1, 2, 3, 4]),
    "cut short in a key": (lambda c: c[: 3 * RECORD + 20], [0, 1, 2]),
    "only a few bytes": (lambda c: c[:10], []),
    "empty": (lambda c: b"", []),
    "a wrong value": (lambda c: flipped(c, 2 * RECORD - 1), [0, 2, 3, 4, 5]),
    "a wrong key": (lambda c: flipped(c, 2 * RECORD + 10), [0, 1, 3, 4, 5]),
    "a wrong checksum": (lambda c: flipped(c, 0), [1, 2, 3, 4, 5]),
    "zeros at the end": (lambda c: c + bytes(10 * RECORD), [0, 1, 2, 3, 4, 5]),
    "zeros where the disk lost them": (lambda c: c[:RECORD] + bytes(RECORD) + c[2 * RECORD :], [0, 2, 3, 4, 5]),
    "a byte lost in the middle": (lambda c: c[:100] + c[101:], [0, 1]),
    "a byte put before it": (lambda c: b"x" + c, []),
    "the same rows twice": (lambda c: c + c, [0, 1, 2, 3, 4, 5]),
    "something else": (lambda c: os.urandom(4096), []),
    "a pickle": (lambda c: pickle.dumps(os.getcwd) * 50, []),
}


@pytest.mark.parametrize("kind", BAD_CACHES)
def test_bad_cache_files_cost_rows_and_nothing_else(tmp_path: Path, kind: str) -> None:
    spoil, left = BAD_CACHES[kind]
    path = written(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    cache = cache_in(tmp_path)
    missing = cache.missing(KEYS)
    assert missing == [key for i, key in enumerate(KEYS) if i not in left]
    lost = [KEYS.index(key) for key in missing]
    cache.append(missing, VALUES[lost])
    cache.close()
    for again in (cache, cache_in(tmp_path)):
        assert not again.missing(KEYS) and not again.damaged
        rows = captioned_latents.Rows(again, KEYS, torch.device("cpu"), 0)
        assert np.array_equal(rows[torch.arange(6)].numpy(), VALUES)


def test_rows_of_another_encoder_do_not_fit(tmp_path: Path) -> None:
    """A file that was copied or moved between folders: same size, same keys, sound rows of something else."""
    other = written(tmp_path, "b")
    cache = cache_in(tmp_path, "a")
    cache.folder.mkdir()
    shutil.copy(other, cache.folder)
    assert cache.missing(KEYS) == KEYS


def test_things_in_the_cache_that_are_no_files(tmp_path: Path) -> None:
    path = written(tmp_path)
    (path.parent / "directory.rows").mkdir()
    (path.parent / "nowhere.rows").symlink_to("gone")
    os.mkfifo(path.parent / "pipe.rows")
    assert not cache_in(tmp_path).missing(KEYS)


def test_damaged_rows_are_told_and_encoded_again(folder: Path, models: tuple) -> None:
    data = load_and_prepare(folder, models)
    where = (torch.tensor([0]), torch.tensor([0]))
    before = data.moments[where].clone()
    for path in (folder.parent / "cache").rglob("images/*/*.rows"):
        path.write_bytes(flipped(path.read_bytes(), 60))
    with pytest.warns(UserWarning, match="1 rows in .* are damaged and will be encoded again"):
        assert torch.equal(load_and_prepare(folder, models).moments[where], before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "Permission denied")])
def test_a_cache_that_cannot_be_written(
    folder: Path, models: tuple, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("training.encoded_cache.open", refuse, raising=False)
        with pytest.raises(
            UserError, match=rf"cannot be written \({error.strerror}\): free some space.*HF_DATASETS_CACHE"
        ):
            load_and_prepare(folder, models)
    assert len(load_and_prepare(folder, models)) == 1


def test_a_disk_that_fills_in_the_middle_of_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_in(tmp_path)
    cache.append(KEYS[:2], VALUES[:2])

    class Full:
        def __init__(self, file: io.RawIOBase) -> None:
            self.file, self.calls = file, 0

        def write(self, content: memoryview) -> int:
            self.calls += 1
            if self.calls > 1:
                raise OSError(28, "No space left on device")
            return self.file.write(content[: RECORD + 7])  # a row and a piece of the next

        def close(self) -> None:
            self.file.close()

    cache._output = Full(cache._output)
    with pytest.raises(UserError, match="No space left"):
        cache.append(KEYS[2:5], VALUES[2:5])
    assert cache.missing(KEYS) == KEYS[3:]
    cache.append(KEYS[3:], VALUES[3:])  # there is room again: a new file, not the rest of a row
    assert not cache.missing(KEYS)


def test_a_file_where_the_cache_should_be(folder: Path, models: tuple) -> None:
    (folder.parent / "cache").write_text("a file")
    with pytest.raises(UserError, match="cannot be written"):
        load_and_prepare(folder, models)


def test_numbers_that_are_not_finite_are_not_kept(folder: Path, models: tuple) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)  # too large for float16
    with pytest.raises(UserError, match="not finite or too large"):
        prepare(load_captioned_images(str(folder)), vae, models[1], R, ALONE)
    assert not list((folder.parent / "cache").rglob("images/*/*.rows"))


def test_there_are_enough_kinds() -> None:
    tables = (BAD_IMAGES, ODD_IMAGES, BAD_CAPTIONS, ODD_CAPTIONS, BAD_METADATA, ODD_METADATA, BAD_PARQUET, BAD_SOURCES)
    assert sum(map(len, (*tables, BAD_CACHES))) >= 140
    assert decode(GOOD_PNG).size == (20, 20)
