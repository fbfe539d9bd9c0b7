"""Captioned images as a U-Net is trained on them: cached latents and text encodings, gathered in batches.

Spaces: a PIL image of any size and mode → `images.to_pixels` → float (3, R, R) in [-1, 1] → `VAE.encode` → moments
(8, R/8, R/8) of the raw latents. Every image and its mirror is encoded once, and every distinct caption once; both are
kept in `training.encoded_cache` under the SHA-256 of their content, so that nothing stale can be read.

Letters: N images in the batch, R resolution, h = w = R/8, L text tokens, D width of the text encoding.
"""

import contextlib
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from torch import Tensor

from images import TRANSFORM_VERSION
from text_encoder import TextEncoder
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
    name_of,
    pixels_of,
    refuse_or_warn,
    undecodable,
)
from training.reproducible import Processes, generator_for
from training.script import UserError
from vae_model import VAE

# What the VAE encodes at a time. On two cores, the shipped one takes 54 ms for an image of 128, 37 ms with channels
# last, 30 ms in a batch of 8; one of 256 gains from channels last (144 → 119 ms), not from a batch. On a GPU, 4 images
# of 512, for which the published VAE needs 3.2 GB in float32.
PIXELS_AT_ONCE = {"cpu": 8 * 128**2, "cuda": 4 * 512**2}
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
DEVICE_SHARE = 0.3  # of a GPU's free memory that moments and contexts may take; the rest is for training

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

    def prompts(self, chosen: list[str] | None) -> list[str]:
        """What previews show: the chosen prompts, or eight captions at most."""
        captions = self.captions[1:] or [""]
        return chosen or captions[:: math.ceil(len(captions) / 8)]

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


def images_at_once(resolution: int, device: torch.device) -> int:
    """How many images the VAE encodes in one batch."""
    pixels = PIXELS_AT_ONCE.get(device.type, PIXELS_AT_ONCE["cuda"])
    return min(max(pixels // resolution**2, 1), 64)


def batches_at_once(vae: VAE, resolution: int, processes: Processes) -> int:
    """How many batches are encoded beside each other: on a CPU one by each thread, if a quarter of its memory suffices.

    The encoder has about five feature maps at once that are as large as the images: 0.7 GB at 512, as SD's VAE is.
    """
    if processes.device.type != "cpu":
        return 1
    threads, memory = torch.get_num_threads(), memory_of(processes.device)
    pixels = images_at_once(resolution, processes.device) * resolution**2
    bytes_each = 5 * 4 * pixels * vae.config.block_out_channels[0] * processes.local_count
    return threads if memory is None else max(min(threads, memory // 4 // bytes_each), 1)


def memory_of(device: torch.device) -> int | None:
    """Bytes of memory that the device has in all, or that a container may use of them; None if it does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return None
    with contextlib.suppress(OSError, ValueError):  # no container, or "max"
        memory = min(memory, int(CONTAINER_LIMIT.read_text()))
    return memory


def memory_for_data(device: torch.device) -> int:
    """Bytes of the device's memory that moments and contexts may take; none on a CPU, which reads the mapped files."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what encoding has left
        return int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(DEVICE_SHARE * (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()))
    return 0


def split_images(count: int, share: float, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on and of those held out; the same in every run with this seed."""
    held_out = math.ceil(count * share)
    if held_out >= count:
        raise UserError(
            f"--validation_share {share}: of {count} image{'s' * (count > 1)}, none would be left to train on; "
            "--validation_share 0 holds none out."
        )
    order = torch.randperm(count, generator=generator_for(torch.device("cpu"), seed, "split")).to(device)
    return order[held_out:], order[:held_out]


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
    batch_size = images_at_once(resolution, device)
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
    workers = batches_at_once(vae, resolution, processes)
    encode_missing(cache, distinct, load, encode, vae, batch_size, processes, what, workers)


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
