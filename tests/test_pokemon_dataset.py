"""Where captioned pictures come from, how they become pixels, and when they are encoded again."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import pokemon_dataset
from images import to_pixels
from pokemon_dataset import CaptionedLatents, Rows, encode_pictures, load_captioned_pictures, prepare
from tests.tiny import tiny_text_encoder, tiny_vae

CPU = torch.device("cpu")
CAPTIONS = {"red.png": "a red monster", "blue.png": "a blue monster", "green.png": "a red monster"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imagefolder of three pictures, the last caption a repetition."""
    where = tmp_path / "pictures"
    where.mkdir()
    for name in CAPTIONS:
        Image.new("RGB", (48, 40), name.removesuffix(".png")).save(where / name)
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in CAPTIONS.items()]
    (where / "metadata.jsonl").write_text("\n".join(lines))
    return where


class CountingVAE(torch.nn.Module):
    """A VAE that counts the pictures it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.vae, self.seen = tiny_vae(), 0

    @property
    def config(self) -> object:
        return self.vae.config

    def encode(self, images: torch.Tensor) -> object:
        assert not torch.is_grad_enabled() and not self.training
        self.seen += len(images)
        return self.vae.encode(images)


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------


def test_imagefolder(folder: Path) -> None:
    found = load_captioned_pictures(str(folder))
    assert sorted(found["text"]) == sorted(CAPTIONS.values())
    assert found.column_names == ["image", "text"]


def test_metadata_csv(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    rows = [f"{name},{text}" for name, text in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert sorted(load_captioned_pictures(str(folder))["text"]) == sorted(CAPTIONS.values())


def test_txt_captions(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n")
    found = load_captioned_pictures(str(folder))
    by_colour = {
        text: Image.open(cell["path"]).getpixel((0, 0))
        for cell, text in zip(found["image"], found["text"], strict=True)
    }
    assert by_colour["a blue monster"] == (0, 0, 255)


def test_caption_column_is_found_or_named(folder: Path) -> None:
    lines = [json.dumps({"file_name": name, "zh_text": "红", "en_text": text}) for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert set(load_captioned_pictures(str(folder))["text"]) == set(CAPTIONS.values())
    assert set(load_captioned_pictures(str(folder), caption_column="zh_text")["text"]) == {"红"}
    with pytest.raises(ValueError, match=r"--caption_column wrong.*en_text"):
        load_captioned_pictures(str(folder), caption_column="wrong")


def test_sources_that_fail_say_what_to_do(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_captioned_pictures("./nowhere")
    with pytest.raises(FileNotFoundError, match=r"svjack.*--dataset monsters"):  # offline
        load_captioned_pictures(pokemon_dataset.DEFAULT_DATASET)
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(ValueError, match=r"blue\.png has no caption"):
        load_captioned_pictures(str(folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        load_captioned_pictures(str(tmp_path / "empty"))


def test_a_file_that_is_no_picture_is_named(folder: Path) -> None:
    (folder / "red.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"red\.png.*cannot be read as a picture"):
        encode_pictures(load_captioned_pictures(str(folder)), tiny_vae(), 16, CPU)


# ----------------------------------------------------------------------------------------------------------------------
# The transform
# ----------------------------------------------------------------------------------------------------------------------


def test_transparency_lies_over_white() -> None:
    picture = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (to_pixels(picture, 16) == 1).all()
    palette = Image.new("P", (20, 20), 0)
    palette.info["transparency"] = 0
    assert (to_pixels(palette, 16) == 1).all()


def test_exif_turns_the_picture(tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "black")
    picture.paste("white", (0, 0, 32, 16))  # the upper half, until a reader turns it by 90°
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "turned.png", exif=exif)
    pixels = to_pixels(Image.open(tmp_path / "turned.png"), 16)
    assert pixels[:, :, 12].min() == 1 and pixels[:, :, 3].max() == -1


def test_shorter_side_and_centre_crop_keep_the_aspect() -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))  # the middle third is what remains
    assert (to_pixels(wide, 16)[:, :, 2:14] > 0.99).all()
    assert to_pixels(wide, 16).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "I;16", "F", "HSV"])
def test_every_mode_becomes_pixels_in_range(mode: str) -> None:
    picture = Image.new(mode, (20, 30))
    pixels = to_pixels(picture, 8)
    assert pixels.shape == (3, 8, 8) and pixels.min() >= -1 and pixels.max() <= 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16))
    assert to_pixels(grey, 8).mean().abs() < 0.01  # half of white


# ----------------------------------------------------------------------------------------------------------------------
# The cache
# ----------------------------------------------------------------------------------------------------------------------


def test_encoded_once_until_something_changes(folder: Path) -> None:
    vae = CountingVAE()

    def encode(resolution: int = 32) -> int:
        before = vae.seen
        rows = encode_pictures(load_captioned_pictures(str(folder)), vae, resolution, CPU)
        assert len(rows) == 3
        return vae.seen - before

    assert encode() == 6  # three pictures and their mirrors
    assert encode() == 0  # a second start
    assert encode(resolution=40) == 6
    Image.new("RGB", (48, 40), "black").save(folder / "red.png")  # one picture
    assert encode() == 6
    with torch.no_grad():
        vae.vae.quant_conv.bias += 0.5  # the VAE
    assert encode() == 6
    assert encode() == 0


def test_moments_are_those_of_the_vae(folder: Path) -> None:
    vae = tiny_vae()
    picture = Image.effect_noise((48, 48), 80).convert("RGB")
    picture.save(folder / "red.png")
    found = load_captioned_pictures(str(folder))
    row = next(i for i, cell in enumerate(found["image"]) if cell["path"].endswith("red.png"))
    moments = torch.from_numpy(np.array(encode_pictures(found, vae, 32, CPU)[row]["moments"])).float()
    pixels = to_pixels(picture, 32)[None]
    with torch.no_grad():
        torch.testing.assert_close(moments[0], vae.encode(pixels).moments[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(moments[1], vae.encode(pixels.flip(-1)).moments[0], rtol=2e-3, atol=2e-3)


def test_prepare_encodes_distinct_captions_and_the_empty_one(folder: Path) -> None:
    encoder, asked = tiny_text_encoder(), []

    def encode(prompts: list[str]) -> torch.Tensor:
        asked.extend(prompts)
        return encoder(prompts)

    data = prepare(load_captioned_pictures(str(folder)), tiny_vae(), encode, "v1", 32, CPU)
    assert data.captions == ["", "a blue monster", "a red monster"]
    asked.clear()
    prepare(load_captioned_pictures(str(folder)), tiny_vae(), encode, "v1", 32, CPU)
    assert not asked  # a second start
    chosen, no, yes = torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)
    _, context = data.gather(chosen, no, no)
    texts = load_captioned_pictures(str(folder))["text"]
    torch.testing.assert_close(context, encoder(texts), rtol=2e-3, atol=2e-3)
    _, dropped = data.gather(chosen, no, yes)
    torch.testing.assert_close(dropped, encoder([""] * 3), rtol=2e-3, atol=2e-3)
    upright, _ = data.gather(chosen, no, no)
    mirrored, _ = data.gather(chosen, yes, no)
    assert upright.shape == mirrored.shape == (3, 8, 4, 4)


def test_large_sets_stay_on_disk(folder: Path) -> None:
    table = encode_pictures(load_captioned_pictures(str(folder)), tiny_vae(), 32, CPU)
    mapped, resident = Rows(table, "moments", CPU, limit=0), Rows(table, "moments", CPU)
    assert mapped.resident is None and resident.resident is not None
    indices = torch.tensor([2, 0, 2])
    torch.testing.assert_close(mapped[indices], resident[indices])


def test_real_pictures(pokemon_folder: Path, tmp_path: Path) -> None:
    """A handful of the real ones: webp, captions from metadata.jsonl, a white ground that stays white."""
    lines = (pokemon_folder / "metadata.jsonl").read_text().splitlines()[:4]
    few = tmp_path / "few"
    few.mkdir()
    for line in lines:
        shutil.copy(pokemon_folder / json.loads(line)["file_name"], few)
    (few / "metadata.jsonl").write_text("\n".join(lines))
    found = load_captioned_pictures(str(few))
    assert all("pokemon" in text for text in found["text"])
    corner = to_pixels(pokemon_dataset.open_picture(found[0]["image"]), 64)[:, 0, 0]
    assert (corner > 0.95).all()
    data = prepare(found, tiny_vae(), tiny_text_encoder(), "v1", 64, CPU)
    assert isinstance(data, CaptionedLatents) and len(data) == 4
