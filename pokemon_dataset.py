"""Captioned images: where they come from, and how they become pixels.

A source is one of
    monsters, monsters:2000    drawn by `monsters`, no download (monsters:200:turquoise has a new colour)
    FOLDER                     images with `metadata.jsonl` or `.csv`, or each with a `.txt` beside it; parquet files
    OWNER/NAME                 a data set on the Hugging Face hub

`training.captioned_latents` makes of them what a U-Net is trained on. Letters: N images, R resolution.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import datasets
import huggingface_hub
import torch
from PIL import Image
from torch import Tensor

import monsters
from images import to_pixels
from published import first_line
from training.background import Progress
from training.captioned_folder import CAPTION_COLUMNS, read_folder
from training.image_files import BadImageError, content_of, decode, refuse_or_warn, undecodable
from training.reproducible import Processes
from training.script import UserError, user_errors

# ----------------------------------------------------------------------------------------------------------------------
# Sources: everything becomes a `datasets.Dataset` with the columns `image` (undecoded) and `text`
# ----------------------------------------------------------------------------------------------------------------------


def load_captioned_images(
    source: str,
    split: str = "train",
    revision: str | None = None,
    caption_column: str | None = None,
    caption: str | None = None,
    drawn_size: int = 512,
) -> datasets.Dataset:
    """The captioned images of `source` as a Dataset with columns `image` (bytes or path, decoded later) and `text`.

    `caption` is for all images of a source that has none; monsters are drawn at `drawn_size` pixels. Raises UserError.
    """
    where = os.path.expanduser(source)
    is_folder, is_drawn = source != "" and os.path.isdir(where), monsters.is_spec(source)
    if revision is not None and (is_folder or is_drawn):
        raise UserError(
            f"--revision {revision}: only data sets on the Hugging Face hub have revisions; {source} has none."
        )
    if is_drawn:
        with user_errors():
            which = monsters.indices_of(source)
        found = _part_of(split, "train", source, monsters.load_monsters(which, max(drawn_size, 16)))
    elif is_folder:
        name = split.partition("[")[0]  # train[:100] is the first hundred of train
        read = read_folder(where, name, caption_column, caption)
        if read is not None:
            columns = dict(zip(("image", "text"), read, strict=True))
            features = datasets.Features({"image": datasets.Image(decode=False), "text": datasets.Value("string")})
            return _part_of(split, name, source, datasets.Dataset.from_dict(columns, features))
        found = _load_other_folder(where, split)
    elif os.path.isfile(where):
        raise UserError(f"--dataset {source}: this is a file; pass the folder that it is in.")
    elif source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise UserError(
            f"--dataset {source}: there is no such folder, and data sets on the Hugging Face hub are called "
            f"OWNER/NAME; {_INSTEAD}"
        )
    else:
        found = _load_hub(source, split, revision)
    return _two_columns(found, source, caption_column, caption)


_INSTEAD = "pass a folder of captioned images, or --dataset monsters:2000, which is drawn here and needs no download."


def _part_of(split: str, name: str, source: str, found: datasets.Dataset) -> datasets.Dataset:
    """The part that `split`, such as train[:10%], asks for of a data set that is the whole split `name`."""
    if split == name:
        return found
    try:
        [part] = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(found)})
        chosen = range(part.from_ or 0, len(found) if part.to is None else part.to)
    except (ValueError, AssertionError) as error:
        raise UserError(f"--split {split}: {source} has {name}, or a part of it as in {name}[:100].") from error
    if not chosen:
        raise UserError(f"--split {split}: that part of {source}, which has {len(found)} images, is empty.")
    return found.select(chosen)


def _load_other_folder(folder: str, split: str) -> datasets.Dataset:
    """A folder of parquet files or whatever else `datasets` reads."""
    try:
        return datasets.load_dataset(folder, split=split)
    except Exception as error:  # `datasets` has many kinds; the user needs one sentence
        raise UserError(f"--dataset {folder}: cannot be read as a data set ({first_line(error)}).") from error


def _load_hub(name: str, split: str, revision: str | None) -> datasets.Dataset:
    try:
        # One request that fails at once without a network; `load_dataset` would go on trying for half a minute.
        huggingface_hub.HfApi().dataset_info(name, revision=revision, timeout=10)
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # offline, hub down, withdrawn, gated, misspelt …
        offline = datasets.config.HF_HUB_OFFLINE
        try:
            datasets.config.HF_HUB_OFFLINE = True  # then it takes what was downloaded before
            return datasets.load_dataset(name, split=split, revision=revision)
        except Exception:
            raise UserError(
                f"--dataset {name}: there is no such folder, and the Hugging Face hub does not give it "
                f"({first_line(error)}); {_INSTEAD}"
            ) from error
        finally:
            datasets.config.HF_HUB_OFFLINE = offline


def _two_columns(
    found: datasets.Dataset, source: str, caption_column: str | None, caption: str | None
) -> datasets.Dataset:
    """Finds the columns of images and captions and calls them `image` and `text`."""
    columns = ", ".join(found.column_names)
    image_column = next((name for name, kind in found.features.items() if isinstance(kind, datasets.Image)), None)
    if image_column is None:
        raise UserError(f"--dataset {source}: no column holds images; it has {columns}.")
    if caption_column is not None and caption_column not in found.column_names:
        raise UserError(f"--caption_column {caption_column}: {source} has the columns {columns}.")
    caption_column = caption_column or next((name for name in CAPTION_COLUMNS if name in found.column_names), None)
    if caption is not None:
        if caption_column is not None:
            raise UserError(f"--caption: {source} has captions of its own ({caption_column}); leave the option out.")
        found = found.select_columns([image_column]).add_column("text", [caption] * len(found))
        caption_column = "text"
    if caption_column is None:
        raise UserError(
            f"--dataset {source}: no captions: none of its columns ({columns}) is called {', '.join(CAPTION_COLUMNS)}; "
            "name one with --caption_column, or give all images the same one with --caption."
        )
    if getattr(found.features[caption_column], "dtype", None) not in ("string", "large_string"):
        raise UserError(f"--caption_column {caption_column}: in {source} that column holds no texts.")
    if len(found) == 0:
        raise UserError(f"--dataset {source}: there is nothing in this split.")
    # CLIP reads English: captions in another language (`zh_text` of the default set) need a text encoder that reads it.
    found = found.select_columns([image_column, caption_column])
    names = {image_column: "image", caption_column: "text"}
    found = found.rename_columns({old: new for old, new in names.items() if old != new})
    return found.cast_column("image", datasets.Image(decode=False))


# ----------------------------------------------------------------------------------------------------------------------
# From cells to pixels
# ----------------------------------------------------------------------------------------------------------------------


def open_image(cell: dict) -> Image.Image:
    """An undecoded cell of the `image` column → the PIL image; UserError names a file that is no image."""
    try:
        return decode(content_of(cell))
    except BadImageError as error:
        name = (cell or {}).get("path") or "an image of the data set"
        raise UserError(f"{name}: cannot be used as an image ({error}); replace it or leave it out.") from error


def load_pixels(cells: list[dict], resolution: int, pool: ThreadPoolExecutor) -> Tensor:
    """Undecoded cells → (N, 3, R, R) in [-1, 1]; decoding and resizing run beside each other in threads."""
    return torch.stack(list(pool.map(lambda cell: to_pixels(open_image(cell), resolution), cells)))


def load_images(source: str, resolution: int, on_bad_image: str = "error") -> tuple[Tensor, list[str]]:
    """All images of a source, uint8 (N, 3, R, R) in host memory, and their captions; `on_bad_image`: see `prepare`."""
    table, alone = load_captioned_images(source, drawn_size=resolution), Processes(0, 1, torch.device("cpu"))
    bad = undecodable(table, list(range(len(table))), resolution, alone)
    if bad:
        refuse_or_warn(table, bad, on_bad_image, alone)
        table = table.select([i for i in range(len(table)) if i not in bad])
    cells, images = table["image"], torch.empty(len(table), 3, resolution, resolution, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool, Progress(len(table), f"reading {source}", alone) as progress:
        for first in range(0, len(table), 32):
            pixels = load_pixels([cells[i] for i in range(first, min(first + 32, len(table)))], resolution, pool)
            images[first : first + 32] = ((pixels + 1) * 127.5).round().to(torch.uint8)
            progress.add(len(pixels))
    return images, [(text or "").strip() for text in table["text"]]
