"""Captioned images and their cached latents: where they come from, and what training gathers of them.

A source is one of
    monsters, monsters:2000    drawn by `monsters`, no download (monsters:200:turquoise has a new colour)
    FOLDER                     images with `metadata.jsonl` or `.csv`, or each with a `.txt` beside it; parquet files
    OWNER/NAME                 a data set on the Hugging Face hub

Spaces: a PIL image of any size and mode → `images.to_pixels` → float (3, R, R) in [-1, 1] → `VAE.encode` → moments
(8, R/8, R/8) of the raw latents. Every image and its mirror is encoded once, and every distinct caption once; both are
kept in `training.encoded_cache` under the SHA-256 of their content, so that nothing stale can be read.

Letters: N images in the batch, R resolution, h = w = R/8, L text tokens, D width of the text encoding.
"""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import datasets
import huggingface_hub
import torch
from PIL import Image
from torch import Tensor

import monsters
from images import TRANSFORM_VERSION, to_pixels
from published import first_line
from text_encoder import TextEncoder
from training.background import Progress
from training.captioned_folder import CAPTION_COLUMNS, read_folder
from training.encoded_cache import (
    EncodedCache,
    Rows,
    cache_folder,
    encode_missing,
    fingerprint,
    sha256,
    tokenizer_fingerprint,
)
from training.image_files import (
    BadImageError,
    content_keys,
    content_of,
    decode,
    name_of,
    pixels_of,
    refuse_or_warn,
    undecodable,
)
from training.reproducible import Processes
from training.script import UserError, user_errors
from vae_model import VAE

# What the VAE encodes at a time. On two cores, the shipped one takes 54 ms for an image of 128, 37 ms with channels
# last, 30 ms in a batch of 8; one of 256 gains from channels last (144 → 119 ms), not from a batch. On a GPU, 4 images
# of 512, for which the published VAE needs 3.2 GB in float32.
PIXELS_AT_ONCE = {"cpu": 8 * 128**2, "cuda": 4 * 512**2}
DEVICE_SHARE = 0.3  # of a GPU's free memory that moments and contexts may take; the rest is for training

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


# ----------------------------------------------------------------------------------------------------------------------
# What training gathers from
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class CaptionedLatents:
    """A data set ready for training: moments of the images and their mirrors, and which caption belongs to which."""

    moments: Rows  # row i: (2, 8, h, w): the image, its mirror; or (1, 8, h, w) if mirrors are not used
    contexts: Rows  # row c: (L, D); row 0 is the empty caption
    caption_of: Tensor  # (images,) long: the row of each image's caption
    captions: list[str]  # the distinct captions, in the order of `contexts`
    digest: str = ""  # of images and captions in their order, and of their encoders: a resumed run must find the same

    def __len__(self) -> int:
        return len(self.caption_of)

    @property
    def nbytes(self) -> int:
        """What it takes of the device's memory; the rest stays in memory-mapped files."""
        return self.moments.nbytes + self.contexts.nbytes

    def gather(self, indices: Tensor, mirrored: Tensor, drop_caption: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (N, 8, h, w) and contexts (N, L, D) of the chosen images; all three arguments are (N,) tensors."""
        moments = self.moments[indices, mirrored.long()]  # (N, 8, h, w)
        captions = torch.where(drop_caption, 0, self.caption_of[indices])
        return moments.float(), self.contexts[captions].float()


def prepare(
    images: datasets.Dataset,
    vae: VAE,
    text_encoder: TextEncoder,
    resolution: int,
    processes: Processes,
    precision: torch.dtype = torch.float32,
    on_bad_image: str = "error",
    mirror: bool = True,
) -> CaptionedLatents:
    """Encodes images and captions that the cache lacks, shared among the processes, and puts them where training
    gathers fast. `mirror`: their mirrors, too. `on_bad_image`: "error" lists those that cannot be read before anything
    is encoded, "skip" leaves them out. May be left by any exception and called again: what was encoded is kept.
    """
    if resolution < 1 or resolution % vae.config.downsampling:
        raise UserError(f"--resolution {resolution} is not divisible by {vae.config.downsampling}.")
    if on_bad_image not in ("error", "skip"):
        raise UserError(f"--on_bad_image {on_bad_image}: choose error or skip.")
    texts = [(text or "").strip() for text in images["text"]]
    if len(set(processes.gather(sha256("\n".join(texts).encode())))) > 1:
        raise UserError("--dataset: the processes see different data sets; give all machines the same files.")

    side = resolution // vae.config.downsampling
    made_by = {
        "vae": fingerprint(vae.encoder, vae.quant_conv) + f" {vae.config.norm_num_groups}",
        "transform": f"{TRANSFORM_VERSION}, {resolution}",
        "precision": str(precision),
    }
    moments = EncodedCache(cache_folder("images"), made_by, (1 + mirror, 2 * vae.config.latent_channels, side, side))
    keys, bad = content_keys(images, processes)
    bad |= _undecodable(images, keys, moments, resolution, processes)
    if bad:
        refuse_or_warn(images, bad, on_bad_image, processes)
        kept = [i for i in range(len(images)) if i not in bad]
        images, keys, texts = images.select(kept), [keys[i] for i in kept], [texts[i] for i in kept]
    if processes.is_main and (empty := texts.count("")):
        warnings.warn(f"{empty} of {len(texts)} images have an empty caption.", stacklevel=2)
    captions = ["", *sorted(set(texts) - {""})]
    contexts = _encode_captions(captions, text_encoder, processes)
    _encode_images(images, keys, moments, vae, resolution, precision, mirror, processes)

    device = processes.device
    budget = memory_for_data(device)
    image_rows = Rows(moments, keys, device, budget)
    caption_rows = Rows(contexts, [sha256(text.encode()) for text in captions], device, budget - image_rows.nbytes)
    row = {caption: i for i, caption in enumerate(captions)}
    caption_of = torch.tensor([row[text] for text in texts], device=device)
    encoders = made_by["vae"] + contexts.description
    digest = sha256(b"".join(keys) + "\n".join([encoders, *texts]).encode()).hex()
    return CaptionedLatents(image_rows, caption_rows, caption_of, captions, digest)


def memory_for_data(device: torch.device) -> int:
    """Bytes of the device's memory that moments and contexts may take; none on a CPU, which reads the mapped files."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what encoding has left
        return int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(DEVICE_SHARE * (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# Encoding
# ----------------------------------------------------------------------------------------------------------------------


def _undecodable(
    images: datasets.Dataset, keys: list[bytes], cache: EncodedCache, resolution: int, processes: Processes
) -> dict[int, str]:
    """Why some images that are still to be encoded give no pixels, by index."""
    index_of = {key: i for i, key in reversed(list(enumerate(keys))) if key}
    missing = {key for of_process in processes.gather(cache.missing(index_of)) for key in of_process}
    reasons = undecodable(images, sorted(index_of[key] for key in missing), resolution, processes)
    return {i: reasons[index_of[key]] for i, key in enumerate(keys) if key and index_of[key] in reasons}


def _encode_images(
    images: datasets.Dataset,
    keys: list[bytes],
    cache: EncodedCache,
    vae: VAE,
    resolution: int,
    precision: torch.dtype,
    mirror: bool,
    processes: Processes,
) -> None:
    """Moments (2, 8, h, w) of each distinct image and its mirror, or (1, 8, h, w) without it, into the cache."""
    device = processes.device
    index_of = {key: i for i, key in reversed(list(enumerate(keys)))}
    distinct = list(index_of)
    at_once = PIXELS_AT_ONCE.get(device.type, PIXELS_AT_ONCE["cuda"])
    batch_size = min(max(at_once // resolution**2, 1), 64)
    vae.encoder.to(memory_format=torch.channels_last)

    def load(batch: list[int]) -> Tensor:
        pixels = torch.zeros(batch_size, 3, resolution, resolution)
        for row, i in enumerate(batch):
            cell = images[index_of[distinct[i]]]["image"]
            try:
                content = content_of(cell)
                if sha256(content) != distinct[i]:
                    raise BadImageError("other content")
                pixels[row] = pixels_of(content, resolution)
            except BadImageError as error:  # it was fine when all were checked
                raise UserError(
                    f"{name_of(cell, i)} changed while images were encoded ({error}); start again."
                ) from error
        return pixels

    def encode(pixels: Tensor) -> Tensor:
        pixels = pixels.to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            # The mirror of a latent is not the latent of the mirror.
            views = (pixels, pixels.flip(-1)) if mirror else (pixels,)
            return torch.stack([vae.encode(x).moments.float() for x in views], dim=1)  # (N, 2 or 1, 8, h, w)

    what = f"encoding images at {resolution}×{resolution}"
    encode_missing(cache, distinct, load, encode, vae, batch_size, processes, what)


# ----------------------------------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------------------------------


def _encode_captions(captions: list[str], encoder: TextEncoder, processes: Processes) -> EncodedCache:
    """Encodings (L, D) of captions as literal text, in their cache: "a clock (at 10:30)" weights no word."""
    device, tokenizer, config = processes.device, encoder.tokenizer, encoder.model.config
    activation = (config.hidden_act, config.num_attention_heads, config.layer_norm_eps)
    made_by = {
        "text encoder": f"{fingerprint(encoder.model)} {activation}",
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }
    cache = EncodedCache(cache_folder("captions"), made_by, (encoder.length, encoder.width))
    ids = tokenizer(captions, add_special_tokens=False, verbose=False).input_ids
    if processes.is_main:
        _warn_of_captions(captions, ids, encoder)
    batch_size = 8 if device.type == "cpu" else 64  # on a CPU, a caption takes 16 ms alone, 11 ms in a batch of 4 or 16

    def load(batch: list[int]) -> Tensor:
        rows = [encoder.framed(ids[i]) for i in batch] + [encoder.framed([])] * (batch_size - len(batch))
        return torch.tensor(rows)  # (N, L)

    def encode(rows: Tensor) -> Tensor:
        return encoder.model(rows.to(device)).last_hidden_state  # (N, L, D)

    keys = [sha256(caption.encode()) for caption in captions]
    encode_missing(cache, keys, load, encode, encoder.model, batch_size, processes, "encoding captions")
    return cache


def _warn_of_captions(captions: list[str], ids: list[list[int]], encoder: TextEncoder) -> None:
    """One line for each thing that is odd about the captions, with a count and an example."""
    room, unknown = encoder.length - 2, encoder.tokenizer.unk_token_id
    both = list(zip(captions, ids, strict=True))
    long = [caption for caption, tokens in both if len(tokens) > room]
    # A word that the vocabulary knows is a token or two; letters that it does not know become bytes, or are lost.
    foreign = [
        caption
        for caption, tokens in both
        if 2 * sum(character > "\x7f" for character in caption) > len(caption)
        and (len(tokens) > len(caption) or unknown in tokens)
    ]
    for found, what in (
        (long, f"are longer than {room} tokens and are truncated"),
        (foreign, "are in a script that the text encoder does not know (CLIP reads English; see --caption_column)"),
    ):
        if found:
            counted = f"{len(found)} of {len(captions) - 1} different captions {what}"
            warnings.warn(f"{counted}, such as {found[0][:60]!r}.", stacklevel=4)
