"""Captioned pictures and their cached latents: where they come from, and what training gathers of them.

A source is one of
    monsters, monsters:2000    drawn by `monsters.py`, no download
    FOLDER                     pictures with `metadata.jsonl`/`.csv` (an `imagefolder`), or each with a `.txt` beside it
    OWNER/NAME                 a data set on the Hugging Face hub

Spaces: a PIL picture of any size and mode → `images.to_pixels` → float (3, R, R) in [-1, 1] → `VAE.encode` → moments
(8, R/8, R/8) of the raw latents. Every picture and its mirror is encoded once; `datasets` keeps the moments in an Arrow
file that is named after the VAE's weights, the data and the transform, so nothing stale can be read.

Letters: N pictures in the batch, R resolution, h = w = R/8, L text tokens, D width of the text encoding.
"""

import hashlib
import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn
from tqdm import tqdm

import monsters
from images import TRANSFORM_VERSION, to_pixels
from pretrained_files import first_line
from vae_model import VAE

DEFAULT_DATASET = "svjack/pokemon-blip-captions-en-zh"
CAPTION_COLUMNS = ("text", "en_text", "caption")  # tried in this order when --caption_column is not given
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
ON_DEVICE_LIMIT = 8 * 2**30  # bytes of moments or text encodings above which a set stays memory-mapped

# ----------------------------------------------------------------------------------------------------------------------
# Sources: everything becomes a `datasets.Dataset` with the columns `image` (undecoded) and `text`
# ----------------------------------------------------------------------------------------------------------------------


def load_captioned_pictures(
    source: str, split: str = "train", revision: str | None = None, caption_column: str | None = None
) -> datasets.Dataset:
    """The captioned pictures of `source` as a Dataset with columns `image` (bytes or path, decoded later) and `text`.

    Raises ValueError or FileNotFoundError, in one sentence, if there is no such source or it has no captions.
    """
    if source.split(":")[0] == "monsters":
        pictures = monsters.load_monsters(monsters.parse_spec(source))
    elif Path(source).is_dir():
        pictures = _load_folder(Path(source), split)
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"--dataset {source}: there is no such folder.")
    else:
        pictures = _load_hub(source, split, revision)

    image_column = next((n for n, f in pictures.features.items() if isinstance(f, datasets.Image)), None)
    if image_column is None:
        raise ValueError(f"--dataset {source}: no column holds pictures; it has {', '.join(pictures.column_names)}.")
    if caption_column is None:
        caption_column = next((c for c in CAPTION_COLUMNS if c in pictures.column_names), None)
        if caption_column is None:
            raise ValueError(
                f"--dataset {source}: no captions: none of its columns ({', '.join(pictures.column_names)}) is called "
                f"{', '.join(CAPTION_COLUMNS)}; name one with --caption_column, add a metadata.jsonl with "
                "file_name and text, or put a .txt beside each picture."
            )
    elif caption_column not in pictures.column_names:
        raise ValueError(
            f"--caption_column {caption_column}: {source} has the columns {', '.join(pictures.column_names)}."
        )
    if len(pictures) == 0:
        raise ValueError(f"--dataset {source}: the split {split!r} is empty.")
    # CLIP reads English: captions in another language (`zh_text` of the default set) need a text encoder that reads it.
    pictures = pictures.select_columns([image_column, caption_column])
    pictures = pictures.rename_columns(
        {k: v for k, v in {image_column: "image", caption_column: "text"}.items() if k != v}
    )
    return pictures.cast_column("image", datasets.Image(decode=False))


def _load_folder(folder: Path, split: str) -> datasets.Dataset:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    pictures = [p for p in files if p.suffix.lower() in PICTURE_SUFFIXES]
    described = any(p.stem == "metadata" for p in files) or any(p.suffix in (".parquet", ".arrow") for p in files)
    if pictures and not described:
        if without := [p for p in pictures if not p.with_suffix(".txt").is_file()]:
            raise ValueError(
                f"--dataset {folder}: {without[0].name} has no caption: put {without[0].stem}.txt beside it, or write "
                "a metadata.jsonl with file_name and text for every picture."
            )
        captions = [p.with_suffix(".txt").read_text(encoding="utf-8").strip() for p in pictures]
        # Sizes and times make the fingerprint change with the files.
        stamps = [(p.stat().st_size, p.stat().st_mtime_ns) for p in pictures]
        return _from_lists([str(p.resolve()) for p in pictures], captions, stamps)
    if not pictures and not described:
        raise ValueError(f"--dataset {folder}: there are no pictures in this folder.")
    try:
        return datasets.load_dataset(str(folder), split=split)
    except Exception as error:  # `datasets` has many kinds; the user needs one sentence
        raise ValueError(f"--dataset {folder}: cannot be read as an imagefolder ({first_line(error)}).") from error


def _from_lists(paths: list[str], captions: list[str], stamps: list[tuple[int, int]]) -> datasets.Dataset:
    digest = hashlib.sha256(repr((paths, captions, stamps)).encode()).hexdigest()
    table = datasets.Dataset(pa.table({"image": paths, "text": captions}), fingerprint=digest[:32])
    features = table.features.copy()
    features["image"] = datasets.Image()
    return table.cast(features)


def _load_hub(name: str, split: str, revision: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # offline, withdrawn, gated, misspelt …
        raise FileNotFoundError(
            f"--dataset {name}: cannot be had from the Hugging Face hub ({first_line(error)}); pass another id, a "
            "folder of captioned pictures, or --dataset monsters, which needs no download."
        ) from error


# ----------------------------------------------------------------------------------------------------------------------
# From cells to pixels
# ----------------------------------------------------------------------------------------------------------------------


def open_picture(cell: dict) -> Image.Image:
    """An undecoded cell of the `image` column → the PIL picture; ValueError names a file that is not a picture."""
    content = io.BytesIO(cell["bytes"]) if cell.get("bytes") is not None else cell["path"]
    try:
        picture = Image.open(content)
        picture.load()
        return picture
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        name = cell.get("path") or "a picture of the data set"
        raise ValueError(
            f"{name}: cannot be read as a picture ({first_line(error)}); replace it or leave it out."
        ) from error


def load_pixels(cells: list[dict], resolution: int, pool: ThreadPoolExecutor) -> Tensor:
    """Undecoded cells → (N, 3, R, R) in [-1, 1]; decoding and resizing run beside each other in threads."""
    return torch.stack(list(pool.map(lambda cell: to_pixels(open_picture(cell), resolution), cells)))


# ----------------------------------------------------------------------------------------------------------------------
# The cache: moments of every picture and its mirror, encodings of every distinct caption
# ----------------------------------------------------------------------------------------------------------------------


def fingerprint(module: nn.Module) -> str:
    """A digest of a network's weights, names and types: another weight, another digest."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cache_file(kind: str, *parts: str) -> str:
    """The Arrow file for what is made from `parts`, under the cache of `datasets` (HF_DATASETS_CACHE moves it)."""
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "stable_diffusion" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{digest}.arrow")


def encode_pictures(
    pictures: datasets.Dataset,
    vae: VAE,
    resolution: int,
    device: torch.device,
    batch_size: int = 4,
    precision: torch.dtype = torch.float32,
) -> datasets.Dataset:
    """Moments of each picture and its mirror: a memory-mapped Dataset of `moments` (2, 8, h, w) float16.

    Row for row with `pictures`. What was encoded before with the same VAE, data and transform is read, not encoded.
    """
    if resolution % vae.config.downsampling:
        raise ValueError(f"--resolution {resolution} is not divisible by {vae.config.downsampling}.")
    side = resolution // vae.config.downsampling
    shape = (2, 2 * vae.config.latent_channels, side, side)
    made_from = (fingerprint(vae), pictures._fingerprint, TRANSFORM_VERSION, str(resolution), str(precision))
    file = _cache_file("moments", *made_from)
    if os.path.exists(file):
        return datasets.Dataset.from_file(file).with_format("numpy")

    vae.to(device).eval()
    progress = tqdm(total=len(pictures), desc=f"encoding pictures at {resolution}×{resolution}", unit="picture")

    @torch.no_grad()
    def encode(batch: dict) -> dict:
        pixels = load_pixels(batch["image"], resolution, pool).to(device)  # (N, 3, R, R)
        both = torch.cat([pixels, pixels.flip(-1)])  # the mirror of a latent is not the latent of the mirror
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            moments = vae.encode(both).moments.float().cpu().numpy().astype(np.float16)  # (2N, 8, h, w)
        progress.update(len(pixels))
        return {"moments": np.stack(np.split(moments, 2), axis=1)}  # (N, 2, 8, h, w)

    with ThreadPoolExecutor(os.cpu_count()) as pool, progress:
        return _map_to_file(pictures, encode, batch_size, {"moments": datasets.Array4D(shape, "float16")}, file)


def encode_captions(
    captions: list[str], encode: Callable[[list[str]], Tensor], encoder_fingerprint: str, batch_size: int = 64
) -> datasets.Dataset:
    """Encodings of a list of captions: a memory-mapped Dataset of `context` (L, D) float16, row for row, cached."""
    file = _cache_file("captions", encoder_fingerprint, *captions)
    if os.path.exists(file):
        return datasets.Dataset.from_file(file).with_format("numpy")
    length, width = encode([""]).shape[1:]
    table = datasets.Dataset.from_dict({"text": captions})
    progress = tqdm(total=len(captions), desc="encoding captions", unit="caption")

    @torch.no_grad()
    def encode_batch(batch: dict) -> dict:
        progress.update(len(batch["text"]))
        return {"context": encode(batch["text"]).float().cpu().numpy().astype(np.float16)}

    with progress:
        features = {"context": datasets.Array2D((length, width), "float16")}
        return _map_to_file(table, encode_batch, batch_size, features, file)


def _map_to_file(
    table: datasets.Dataset, function: Callable, batch_size: int, features: dict, file: str
) -> datasets.Dataset:
    """`Dataset.map` into `file`, which appears only when it is complete."""
    partial = f"{file}.{os.getpid()}.partial"
    datasets.disable_progress_bars()  # the callers show their own, in pictures
    try:
        table.map(
            function,
            batched=True,
            batch_size=batch_size,
            remove_columns=table.column_names,
            features=datasets.Features(features),
            cache_file_name=partial,
            load_from_cache_file=False,
            new_fingerprint=Path(file).stem,
            writer_batch_size=batch_size,
        )
        os.replace(partial, file)
    finally:
        datasets.enable_progress_bars()
        if os.path.exists(partial):
            os.remove(partial)
    return datasets.Dataset.from_file(file).with_format("numpy")


# ----------------------------------------------------------------------------------------------------------------------
# What training gathers from
# ----------------------------------------------------------------------------------------------------------------------


class Rows:
    """One tensor column, indexed by a LongTensor: on the device if it is small, else memory-mapped."""

    def __init__(
        self, table: datasets.Dataset, column: str, device: torch.device, limit: int = ON_DEVICE_LIMIT
    ) -> None:
        self.table, self.column, self.device = table, column, device
        size = len(table) * np.asarray(table[0][column]).nbytes
        self.resident: Tensor | None = None
        if size <= limit:
            chunks = [torch.from_numpy(np.array(batch[column])).to(device) for batch in table.iter(batch_size=256)]
            self.resident = torch.cat(chunks)

    def __getitem__(self, indices: Tensor) -> Tensor:
        if self.resident is not None:
            return self.resident[indices].float()
        rows = np.asarray(self.table[indices.tolist()][self.column])
        return torch.from_numpy(rows).to(self.device, non_blocking=True).float()


@dataclass
class CaptionedLatents:
    """A data set ready for training: moments of the pictures and their mirrors, and which caption belongs to which."""

    moments: Rows  # row i: (2, 8, h, w): the picture, its mirror
    contexts: Rows  # row c: (L, D); row 0 is the empty caption
    caption_of: Tensor  # (pictures,) long: the row of each picture's caption
    captions: list[str]  # the distinct captions, in the order of `contexts`

    def __len__(self) -> int:
        return len(self.caption_of)

    def mean(self, scaling_factor: float) -> list[float]:
        """The mean of the scaled latents by channel, over some hundred pictures."""
        some = torch.arange(0, len(self), max(len(self) // 256, 1), device=self.caption_of.device)
        means = self.moments[some].flatten(0, 1).chunk(2, dim=1)[0]  # (2n, 4, h, w)
        return (means.mean(dim=(0, 2, 3)) * scaling_factor).tolist()

    def gather(self, indices: Tensor, mirrored: Tensor, drop_caption: Tensor) -> tuple[Tensor, Tensor]:
        """Moments (N, 8, h, w) and contexts (N, L, D) of the chosen pictures; all three arguments are (N,) tensors."""
        moments = self.moments[indices]  # (N, 2, 8, h, w)
        moments = moments[torch.arange(len(indices), device=moments.device), mirrored.long()]  # (N, 8, h, w)
        rows = torch.where(drop_caption, 0, self.caption_of[indices])
        return moments, self.contexts[rows]


def prepare(
    pictures: datasets.Dataset,
    vae: VAE,
    encode_prompts: Callable[[list[str]], Tensor],
    encoder_fingerprint: str,
    resolution: int,
    device: torch.device,
    batch_size: int = 4,
    precision: torch.dtype = torch.float32,
) -> CaptionedLatents:
    """Encodes pictures and captions, or reads what was encoded before, and puts them where training gathers fast."""
    moments = encode_pictures(pictures, vae, resolution, device, batch_size, precision)
    texts = [(text or "").strip() for text in pictures["text"]]
    captions = ["", *sorted(set(texts) - {""})]
    row = {caption: i for i, caption in enumerate(captions)}
    contexts = encode_captions(captions, encode_prompts, encoder_fingerprint)
    caption_of = torch.tensor([row[text] for text in texts], device=device)
    return CaptionedLatents(Rows(moments, "moments", device), Rows(contexts, "context", device), caption_of, captions)
