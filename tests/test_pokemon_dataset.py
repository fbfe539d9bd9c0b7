"""Where captioned images come from, how they become pixels, and what is encoded, by whom, and when again.

What people may put into a data set is in test_bad_input.py.
"""

import collections
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from transformers import PreTrainedTokenizerBase

from images import to_pixels
from pokemon_dataset import load_captioned_images, open_image
from tests.tiny import tiny_text_encoder, tiny_vae
from text_encoder import TextEncoder
from training import captioned_latents, encoded_cache
from training.background import Progress, in_order
from training.captioned_latents import CaptionedLatents, Rows, prepare
from training.encoded_cache import EncodedCache, encode_missing, fingerprint, tokenizer_fingerprint
from training.image_files import decode
from training.presets import DEFAULT_DATASET
from training.reproducible import Processes
from training.script import UserError
from vae_model import VAE, VAEConfig

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
R = 32  # side in pixels
CAPTIONS = {"red.png": "a red monster", "blue.png": "a blue monster", "green.png": "a red monster"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(captioned_latents.PIXELS_AT_ONCE, "cpu", R**2)  # image by image, where a test does not say more


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An imagefolder of three images, the last caption a repetition."""
    where = tmp_path / "images"
    where.mkdir()
    for name in CAPTIONS:
        Image.new("RGB", (48, 40), name.removesuffix(".png")).save(where / name)
    describe(where, CAPTIONS)
    return where


def describe(where: Path, captions: dict[str, str]) -> None:
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in captions.items()]
    (where / "metadata.jsonl").write_text("\n".join(lines))


def noise(seed: int, side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def many_images(where: Path, count: int) -> Path:
    """A folder of different images, each with a caption of its own."""
    where.mkdir()
    for i in range(count):
        noise(i).save(where / f"{i:03d}.png")
    describe(where, {f"{i:03d}.png": f"monster number {i}" for i in range(count)})
    return where


class Counts:
    """How often the encoders ran: images and mirrors together, and rows of tokens, padding included."""

    def __init__(self, vae: VAE, encoder: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.images = self.captions = 0
        self.texts: list[list[int]] = []
        encode, forward = vae.encode, encoder.model.forward

        def count_images(pixels: torch.Tensor) -> object:
            assert not torch.is_grad_enabled() and not vae.training
            self.images += len(pixels)
            return encode(pixels)

        def count_captions(ids: torch.Tensor, **options: object) -> object:
            assert not torch.is_grad_enabled()
            self.captions += len(ids)
            self.texts += [row for row in ids.tolist() if row != encoder.framed([])]
            return forward(ids, **options)

        monkeypatch.setattr(vae, "encode", count_images)
        monkeypatch.setattr(encoder.model, "forward", count_captions)

    def since(self, before: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Images encoded (each with its mirror) and captions, without padding, since `before`."""
        return self.images // 2 - before[0], len(self.texts) - before[1]


@pytest.fixture
def models() -> tuple[VAE, TextEncoder]:
    torch.manual_seed(0)
    return tiny_vae(), tiny_text_encoder()


@pytest.fixture
def encode(models: tuple, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Prepares a folder and says how many images and captions were encoded for it."""
    counts = Counts(*models, monkeypatch)

    def run(folder: Path, resolution: int = R, precision: torch.dtype = torch.float32) -> tuple[int, int]:
        before = counts.since()
        run.data = prepare(load_captioned_images(str(folder)), *models, resolution, ALONE, precision)
        return counts.since(before)

    return run


def everything(data: CaptionedLatents) -> list[torch.Tensor]:
    """All that training can gather: images, mirrors, contexts."""
    all_of_them, no = torch.arange(len(data)), torch.zeros(len(data), dtype=torch.bool)
    upright, contexts = data.gather(all_of_them, no, no)
    mirrored, dropped = data.gather(all_of_them, ~no, ~no)
    return [upright, mirrored, contexts, dropped]


# ----------------------------------------------------------------------------------------------------------------------
# Sources
# ----------------------------------------------------------------------------------------------------------------------


def test_imagefolder(folder: Path) -> None:
    found = load_captioned_images(str(folder))
    assert list(found["text"]) == list(CAPTIONS.values())
    assert found.column_names == ["image", "text"]


def test_metadata_csv(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    rows = [f"{name},{text}" for name, text in CAPTIONS.items()]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    assert list(load_captioned_images(str(folder))["text"]) == list(CAPTIONS.values())


def test_txt_captions(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    for name, text in CAPTIONS.items():
        (folder / name).with_suffix(".txt").write_text(text + "\n")
    found = load_captioned_images(str(folder))
    by_colour = {
        text: open_image(cell).getpixel((0, 0)) for cell, text in zip(found["image"], found["text"], strict=True)
    }
    assert by_colour["a blue monster"] == (0, 0, 255)


def test_one_caption_for_all(folder: Path) -> None:
    (folder / "metadata.jsonl").unlink()
    found = load_captioned_images(str(folder), caption="a photo of sks monster")
    assert list(found["text"]) == ["a photo of sks monster"] * 3


@pytest.mark.parametrize("more", [{}, {"label": 3}], ids=["names alone", "labels"])
def test_one_caption_for_all_that_a_metadata_file_names(folder: Path, more: dict) -> None:
    rows = [json.dumps({"file_name": name, **more}) for name in ("red.png", "blue.png")]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"no column is called text, en_text, caption; .* --caption\."):
        load_captioned_images(str(folder))
    with pytest.raises(UserError, match=r"--caption_column text: .* has the columns"):
        load_captioned_images(str(folder), caption_column="text", caption="a monster")
    with pytest.warns(UserWarning, match="1 images stand in no metadata file"):
        found = load_captioned_images(str(folder), caption="a monster")
    assert [Path(cell["path"]).name for cell in found["image"]] == ["red.png", "blue.png"]
    assert list(found["text"]) == ["a monster"] * 2


def test_captions_of_its_own_are_not_overruled(folder: Path) -> None:
    for column in (None, "text"):
        with pytest.raises(UserError, match=r"--caption: .* has captions of its own .*metadata\.jsonl"):
            load_captioned_images(str(folder), caption_column=column, caption="a monster")


def test_caption_column_is_found_or_named(folder: Path) -> None:
    lines = [json.dumps({"file_name": name, "zh_text": "红", "en_text": text}) for name, text in CAPTIONS.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert set(load_captioned_images(str(folder))["text"]) == set(CAPTIONS.values())
    assert set(load_captioned_images(str(folder), caption_column="zh_text")["text"]) == {"红"}
    with pytest.raises(UserError, match=r"--caption_column wrong.*en_text"):
        load_captioned_images(str(folder), caption_column="wrong")


def test_a_folder_in_the_layout_of_the_hub(folder: Path, tmp_path: Path) -> None:
    """Parquet files with the images in them; the same images have the same place in the cache as those of a folder."""
    cells = [{"bytes": (folder / name).read_bytes(), "path": None} for name in CAPTIONS]
    columns = {"image": cells, "en_text": list(CAPTIONS.values()), "label": [1, 2, 3]}
    kinds = {"image": datasets.Image(), "en_text": datasets.Value("string"), "label": datasets.Value("int64")}
    table = datasets.Dataset.from_dict(columns, datasets.Features(kinds))
    (tmp_path / "hub" / "data").mkdir(parents=True)
    table.to_parquet(str(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet"))
    found = load_captioned_images(str(tmp_path / "hub"))
    assert found.column_names == ["image", "text"] and list(found["text"]) == list(CAPTIONS.values())
    assert [open_image(cell).getpixel((0, 0)) for cell in found["image"]] == [(255, 0, 0), (0, 0, 255), (0, 128, 0)]
    assert len(load_captioned_images(str(tmp_path / "hub"), split="train[:2]")) == 2
    with pytest.raises(UserError, match=r"--caption: .* has captions of its own"):
        load_captioned_images(str(tmp_path / "hub"), caption="one for all")


def test_monsters() -> None:
    found = load_captioned_images("monsters:3", split="train[1:]")
    assert found.column_names == ["image", "text"] and len(found) == 2
    assert open_image(found[0]["image"]).size == (512, 512)
    with pytest.raises(UserError, match="--split test: monsters:3 has train"):
        load_captioned_images("monsters:3", split="test")


def test_a_data_set_of_the_hub_is_read_from_its_cache_when_the_hub_is_not_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One short request, then what was downloaded before; no half minute of trying again."""
    asked = []

    def no_network(self: object, name: str, **options: object) -> None:
        asked.append((name, options))
        raise ConnectionError("no network")

    def cached(name: str, **options: object) -> datasets.Dataset:
        assert datasets.config.HF_HUB_OFFLINE
        if name != "owner/known":
            raise FileNotFoundError("not in the cache")
        return datasets.Dataset.from_dict(
            {"image": [str(folder / "red.png")], "text": ["a"]},
            datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")}),
        )

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", no_network)
    monkeypatch.setattr(datasets, "load_dataset", cached)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert list(load_captioned_images("owner/known", revision="v1")["text"]) == ["a"]
    assert asked == [("owner/known", {"revision": "v1", "timeout": 10})]
    with pytest.raises(UserError, match=r"owner/unknown: .*\(ConnectionError: no network\).*--dataset monsters"):
        load_captioned_images("owner/unknown")
    assert datasets.config.HF_HUB_OFFLINE is False


def test_the_default_set_offline_says_what_to_do() -> None:
    with pytest.raises(UserError, match=r"svjack.*--dataset monsters"):
        load_captioned_images(DEFAULT_DATASET)


# ----------------------------------------------------------------------------------------------------------------------
# The transform
# ----------------------------------------------------------------------------------------------------------------------


def test_transparency_lies_over_white() -> None:
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert (to_pixels(image, 16) == 1).all()
    palette = Image.new("P", (20, 20), 0)
    palette.info["transparency"] = 0
    assert (to_pixels(palette, 16) == 1).all()


def test_exif_turns_the_image(tmp_path: Path) -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 16))  # the upper half, until a reader turns it by 90°
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = to_pixels(Image.open(tmp_path / "turned.png"), 16)
    assert pixels[:, :, 12].min() == 1 and pixels[:, :, 3].max() == -1


def test_shorter_side_and_centre_crop_keep_the_aspect() -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste("white", (20, 0, 40, 20))  # the middle third is what remains
    assert (to_pixels(wide, 16)[:, :, 2:14] > 0.99).all()
    assert to_pixels(wide, 16).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "CMYK", "I;16", "F", "HSV"])
def test_every_mode_becomes_pixels_in_range(mode: str) -> None:
    image = Image.new(mode, (20, 30))
    pixels = to_pixels(image, 8)
    assert pixels.shape == (3, 8, 8) and pixels.min() >= -1 and pixels.max() <= 1


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    grey = Image.fromarray(np.full((20, 20), 32768, dtype=np.uint16))
    assert to_pixels(grey, 8).mean().abs() < 0.01  # half of white


# ----------------------------------------------------------------------------------------------------------------------
# What is encoded again, and what is not
# ----------------------------------------------------------------------------------------------------------------------


def test_images_and_captions_are_encoded_once(folder: Path, encode: Callable) -> None:
    assert encode(folder) == (3, 2)  # two captions that differ; the empty one is not counted
    assert encode(folder) == (0, 0)


def test_a_mended_caption_is_one_caption(folder: Path, encode: Callable) -> None:
    encode(folder)
    describe(folder, CAPTIONS | {"red.png": "a scarlet monster"})
    assert encode(folder) == (0, 1)
    assert encode.data.captions == ["", "a blue monster", "a red monster", "a scarlet monster"]
    describe(folder, CAPTIONS)
    assert encode(folder) == (0, 0)  # mended back


def test_an_added_image_is_one_image(folder: Path, encode: Callable) -> None:
    encode(folder)
    noise(0).save(folder / "new.png")
    describe(folder, CAPTIONS | {"new.png": "a blue monster"})
    assert encode(folder) == (1, 0)


def test_an_image_that_changed_is_one_image(folder: Path, encode: Callable) -> None:
    encode(folder)
    stamp = (folder / "red.png").stat()
    Image.new("RGB", (48, 40), (254, 0, 0)).save(folder / "red.png")
    os.utime(folder / "red.png", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # a copy can keep the old time
    assert encode(folder) == (1, 0)


def test_order_names_and_removals_are_nothing(folder: Path, encode: Callable) -> None:
    encode(folder)
    before = everything(encode.data)
    describe(folder, dict(reversed(CAPTIONS.items())))
    assert encode(folder) == (0, 0)
    for turned, straight in zip(everything(encode.data)[:3], before[:3], strict=True):
        assert torch.equal(turned.flip(0), straight)
    (folder / "red.png").rename(folder / "renamed.png")
    describe(folder, {"renamed.png": "a red monster", "blue.png": "a blue monster"})
    assert encode(folder) == (0, 0)
    assert torch.equal(everything(encode.data)[0], before[0][:2])


def test_duplicates_are_encoded_once(folder: Path, encode: Callable) -> None:
    for name in ("a.png", "b.png"):
        shutil.copy(folder / "red.png", folder / name)
    describe(folder, {"a.png": "twins", **CAPTIONS, "b.png": "twins"})
    assert encode(folder) == (3, 3)
    moments = everything(encode.data)[0]
    assert torch.equal(moments[0], moments[1]) and torch.equal(moments[0], moments[4])
    assert not torch.equal(moments[0], moments[2])


def test_another_encoder_encodes_again(folder: Path, models: tuple, encode: Callable) -> None:
    vae, encoder = models
    assert encode(folder) == (3, 2)
    assert encode(folder, resolution=40) == (3, 0)
    assert encode(folder, precision=torch.bfloat16) == (3, 0)
    with torch.no_grad():
        vae.decoder.conv_in.weight += 0.1  # makes no latents
    assert encode(folder) == (0, 0)
    with torch.no_grad():
        vae.quant_conv.bias += 0.5
    assert encode(folder) == (3, 0)
    with torch.no_grad():
        next(encoder.model.parameters())[0] += 0.5
    assert encode(folder) == (0, 2)
    swap_two_words(encoder.tokenizer)
    assert encode(folder) == (0, 2)
    # What the weights do not tell:
    encoder.model.config.layer_norm_eps = 1e-3
    assert encode(folder) == (0, 2)
    vae.config = dataclasses.replace(vae.config, norm_num_groups=2)
    assert encode(folder) == (3, 0)
    assert encode(folder) == (0, 0)


def test_another_transform_encodes_again(folder: Path, encode: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    encode(folder)
    monkeypatch.setattr(captioned_latents, "TRANSFORM_VERSION", "another")
    assert encode(folder) == (3, 0)


def swap_two_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """The same size of vocabulary, other ids."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(content))


def test_the_tokenizer_counts_with_its_content() -> None:
    """And how it was called last does not count."""
    first, second = tiny_text_encoder().tokenizer, tiny_text_encoder().tokenizer
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    first("a text", padding="max_length", truncation=True, max_length=9)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(second)
    swap_two_words(second)
    assert tokenizer_fingerprint(first) != tokenizer_fingerprint(second)


def test_fingerprints_tell_weights_names_and_types_apart() -> None:
    torch.manual_seed(0)
    one = torch.nn.Linear(2, 2)
    others = [torch.nn.Linear(2, 2), torch.nn.Sequential(one), torch.nn.Linear(2, 2).half()]
    assert len({fingerprint(module) for module in (one, *others)}) == 4
    assert fingerprint(one) == fingerprint(one) != fingerprint(one, one)


# ----------------------------------------------------------------------------------------------------------------------
# What is kept is what the encoders give
# ----------------------------------------------------------------------------------------------------------------------


def test_moments_are_those_of_the_vae(folder: Path, models: tuple) -> None:
    vae, encoder = models
    noise(0, 48).save(folder / "red.png")
    data = prepare(load_captioned_images(str(folder)), vae, encoder, R, ALONE)
    upright, mirrored, _, _ = everything(data)
    pixels = to_pixels(noise(0, 48), R)[None]
    with torch.no_grad():
        torch.testing.assert_close(upright[:1], vae.encode(pixels).moments, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(mirrored[:1], vae.encode(pixels.flip(-1)).moments, rtol=2e-3, atol=2e-3)
        assert (upright[0] - mirrored[0]).abs().max() > 0.01


def test_without_mirrors_half_as_much_is_encoded(folder: Path, models: tuple, encode: Callable) -> None:
    """And the images are the same; with mirrors afterwards, or in another order, nothing of that is mistaken for it."""
    encode(folder)
    upright, _, contexts, _ = everything(encode.data)
    counts = Counts(*models, pytest.MonkeyPatch())
    data = prepare(load_captioned_images(str(folder)), *models, R, ALONE, mirror=False)
    assert data.moments.shape[0] == 1 and counts.images == 3
    none = torch.zeros(len(data), dtype=torch.bool)
    alone, same = data.gather(torch.arange(len(data)), none, none)
    torch.testing.assert_close(alone, upright)
    assert torch.equal(same, contexts)


def test_contexts_are_those_of_the_text_encoder(folder: Path, models: tuple) -> None:
    _, encoder = models
    data = prepare(load_captioned_images(str(folder)), *models, R, ALONE)
    assert data.captions == ["", "a blue monster", "a red monster"]
    _, _, contexts, dropped = everything(data)
    torch.testing.assert_close(contexts, encoder(list(CAPTIONS.values())), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(dropped, encoder([""] * 3), rtol=2e-3, atol=2e-3)


def test_each_image_gathers_its_own_row_mirror_and_caption(tmp_path: Path, models: tuple) -> None:
    """In any order, with repetitions, some mirrored and some without caption."""
    data = prepare(load_captioned_images(str(many_images(tmp_path / "many", 7))), *models, R, ALONE)
    upright, mirrored, contexts, dropped = everything(data)
    chosen = torch.tensor([4, 0, 4, 6, 2])
    flip, drop = torch.tensor([1, 0, 0, 1, 0]) > 0, torch.tensor([0, 0, 1, 1, 0]) > 0
    moments, context = data.gather(chosen, flip, drop)
    assert moments.dtype == context.dtype == torch.float32
    for row, i in enumerate(chosen):
        assert torch.equal(moments[row], (mirrored if flip[row] else upright)[i])
        assert torch.equal(context[row], (dropped if drop[row] else contexts)[i])


@pytest.mark.parametrize("at_once", [1, 4])
def test_bits_depend_neither_on_neighbours_nor_on_threads(
    tmp_path: Path, models: tuple, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All together, one by one in another order, with one thread and with three: the same bits."""
    monkeypatch.setitem(captioned_latents.PIXELS_AT_ONCE, "cpu", at_once * R**2)
    folder, encode, inside = many_images(tmp_path / "many", 9), models[0].encode, set()

    def watched(pixels: torch.Tensor) -> object:
        inside.add(torch.get_num_threads())  # the sums of larger models differ with it
        return encode(pixels)

    models[0].encode = watched
    threads = torch.get_num_threads()
    found = load_captioned_images(str(folder))
    together = everything(prepare(found, *models, R, ALONE))
    datasets.config.HF_DATASETS_CACHE = tmp_path / "another"
    try:
        torch.set_num_threads(3)
        for i in (5, 2, 8, 0):
            prepare(found.select([i]), *models, R, ALONE)
        one_by_one = everything(prepare(found, *models, R, ALONE))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(together, one_by_one, strict=True)) and inside == {1}


def test_a_batch_of_the_vae_has_1_to_64_images() -> None:
    sizes, gpu = (64, 128, 256, 512, 2048), torch.device("cuda")
    assert [captioned_latents.images_at_once(size, gpu) for size in sizes] == [64, 64, 16, 4, 1]


def test_no_more_is_encoded_beside_each_other_than_memory_has_room_for(
    tmp_path: Path, models: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, threads, in_order, given_back = [], torch.get_num_threads(), encoded_cache.in_order, []
    vae = VAE(VAEConfig(block_out_channels=(8, 16), norm_num_groups=8))
    each = 5 * 4 * 512**2 * 8  # the first level's maps are as large as the image
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for memory, processes, wanted in (
        (None, 1, 6),
        (100 * each, 1, 6),
        (20 * each, 1, 5),
        (20 * each, 2, 2),
        (1, 1, 1),
    ):
        monkeypatch.setattr(captioned_latents, "memory_of", lambda _, memory=memory: memory)
        on_cpu = dataclasses.replace(ALONE, local_count=processes)
        assert captioned_latents.batches_at_once(vae, 512, on_cpu) == wanted
    assert captioned_latents.batches_at_once(vae, 512, dataclasses.replace(ALONE, device=torch.device("cuda"))) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(captioned_latents, "batches_at_once", lambda *_: 7)
    monkeypatch.setattr(encoded_cache, "give_memory_back", lambda: given_back.append(True))
    monkeypatch.setattr(encoded_cache, "in_order", lambda *how: asked.append(how[2]) or in_order(*how))
    prepare(load_captioned_images(str(many_images(tmp_path / "many", 3))), *models, R, ALONE)
    assert asked == [threads, 7] and given_back == [True, True]


def test_previews_show_what_is_chosen_or_eight_captions_at_most() -> None:
    none = torch.zeros(0)
    for count in range(40):
        captions = [f"monster {i}" for i in range(count)]
        data = CaptionedLatents(none, none, none, ["", *captions])
        shown = data.prompts(None)
        assert 1 <= len(shown) <= 8 and (set(shown) <= set(captions) if count else shown == [""])
        assert count > 8 or shown == (captions or [""])
        assert data.prompts(["a fox", "an owl"]) == ["a fox", "an owl"]


def test_every_batch_has_the_same_shape(tmp_path: Path, models: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(*models, monkeypatch)
    prepare(load_captioned_images(str(many_images(tmp_path / "many", 9))), *models, R, ALONE)
    assert counts.since() == (9, 9) and counts.captions == 16  # nine and the empty one, in batches of eight
    monkeypatch.setitem(captioned_latents.PIXELS_AT_ONCE, "cpu", 5 * R**2 - 1)  # four fit
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "another")
    prepare(load_captioned_images(str(tmp_path / "many")), *models, R, ALONE)
    assert counts.images == 2 * (9 + 12)


def test_the_last_batch_is_padded_and_the_padding_is_not_kept(tmp_path: Path) -> None:
    cache, shapes = EncodedCache(tmp_path, {}, (2,)), []
    keys = [bytes([i]) * 32 for i in range(6)]

    def load(batch: list[int]) -> torch.Tensor:
        return torch.tensor(batch + [99] * (4 - len(batch)))

    def encode(rows: torch.Tensor) -> torch.Tensor:
        shapes.append(len(rows))
        return rows[:, None].repeat(1, 2)

    encode_missing(cache, keys, load, encode, torch.nn.Identity(), 4, ALONE, "encoding")
    assert shapes == [4, 4]
    assert Rows(cache, keys, CPU, 0)[torch.arange(6)].tolist() == [[i, i] for i in range(6)]


# ----------------------------------------------------------------------------------------------------------------------
# Where it is kept
# ----------------------------------------------------------------------------------------------------------------------


def test_a_cpu_gathers_from_the_files_and_a_device_holds_what_fits(tmp_path: Path, models: tuple) -> None:
    data = prepare(load_captioned_images(str(many_images(tmp_path / "many", 5))), *models, R, ALONE)
    assert data.nbytes == 0 and data.moments.resident is None
    cache = EncodedCache(tmp_path / "rows", {}, (2, 3))
    keys = [bytes([i % 256, i // 256] * 16) for i in range(600)]
    values = np.random.default_rng(0).standard_normal((600, 2, 3)).astype(np.float16)
    for part in np.array_split(np.arange(600), 7):  # several files
        cache.append([keys[i] for i in part], values[part])
        cache.close()
    assert not cache.missing(keys)
    random.Random(0).shuffle(keys)
    mapped, resident = Rows(cache, keys, CPU, 7199), Rows(cache, keys, CPU, 7200)  # bytes: 600 × 6 × 2
    assert mapped.resident is None and mapped.nbytes == 0
    assert resident.resident is not None and resident.nbytes == 7200
    chosen, half = torch.tensor([599, 0, 256, 255, 0]), torch.tensor([0, 1, 1, 0, 0])
    for index in (chosen, (chosen, half)):
        assert torch.equal(mapped[index], resident[index])
    expected = [values[keys[i][0] + 256 * keys[i][1]] for i in chosen]
    assert np.array_equal(mapped[chosen].numpy(), np.stack(expected))


def test_many_small_files_hold_no_descriptors_and_too_few_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run that encodes anything leaves a file: there may be more of them than a process may have open."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache, keys = EncodedCache(tmp_path, {}, (2,)), [bytes([i]) * 32 for i in range(40)]
    for key in keys:
        cache.append([key], np.full((1, 2), key[0]))
        cache.close()
    with open(os.devnull, "rb") as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno() + 20, limits[1]))
        try:
            assert not cache.missing(keys)
            monkeypatch.setattr(encoded_cache, "READ_WHOLE", 0)
            with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
                EncodedCache(tmp_path, {}, (2,)).missing(keys)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert Rows(cache, keys, CPU, 0)[torch.arange(40)].tolist() == [[i, i] for i in range(40)]

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(encoded_cache, "open", refuse, raising=False)
    with pytest.raises(UserError, match=r"Too many open files.*ulimit -n"):
        cache.append(keys[:1], np.zeros((1, 2)))


def test_a_file_is_read_once_and_keys_may_come_one_by_one(tmp_path: Path) -> None:
    cache, keys = EncodedCache(tmp_path, {}, (2,)), [bytes([i]) * 32 for i in range(3)]
    cache.append(keys[:1], np.zeros((1, 2)))
    for _ in range(2):
        assert cache.missing(iter(keys)) == keys[1:] and len(cache.files) == 1
    cache.append(keys[1:2], np.zeros((1, 2)))
    assert cache.missing(iter(keys)) == keys[2:] and len(cache.files) == 2  # it has grown


def test_the_share_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 20_000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert captioned_latents.memory_for_data(torch.device("cuda")) == 3000  # of what is free
    assert captioned_latents.memory_for_data(CPU) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path, models: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    there = Processes(0, 1, torch.device("cuda"))
    found = load_captioned_images(str(many_images(tmp_path / "many", 5)))
    resident = prepare(found, *models, R, there)
    assert resident.nbytes == resident.moments.resident.nbytes + resident.contexts.resident.nbytes > 0
    monkeypatch.setattr(captioned_latents, "DEVICE_SHARE", 0.0)
    mapped = prepare(found, *models, R, there)
    chosen, no = torch.arange(5, device="cuda"), torch.zeros(5, dtype=torch.bool, device="cuda")
    for a, b in zip(resident.gather(chosen, ~no, no), mapped.gather(chosen, ~no, no), strict=True):
        assert a.is_cuda and torch.equal(a, b)


# ----------------------------------------------------------------------------------------------------------------------
# Interruptions and several processes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other_processes() -> ForkServerContext:
    """Processes that have already imported what they need, so that each starts at once."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_pokemon_dataset"])
    return context


def prepare_elsewhere(
    folder: Path, cache: Path, rank: int, count: int, local_count: int, results: object, seconds: float = 0.0
) -> None:
    """What a process does: joins the others, prepares the folder, and puts into `results` what it encoded and has."""
    torch.set_num_threads(1)
    captioned_latents.PIXELS_AT_ONCE["cpu"] = R**2  # image by image
    datasets.config.HF_DATASETS_CACHE = cache
    processes = ALONE
    if count > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}.meeting", rank=rank, world_size=count)
        processes = Processes(rank, count, CPU, rank % local_count, local_count)
    torch.manual_seed(0)
    vae, encoder = tiny_vae(), tiny_text_encoder()
    encode, encoded = vae.encode, []

    def slowly(pixels: torch.Tensor) -> object:
        encoded.append(len(pixels))
        time.sleep(seconds)
        return encode(pixels)

    vae.encode = slowly
    data = prepare(load_captioned_images(str(folder)), vae, encoder, R, processes)
    results.put((rank, sum(encoded) // 2, [tensor.numpy() for tensor in everything(data)]))
    if count > 1:
        dist.destroy_process_group()


def run_together(context: ForkServerContext, *arguments: tuple) -> dict[int, tuple[int, list]]:
    """Runs `prepare_elsewhere` in one process for each of `arguments`: rank → what it encoded, what it has."""
    results = context.Queue()
    started = [context.Process(target=prepare_elsewhere, args=(*given, results)) for given in arguments]
    for process in started:
        process.start()
    found = {rank: rest for rank, *rest in (results.get(timeout=120) for _ in started)}
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return found


def rows_of(cache: Path, kind: str) -> int:
    """How many whole rows there are in the cache's files of one kind."""
    size = 36 + 2 * {"images": 2 * 8 * (R // 8) ** 2, "captions": 77 * 32}[kind]
    return sum(file.stat().st_size // size for file in cache.rglob(f"{kind}/*/*.rows"))


def assert_same_bits(data: CaptionedLatents, arrays: list) -> None:
    assert all(np.array_equal(mine.numpy(), theirs) for mine, theirs in zip(everything(data), arrays, strict=True))


def test_a_killed_process_loses_the_batch_in_hand(
    tmp_path: Path, encode: Callable, other_processes: ForkServerContext
) -> None:
    """SIGKILL in the middle of encoding: what was done is used, the rest is encoded, and the bits are the same."""
    folder, cache = many_images(tmp_path / "many", 24), tmp_path / "cache"
    results = other_processes.Queue()
    process = other_processes.Process(target=prepare_elsewhere, args=(folder, cache, 0, 1, 1, results, 0.04))
    process.start()
    deadline = time.monotonic() + 60
    while rows_of(cache, "images") < 5 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    done = rows_of(cache, "images")
    assert 5 <= done < 24 and rows_of(cache, "captions") == 25
    assert encode(folder) == (24 - done, 0)
    interrupted = everything(encode.data)
    datasets.config.HF_DATASETS_CACHE = tmp_path / "another"
    assert encode(folder) == (24, 24)
    assert_same_bits(encode.data, [tensor.numpy() for tensor in interrupted])


def test_each_batch_is_on_disk_before_the_next_but_one_begins(tmp_path: Path, models: tuple) -> None:
    vae, encoder = models
    folder, encode, lost = many_images(tmp_path / "many", 12), vae.encode, []
    started = 0

    def slowly(pixels: torch.Tensor) -> object:
        nonlocal started
        lost.append(started // 2 - rows_of(tmp_path / "cache", "images"))  # what a kill would cost now
        started += 1
        time.sleep(0.005)
        return encode(pixels)

    vae.encode = slowly
    prepare(load_captioned_images(str(folder)), vae, encoder, R, ALONE)
    assert started == 24 and max(lost) <= 1


def test_an_error_in_the_middle_keeps_what_was_done(tmp_path: Path, encode: Callable, models: tuple) -> None:
    folder, vae = many_images(tmp_path / "many", 10), models[0]
    counted, calls = vae.encode, iter(range(100))

    def interrupted(pixels: torch.Tensor) -> object:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return counted(pixels)

    vae.encode = interrupted
    with pytest.raises(KeyboardInterrupt):
        encode(folder)
    assert not [thread for thread in threading.enumerate() if "ThreadPool" in thread.name]
    vae.encode = counted
    assert encode(folder) == (10 - 4, 0)


def test_two_processes_share_the_work(tmp_path: Path, models: tuple, other_processes: ForkServerContext) -> None:
    folder, cache = many_images(tmp_path / "many", 9), tmp_path / "shared"
    found = run_together(other_processes, *((folder, cache, rank, 2, 2) for rank in (0, 1)))
    assert [found[rank][0] for rank in (0, 1)] == [5, 4] and rows_of(cache, "images") == 9
    assert rows_of(cache, "captions") == 10
    alone = prepare(load_captioned_images(str(folder)), *models, R, ALONE)  # in a cache of its own
    for _, arrays in found.values():
        assert_same_bits(alone, arrays)


def test_machines_that_share_no_disk(tmp_path: Path, models: tuple, other_processes: ForkServerContext) -> None:
    """Two machines, one process each: each ends with all rows on its own disk."""
    folder = many_images(tmp_path / "many", 6)
    found = run_together(other_processes, *((folder, tmp_path / f"disk_{rank}", rank, 2, 1) for rank in (0, 1)))
    assert [found[rank][0] for rank in (0, 1)] == [6, 6]
    alone = prepare(load_captioned_images(str(folder)), *models, R, ALONE)
    for rank, (_, arrays) in found.items():
        assert_same_bits(alone, arrays)
        assert rows_of(tmp_path / f"disk_{rank}", "images") == 6


def test_two_runs_at_once_on_one_cache(tmp_path: Path, encode: Callable, other_processes: ForkServerContext) -> None:
    """They know nothing of each other; both may encode an image, neither harms the other."""
    folder, cache = many_images(tmp_path / "many", 8), tmp_path / "cache"
    results = other_processes.Queue()
    runs = [
        other_processes.Process(target=prepare_elsewhere, args=(folder, cache, 0, 1, 1, results, 0.01)) for _ in "ab"
    ]
    for run in runs:
        run.start()
    found = [results.get(timeout=120) for _ in runs]
    for run in runs:
        run.join(60)
    assert encode(folder) == (0, 0)
    for _, _, arrays in found:
        assert_same_bits(encode.data, arrays)


def test_processes_that_see_different_data_are_stopped(folder: Path, models: tuple) -> None:
    class Two(Processes):
        def gather(self, value: object) -> list:
            return [value, b"something else"]

    with pytest.raises(UserError, match="the processes see different data sets"):
        prepare(load_captioned_images(str(folder)), *models, R, Two(0, 1, CPU))


# ----------------------------------------------------------------------------------------------------------------------
# Work ahead, and how far it is
# ----------------------------------------------------------------------------------------------------------------------


def test_threads_run_ahead_in_order_and_not_too_far() -> None:
    begun: list[int] = []

    def square(i: int) -> int:
        begun.append(i)
        time.sleep(0.002 * (i % 3))
        return i * i

    for taken, value in enumerate(in_order(square, range(40), 3)):
        assert value == taken**2 and len(begun) <= taken + 1 + 5
    assert sorted(begun) == list(range(40))


def test_threads_stop_when_nobody_waits() -> None:
    begun: list[int] = []
    results = in_order(begun.append, range(1000), 2)
    next(results)
    results.close()
    assert len(begun) < 10


def test_decoding_runs_beside_encoding(tmp_path: Path) -> None:
    """A device that encodes in the main thread finds its next batch loaded."""
    events: collections.deque = collections.deque()
    away = Processes(0, 1, torch.device("meta"))

    def load(batch: list[int]) -> torch.Tensor:
        time.sleep(0.01)
        events.append(("loaded", batch[0]))
        return torch.zeros(1, 2)

    def encode(rows: torch.Tensor) -> torch.Tensor:
        assert threading.current_thread() is threading.main_thread()
        time.sleep(0.03)
        events.append(("encoded", 0))
        return rows

    keys = [bytes([i]) * 32 for i in range(6)]
    encode_missing(EncodedCache(tmp_path, {}, (2,)), keys, load, encode, torch.nn.Identity(), 1, away, "encoding")
    first = [kind for kind, _ in events].index("encoded")
    assert first >= 2  # the second was loaded before the first was encoded


def test_progress_is_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Progress, "SECONDS", 0.0)
    with Progress(3, "encoding images", ALONE) as progress:
        for _ in range(3):
            progress.add(1)
    with Progress(3, "encoding images", Processes(1, 2, CPU)) as progress:
        progress.add(3)  # says nothing: not the main process
    with Progress(0, "encoding captions", ALONE):
        pass  # nothing to do, nothing to say
    with Progress(2, "encoding captions", Processes(0, 2, CPU)) as progress:
        progress.add(2)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        *(f"encoding images: {i} of 3" for i in (1, 2, 3)),
        "encoding captions (process 1 of 2): 2 of 2",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# Real images
# ----------------------------------------------------------------------------------------------------------------------


def test_real_images(pokemon_folder: Path, tmp_path: Path, models: tuple) -> None:
    """A handful of the real ones: webp, captions from metadata.jsonl, a white ground that stays white."""
    lines = (pokemon_folder / "metadata.jsonl").read_text().splitlines()[:4]
    few = tmp_path / "few"
    few.mkdir()
    for line in lines:
        shutil.copy(pokemon_folder / json.loads(line)["file_name"], few)
    (few / "metadata.jsonl").write_text("\n".join(lines))
    found = load_captioned_images(str(few))
    assert all("pokemon" in text for text in found["text"])
    corner = to_pixels(open_image(found[0]["image"]), 64)[:, 0, 0]
    assert (corner > 0.95).all()
    data = prepare(found, *models, 64, ALONE)
    assert isinstance(data, CaptionedLatents) and len(data) == 4


def test_all_real_images_can_be_read(pokemon_folder: Path) -> None:
    found = load_captioned_images(str(pokemon_folder))
    assert len(found) == 766 and all(found["text"])
    assert all(
        decode(Path(cell["path"]).read_bytes()).size == (512, 512) for cell in found.select(range(0, 766, 50))["image"]
    )
