"""The small CLIP as a whole: its tokenizer, both towers, its folder, and how well images and captions find each other.

Papers: CLIP (Radford et al. 2021, arXiv:2103.00020), byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909). The
network is `transformers.CLIPModel`, so what is written opens wherever CLIP does.

Letters: N images with their captions, R pixels a side, L tokens of a caption, P width of the space where both meet.
"""

import copy
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

from published.weight_files import load_strict, locate, read_folder_weights, read_json, write_safetensors
from published.whole_models import load_tokenizer
from training.presets import CLIPOptions
from training.script import UserError

POSITIONS = 77  # tokens that CLIP's text encoder has places for, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"

# ----------------------------------------------------------------------------------------------------------------------
# The tokenizer: CLIP's kind of byte-pair encoding, its merges learned from our captions
# ----------------------------------------------------------------------------------------------------------------------


def train_tokenizer(captions: list[str], vocabulary_size: int) -> PreTrainedTokenizerBase:
    """A `CLIPTokenizer` of at most `vocabulary_size` tokens that knows every byte and the commonest joins of captions.

    Ids are in CLIP's order: bytes, bytes that end a word (`</w>`), joins, start, end. So no text is unknown, and the
    end has the highest id. Raises ValueError if there is no room for that.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins for the bytes
    base = alphabet + [byte + "</w>" for byte in alphabet]
    if vocabulary_size < len(base) + 2:
        raise UserError(f"--vocabulary_size {vocabulary_size}: bytes and marks alone take {len(base) + 2}.")
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    # Words, single digits, and runs of anything else, as CLIP cuts text.
    pieces = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    merges = merges[: vocabulary_size - len(base) - 2]
    tokens = [*base, *("".join(pair) for pair in merges), START, END]
    return make_tokenizer({"tokens": tokens, "merges": [" ".join(pair) for pair in merges]})


def make_tokenizer(parts: dict[str, list[str]]) -> PreTrainedTokenizerBase:
    """A `CLIPTokenizer` from its `tokens`, in the order of their ids, and `merges` such as "a b</w>"."""
    with tempfile.TemporaryDirectory() as folder:  # files are what every version of transformers understands
        ids = {token: i for i, token in enumerate(parts["tokens"])}
        Path(folder, "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *parts["merges"]]
        Path(folder, "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        marks = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": POSITIONS, "do_lower_case": True} | marks
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config))
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def tokenizer_parts(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[str]]:
    """The inverse of `make_tokenizer`."""
    ids = tokenizer.get_vocab()
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return {"tokens": sorted(ids, key=ids.get), "merges": [m if isinstance(m, str) else " ".join(m) for m in merges]}


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int = POSITIONS) -> Tensor:
    """Captions → token ids (N, length), cut or padded; every row holds its end token."""
    rows = tokenizer(captions, padding="max_length", truncation=True, max_length=length)
    return torch.tensor(rows["input_ids"])


# ----------------------------------------------------------------------------------------------------------------------
# The model, its loss and its measure
# ----------------------------------------------------------------------------------------------------------------------


def build_clip(options: CLIPOptions, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP with random weights in the shape that the options ask for; ValueError names one that does not fit."""
    if options.image_size % options.patch_size:
        raise UserError(f"--image_size {options.image_size}: is not divisible by --patch_size {options.patch_size}.")
    for name in ("vision_width", "text_width"):
        if getattr(options, name) % options.head_width:
            raise UserError(
                f"--{name} {getattr(options, name)}: is not divisible by --head_width {options.head_width}."
            )
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": options.text_width,
        "intermediate_size": 4 * options.text_width,
        "num_hidden_layers": options.text_layers,
        "num_attention_heads": options.text_width // options.head_width,
        "max_position_embeddings": POSITIONS,
        "projection_dim": options.projection_width,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,  # where the text encoder looks for the sentence's summary
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": options.image_size,
        "patch_size": options.patch_size,
        "hidden_size": options.vision_width,
        "intermediate_size": 4 * options.vision_width,
        "num_hidden_layers": options.vision_layers,
        "num_attention_heads": options.vision_width // options.head_width,
        "projection_dim": options.projection_width,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=options.projection_width))


def load_clip(path_or_hub_id: str | os.PathLike, what: str = "the CLIP") -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A whole CLIP in float32 and its tokenizer, from a folder or hub id; ValueError or OSError if it is none."""
    folder = locate(path_or_hub_id, what)
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder}: holds no whole CLIP (model type {config.get('model_type')!r}), images included.")
    model = CLIPModel(CLIPConfig(**config)).float()
    load_strict(model, read_folder_weights(folder, "model"), folder)
    return model, load_tokenizer(folder)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the standard folder: weights in half precision, tokenizer in both layouts, image preprocessing."""
    config = copy.deepcopy(model.config)
    config.architectures = ["CLIPModel"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = "float32"  # to compute in, though the file is half as large
    config.save_pretrained(folder)
    write_safetensors(folder / "model.safetensors", {name: t.half() for name, t in model.state_dict().items()})
    tokenizer.save_pretrained(folder)
    parts = tokenizer_parts(tokenizer)  # vocab.json and merges.txt: older programs know nothing of tokenizer.json
    ids = {token: i for i, token in enumerate(parts["tokens"])}
    (folder / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *parts["merges"]]) + "\n", encoding="utf-8")
    size = model.config.vision_config.image_size
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": 1,  # PIL's number for Lanczos
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],  # 0..1 → -1..1, the pixels of this project
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2) + "\n")


def embed_images(model: CLIPModel, pixels: Tensor) -> Tensor:
    """Pictures (N, 3, H, H) in [-1, 1], of any size → unit vectors (N, P)."""
    size = model.config.vision_config.image_size
    if pixels.shape[-1] != size:
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True, align_corners=False)
    pooled = model.vision_model(pixels.to(model.logit_scale.dtype)).pooler_output  # (N, vision width)
    return F.normalize(model.visual_projection(pooled).float(), dim=-1)  # (N, P)


def embed_captions(model: CLIPModel, ids: Tensor) -> Tensor:
    """Token ids (N, L) → unit vectors (N, P), read at each caption's end token."""
    pooled = model.text_model(ids).pooler_output  # (N, text width)
    return F.normalize(model.text_projection(pooled).float(), dim=-1)  # (N, P)


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, pixels: Tensor, captions: list[str]
) -> tuple[float, float]:
    """R@1 from image to caption and from caption to image, in 0..1, of images (N, 3, H, H) in [-1, 1].

    A hit is the right caption word for word: where two images share one, either will do.
    """
    device = model.logit_scale.device
    images = torch.cat([embed_images(model, part.to(device)) for part in pixels.split(50)])  # (N, P)
    texts = torch.cat([embed_captions(model, part.to(device)) for part in tokenize(tokenizer, captions).split(50)])
    similarity = (images @ texts.T).cpu()  # (N, N)
    to_text, to_image = similarity.argmax(dim=1).tolist(), similarity.argmax(dim=0).tolist()
    hits = [(captions[t] == own, captions[i] == own) for t, i, own in zip(to_text, to_image, captions, strict=True)]
    return tuple(np.mean(hits, axis=0).tolist())
