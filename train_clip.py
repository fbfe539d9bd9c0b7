"""Trains a small CLIP from scratch: pictures and their captions are drawn together, all others pushed apart.

Papers: CLIP (Radford et al. 2021, arXiv:2103.00020), its loss that of ConVIRT (Zhang et al. 2020, arXiv:2010.00747);
byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909). The network is `transformers.CLIPModel`, so what is written
opens wherever CLIP does; Stable Diffusion takes its text half.

    python train_clip.py --dataset monsters --output_dir stable_diffusion_results/my_clip

writes the folder `clip/` (averaged weights, tokenizer, picture preprocessing) into the output folder, beside
metrics.csv, loss.png and retrieval.png. Use it with `--text_encoder stable_diffusion_results/my_clip/clip`.
The defaults are for a GPU; a CPU wants smaller ones, such as --patch_size 12 --vision_width 128 --vision_layers 3
--text_width 128 --text_layers 2 --batch_size 64 --fresh_monsters 4 --pool 8192.

Letters: N pictures with their captions, R pixels a side, L tokens of a caption, P width of the space where both meet.
"""

import copy
import json
import math
import os
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, PreTrainedTokenizerBase

import monsters
from images import image_to_pixels
from pokemon_dataset import load_captioned_images, load_pixels
from pretrained_files import load_strict, locate, read_folder_weights, read_json, write_safetensors
from stable_diffusion_model import choose_device
from text_encoder import load_tokenizer
from training import (
    EMA,
    RunFolder,
    StopRequest,
    batch_indices,
    generator_for,
    learning_rate_at,
    parse_options,
    resolve_precision,
    run,
)

POSITIONS = 77  # tokens that CLIP's text encoder has places for, start and end included
START, END = "<|startoftext|>", "<|endoftext|>"
MAX_LOGIT_SCALE = math.log(100)  # the paper's clamp, which keeps training stable (section 2.5)

# Monsters that are drawn while training, and those it is judged by (the first 100 of them, if not told otherwise). Data
# sets of monsters count from 0, so neither touches the pictures that other networks are trained on.
FIRST_TRAINING_MONSTER = 1_000_000
HELD_OUT_MONSTERS = range(900_000, FIRST_TRAINING_MONSTER)


@dataclass
class Options:
    """Options of train_clip.py; see README.md."""

    dataset: list[str] = field(
        default_factory=lambda: ["monsters"],
        metadata={
            "help": "one or more of: monsters (fresh ones without end), monsters:N, a folder of pictures with "
            "captions, a hub id"
        },
    )
    output_dir: str = field(default="stable_diffusion_results/my_clip", metadata={"help": "the run folder"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output_dir"})
    pretrained: str | None = field(
        default=None, metadata={"help": "start from this CLIP, tokenizer and shape included: a folder or hub id"}
    )
    image_size: int = field(default=96, metadata={"help": "pixels a side, divisible by --patch_size"})
    patch_size: int = 8
    vision_width: int = 192
    vision_layers: int = 5
    text_width: int = field(default=192, metadata={"help": "which is the U-Net's context_dim too"})
    text_layers: int = 4
    head_width: int = field(default=32, metadata={"help": "of each attention head, in both networks"})
    projection_width: int = field(default=128, metadata={"help": "of the space where pictures and captions meet"})
    vocabulary_size: int = field(default=1536, metadata={"help": "tokens at most; 514 of them are bytes and marks"})
    validation_pictures: int = field(default=100, metadata={"help": "held out, of each data set"})
    mirror: bool = field(default=True, metadata={"help": "mirror half of the pictures; not if captions say left"})
    fresh_monsters: int = field(default=16, metadata={"help": "drawn anew for each step, of those it sees"})
    pool: int = field(default=16_384, metadata={"help": "fresh monsters are kept until there are this many"})
    workers: int = field(default=-1, metadata={"help": "processes that draw; -1 = one less than there are cores"})
    max_steps: int = 8000
    batch_size: int = field(default=512, metadata={"help": "more is better here: each step tells that many apart"})
    learning_rate: float = field(default=1e-3, metadata={"help": "at its peak; warmed up, then a cosine to 1 %%"})
    warmup_steps: int = 200
    weight_decay: float = field(default=0.1, metadata={"help": "of weight matrices, not of gains and biases"})
    ema_decay: float = 0.998
    gradient_clip: float = 1.0
    precision: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16"})
    device: str = field(default="auto", metadata={"help": "auto, cuda, mps or cpu"})
    seed: int = 0
    validate_every: int = 250
    checkpoint_every: int = 500
    log_every: int = 25
    wandb: str = field(default="auto", metadata={"help": "auto, online, offline or off"})


SCORES = ("image_to_text_r1", "text_to_image_r1")
COLUMNS = ("step", "loss", "learning_rate", "logit_scale", *SCORES, "pictures_per_second")

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
        raise ValueError(f"--vocabulary_size {vocabulary_size}: bytes and marks alone take {len(base) + 2}.")
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


def build_clip(options: Options, tokenizer: PreTrainedTokenizerBase) -> CLIPModel:
    """A CLIP with random weights in the shape that the options ask for; ValueError names one that does not fit."""
    if options.image_size % options.patch_size:
        raise ValueError(f"--image_size {options.image_size}: is not divisible by --patch_size {options.patch_size}.")
    for name in ("vision_width", "text_width"):
        if getattr(options, name) % options.head_width:
            raise ValueError(
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


def load_clip(path_or_hub_id: str | os.PathLike) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A whole CLIP in float32 and its tokenizer, from a folder or hub id; ValueError or OSError if it is none."""
    folder = locate(path_or_hub_id, "the CLIP")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "clip":
        raise ValueError(f"{folder}: holds no whole CLIP (model type {config.get('model_type')!r}), pictures included.")
    model = CLIPModel(CLIPConfig(**config)).float()
    load_strict(model, read_folder_weights(folder, "model"), folder)
    return model, load_tokenizer(folder)


def save_clip(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the standard folder: weights in half precision, tokenizer in both layouts, picture preprocessing."""
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


def clip_loss(images: Tensor, captions: Tensor, logit_scale: Tensor) -> Tensor:
    """Which caption is this picture's, which picture is this caption's (Radford et al. 2021, Figure 3)?

    Unit vectors (N, P) twice and the logarithm of the inverse temperature → the mean of two cross-entropies, in nats.
    """
    logits = logit_scale.exp() * images @ captions.T  # (N, N); pairs belong together on the diagonal
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


@torch.no_grad()
def retrieval(
    model: CLIPModel, tokenizer: PreTrainedTokenizerBase, pixels: Tensor, captions: list[str]
) -> tuple[float, float]:
    """R@1 from picture to caption and from caption to picture, in 0..1, of pictures (N, 3, H, H) in [-1, 1].

    A hit is the right caption word for word: where two pictures share one, either will do.
    """
    device = model.logit_scale.device
    images = torch.cat([embed_images(model, part.to(device)) for part in pixels.split(50)])  # (N, P)
    texts = torch.cat([embed_captions(model, part.to(device)) for part in tokenize(tokenizer, captions).split(50)])
    similarity = (images @ texts.T).cpu()  # (N, N)
    to_text, to_image = similarity.argmax(dim=1).tolist(), similarity.argmax(dim=0).tolist()
    hits = [(captions[t] == own, captions[i] == own) for t, i, own in zip(to_text, to_image, captions, strict=True)]
    return tuple(np.mean(hits, axis=0).tolist())


# ----------------------------------------------------------------------------------------------------------------------
# Data: a source hands out n pictures and their tokens for a step, as a function of (seed, step) alone
# ----------------------------------------------------------------------------------------------------------------------


class Pictures:
    """Pictures that are there once and for all: bytes (M, 3, R, R) and token ids (M, L), on the device."""

    def __init__(self, images: Tensor, ids: Tensor, seed: int) -> None:
        self.images, self.ids, self.seed = images, ids, seed

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(self.images), n, step, self.seed, self.images.device)
        return self.images[rows], self.ids[rows]


def load_pictures(source: str, size: int) -> tuple[Tensor, list[str]]:
    """All pictures of a source as bytes (M, 3, R, R), and their captions."""
    table = load_captioned_images(source)
    cells = table["image"]
    images = torch.empty(len(table), 3, size, size, dtype=torch.uint8)
    with ThreadPoolExecutor() as pool:
        for start in tqdm(range(0, len(table), 32), desc=f"reading {source}", unit="32 pictures"):
            pixels = load_pixels([cells[i] for i in range(start, min(start + 32, len(table)))], size, pool)
            images[start : start + 32] = ((pixels + 1) * 127.5).round().to(torch.uint8)
    return images, [(text or "").strip() for text in table["text"]]


class FreshMonsters:
    """Monsters without end: some are drawn for every step, and the latest of them are kept for a while.

    Drawing is the bottleneck (20 ms on a core), so each picture is seen several times: a step draws its batch from a
    ring of the latest ones. Which these are follows from the step, so a resumed run draws the same.
    """

    def __init__(
        self, options: Options, tokenizer: PreTrainedTokenizerBase, length: int, first_step: int, n: int, size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.chunk, self.seed, self.tokenizer = options.fresh_monsters, options.seed, tokenizer
        if self.chunk < 1 or options.pool < max(self.chunk, n) or options.pool % self.chunk:
            raise ValueError(
                f"--pool {options.pool}: must be a multiple of --fresh_monsters {self.chunk} and hold a batch of {n}."
            )
        self.size = options.pool
        self.at_first = min(self.size, -(-8 * n // self.chunk) * self.chunk)  # enough to begin with; others join
        self.images = torch.empty(self.size, 3, size, size, dtype=torch.uint8, device=device)
        self.ids = torch.empty(self.size, length, dtype=torch.long, device=device)
        self.arrived = max(0, self._due(first_step) - self.size)  # monsters that came, and may have gone again
        numbers = range(FIRST_TRAINING_MONSTER + self.arrived, FIRST_TRAINING_MONSTER + self._due(options.max_steps))
        workers = options.workers if options.workers >= 0 else max(1, (os.cpu_count() or 2) - 1)
        self.loader = DataLoader(
            _Drawings(size),
            sampler=numbers,
            batch_size=self.chunk,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_ctrl_c,
            prefetch_factor=4 if workers else None,
        )
        self.stream: Iterator | None = None

    def _due(self, step: int) -> int:
        """How many monsters have arrived when `step` begins."""
        return self.at_first + step * self.chunk

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        self.stream = self.stream or iter(self.loader)
        missing = range(self.arrived, self._due(step), self.chunk)
        for arrived in tqdm(missing, "drawing monsters", unit=f"{self.chunk} monsters", disable=len(missing) < 4):
            drawn, captions = next(self.stream)
            slots = slice(arrived % self.size, arrived % self.size + self.chunk)
            self.images[slots] = torch.from_numpy(drawn).to(self.images.device)
            self.ids[slots] = tokenize(self.tokenizer, captions, self.ids.shape[1]).to(self.ids.device)
        self.arrived = self._due(step)
        device = self.images.device
        generator = generator_for(device, self.seed, "monsters", step)
        rows = torch.randperm(min(self.arrived, self.size), generator=generator, device=device)[:n]
        return self.images[rows], self.ids[rows]


class _Drawings(Dataset):
    """Monster number i: its picture as bytes (3, R, R), and its caption."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        picture = np.asarray(monsters.draw(index, self.size)).transpose(2, 0, 1)
        return picture, monsters.caption(index)


def _collate(rows: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    drawn, captions = zip(*rows, strict=True)
    return np.stack(drawn), list(captions)  # arrays go through a pipe: shared memory is scarce in containers


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def augment(images: Tensor, mirror: bool, generator: torch.Generator) -> Tensor:
    """Bytes (N, 3, R, R) → floats in [-1, 1], moved by up to R/24 pixels and, if wanted, mirrored half the time."""
    n, size, device = len(images), images.shape[-1], images.device
    span, reach = torch.arange(size, device=device), size // 24
    move = torch.randint(-reach, reach + 1, (2, n, 1), generator=generator, device=device)
    rows, columns = (span + move).clamp(0, size - 1)  # (n, R) each; the rim is repeated
    if mirror:
        flipped = torch.rand(n, 1, generator=generator, device=device) < 0.5
        columns = torch.where(flipped, columns.flip(-1), columns)
    channels = torch.arange(3, device=device)[None, :, None, None]
    each = torch.arange(n, device=device)[:, None, None, None]
    return images[each, channels, rows[:, None, :, None], columns[:, None, None, :]].float() / 127.5 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv)
    device = choose_device(options.device)
    precision = resolve_precision(options.precision, device)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    model, tokenizer = load_clip(options.pretrained) if options.pretrained else (None, None)
    size = model.config.vision_config.image_size if model else options.image_size
    state = RunFolder.load_state(Path(options.output_dir), device) if options.resume else None
    folder = RunFolder(options.output_dir, options, options.resume, COLUMNS)
    first_step = state["step"] if state else 0

    # Pictures and captions: some of each source are held out. Fresh monsters are described now and drawn later.
    training: dict[str, tuple[Tensor | None, list[str]]] = {}
    held_out: dict[str, tuple[Tensor, list[str]]] = {}
    for source in options.dataset:
        n = options.validation_pictures
        if source == "monsters":
            indices = HELD_OUT_MONSTERS[:n]
            drawn = [image_to_pixels(monsters.draw(i, size)) for i in tqdm(indices, "drawing held-out monsters")]
            held_out[source] = torch.stack(drawn), [monsters.caption(i) for i in indices]
            training[source] = None, [monsters.caption(FIRST_TRAINING_MONSTER + i) for i in range(10_000)]
        else:
            images, captions = load_pictures(source, size)
            if len(images) < 2 * n:
                raise ValueError(f"--validation_pictures {n}: {source} has only {len(images)} pictures.")
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed)).tolist()
            held_out[source] = images[order[:n]].float() / 127.5 - 1, [captions[i] for i in order[:n]]
            training[source] = images[order[n:]], [captions[i] for i in order[n:]]
    captions = [caption for _, texts in training.values() for caption in texts]

    # Tokenizer and model
    if state:
        tokenizer = make_tokenizer(state["tokenizer"])
    elif tokenizer is None:
        tokenizer = train_tokenizer(captions, options.vocabulary_size)
    model = (model or build_clip(options, tokenizer)).to(device).train()
    length = min(POSITIONS, 8 + max(len(ids) for ids in tokenizer(captions).input_ids))  # no step need read all 77
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    ema = EMA(model, options.ema_decay)
    if state:
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        folder.forget_after(first_step)

    # Every source gives an equal share of a batch, however many pictures it has.
    count = len(options.dataset)
    shares = [options.batch_size // count + (i < options.batch_size % count) for i in range(count)]
    sources: list[tuple[Pictures | FreshMonsters, int]] = []
    for (images, texts), share in zip(training.values(), shares, strict=True):
        if images is None:
            source = FreshMonsters(options, tokenizer, length, first_step, share, size, device)
        else:
            source = Pictures(images.to(device), tokenize(tokenizer, texts, length).to(device), options.seed)
        sources.append((source, share))
    folder.start_wandb(options.wandb, "stable-diffusion-clip", options)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"{parameters:.1f} M parameters, {len(tokenizer)} tokens, {device}, {precision}; results in {folder.path}")

    def validate(step: int) -> dict[str, float]:
        scores = {source: retrieval(ema.module, tokenizer, *pairs) for source, pairs in held_out.items()}
        for source, (to_text, to_image) in scores.items():
            among = f"step {step}: {source}: R@1 among {len(held_out[source][1])}"
            tqdm.write(f"{among}: picture → caption {to_text:.0%}, caption → picture {to_image:.0%}")
        rows = {source: dict(zip(SCORES, values, strict=True)) for source, values in scores.items()}
        folder.write_text("scores.json", json.dumps({"step": step, "held_out": rows}, indent=2) + "\n")
        return dict(zip(SCORES, np.mean(list(scores.values()), axis=0).tolist(), strict=True))

    def checkpoint(step: int) -> None:
        averaged = copy.deepcopy(ema.module).cpu()
        folder.replace_folder("clip", lambda path: save_clip(averaged, tokenizer, path))
        parts = {"model": model, "ema": ema.module, "optimizer": optimizer}
        state = {name: part.state_dict() for name, part in parts.items()}
        folder.save_state(state | {"tokenizer": tokenizer_parts(tokenizer), "step": step})
        folder.plot({"loss": "training loss"}, "loss (nats)", log_scale=True)
        labels = ("picture → caption", "caption → picture")
        folder.plot(dict(zip(SCORES, labels, strict=True)), "held-out R@1", "retrieval.png")

    stop = StopRequest()
    progress = tqdm(total=options.max_steps, initial=first_step, unit="step")
    recent: list[Tensor] = []
    done = first_step
    for step in range(first_step, options.max_steps):
        rate = learning_rate_at(step, options.learning_rate, options.warmup_steps, options.max_steps, floor=0.01)
        for group in optimizer.param_groups:
            group["lr"] = rate
        batches = [source.batch(step, share) for source, share in sources if share]
        images, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (N, 3, R, R), (N, L)
        pixels = augment(images, options.mirror, generator_for(device, options.seed, "augment", step))

        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            pictured, said = embed_images(model, pixels), embed_captions(model, ids)  # (N, P) each
        loss = clip_loss(pictured, said, model.logit_scale)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        ema.update(model, step)

        recent.append(loss.detach())
        progress.update()
        done = step + 1
        is_last = done == options.max_steps or stop.asked
        validating = done % options.validate_every == 0 or is_last
        if done % options.log_every == 0 or validating:
            mean_loss = torch.stack(recent).mean().item()
            recent.clear()
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f"step {done}: the loss is {mean_loss}; go on from the last checkpoint with --resume and a lower "
                    "--learning_rate."
                )
            progress.set_postfix(loss=f"{mean_loss:.4f}")
            speed = (progress.format_dict["rate"] or 0) * options.batch_size
            scores = validate(done) if validating else {}
            scale = model.logit_scale.exp().item()
            folder.log(done, loss=mean_loss, learning_rate=rate, logit_scale=scale, pictures_per_second=speed, **scores)
        if done % options.checkpoint_every == 0 or is_last:
            checkpoint(done)
        if stop.asked:
            break
    progress.close()
    folder.close()
    print(f"Wrote {folder.path / 'clip'} after {done} steps; use it with --text_encoder {folder.path / 'clip'}")


if __name__ == "__main__":
    run(main)
