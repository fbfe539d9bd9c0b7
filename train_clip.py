"""Trains a small CLIP from scratch: pulls matching images and captions together, and pushes all others apart.

Papers: CLIP (Radford et al. 2021, arXiv:2103.00020), its loss that of ConVIRT (Zhang et al. 2020, arXiv:2010.00747);
byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909). All options are in `training/presets.py`, the
network in `training/clip_model.py`: it is `transformers.CLIPModel`, so what is written opens wherever CLIP does; Stable
Diffusion takes its text half.

    python train_clip.py --dataset monsters --output_dir stable_diffusion_results/my_clip

writes the folder `clip/` (averaged weights, tokenizer, image preprocessing) into the output folder, beside
metrics.csv, loss.png and retrieval.png. Use it with `--text_encoder stable_diffusion_results/my_clip/clip`.
The defaults are for a GPU; a CPU wants smaller ones, such as --patch_size 12 --vision_width 128 --vision_layers 3
--text_width 128 --text_layers 2 --batch_size 64 --fresh_monsters 4 --pool 8192.

Letters: N images with their captions, R pixels a side, L tokens of a caption, P width of the space where both meet.
"""

from training.options import answer_early, parse_options
from training.presets import CLIPOptions as Options

if __name__ == "__main__":
    answer_early(Options)  # before the imports below, which take seconds

import copy
import json
import math
import os
import signal
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

import monsters
from images import image_to_pixels
from monsters.workers import follow_main_process
from pokemon_dataset import load_images
from stable_diffusion_model import choose_device
from training.clip_model import (
    POSITIONS,
    build_clip,
    embed_captions,
    embed_images,
    load_clip,
    make_tokenizer,
    retrieval,
    save_clip,
    tokenize,
    tokenizer_parts,
    train_tokenizer,
)
from training.reconstruction import to_floats
from training.reporter import Reporter
from training.reproducible import (
    EMA,
    Processes,
    batch_indices,
    clip_and_step,
    decay_groups,
    digest_of,
    generator_for,
    learning_rate_at,
    load_optimizer,
    resolve_precision,
)
from training.run_folder import RunFolder, load_checkpoint
from training.script import UserError, run, user_errors

MAX_LOGIT_SCALE = math.log(100)  # the paper's clamp, which keeps training stable (section 2.5)

# Indices of the monsters trained on, and of those held out (the first 100 by default). `monsters:N` counts from 0, so
# neither overlaps with other training sets.
FIRST_TRAINING_MONSTER = 1_000_000
HELD_OUT_MONSTERS = range(900_000, FIRST_TRAINING_MONSTER)


SCORES = ("image_to_text_r1", "text_to_image_r1")
COLUMNS = ("step", "loss", "gradient_norm", "learning_rate", "logit_scale", *SCORES, "skipped_steps")

# ----------------------------------------------------------------------------------------------------------------------
# The loss
# ----------------------------------------------------------------------------------------------------------------------


def clip_loss(images: Tensor, captions: Tensor, logit_scale: Tensor) -> Tensor:
    """Cross-entropy of finding each image's caption, and each caption's image, in the batch (Radford 2021, Figure 3).

    Unit vectors (N, P) twice and the logarithm of the inverse temperature → the mean of two cross-entropies, in nats.
    """
    logits = logit_scale.exp() * images @ captions.T  # (N, N); pairs belong together on the diagonal
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


# ----------------------------------------------------------------------------------------------------------------------
# Data: a source hands out n images and their tokens for a step, as a function of (seed, step) alone
# ----------------------------------------------------------------------------------------------------------------------


class FixedImages:
    """Images that are there once and for all: bytes (M, 3, R, R) and token ids (M, L), on the device."""

    def __init__(self, images: Tensor, ids: Tensor, seed: int) -> None:
        self.images, self.ids, self.seed = images, ids, seed

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(self.images), n, step, self.seed, self.images.device)
        return self.images[rows], self.ids[rows]


class FreshMonsters:
    """An endless supply of monsters, as a function of the step, so that a resumed run draws the same.

    Each step draws some new ones into a ring buffer and takes its batch from the whole buffer, because drawing one (20
    ms on a core) is slower than learning from it.
    """

    def __init__(
        self, options: Options, tokenizer: PreTrainedTokenizerBase, length: int, first_step: int, n: int, size: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.chunk, self.seed, self.tokenizer = options.fresh_monsters, options.seed, tokenizer
        if self.chunk < 1 or options.pool < max(self.chunk, n) or options.pool % self.chunk:
            raise UserError(
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
            worker_init_fn=_follow,
            prefetch_factor=4 if workers else None,
        )
        self.stream: Iterator | None = None

    def _due(self, step: int) -> int:
        """How many monsters have arrived when `step` begins."""
        return self.at_first + step * self.chunk

    def batch(self, step: int, n: int) -> tuple[Tensor, Tensor]:
        self.stream = self.stream or iter(self.loader)
        missing = range(self.arrived, self._due(step), self.chunk)
        for arrived in tqdm(
            missing, "drawing monsters", unit=f"{self.chunk} monsters", disable=None if len(missing) >= 4 else True
        ):
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
    """Monster number i: its image as bytes (3, R, R), and its caption."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> tuple[np.ndarray, str]:
        image = np.asarray(monsters.draw(index, self.size)).transpose(2, 0, 1)
        return image, monsters.caption(index)


def _collate(rows: list[tuple[np.ndarray, str]]) -> tuple[np.ndarray, list[str]]:
    drawn, captions = zip(*rows, strict=True)
    return np.stack(drawn), list(captions)  # arrays go through a pipe: shared memory is scarce in containers


def _follow(worker: int) -> None:
    follow_main_process()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent to all processes of a job: the main one decides when to stop


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


class ImageSets:
    """Images and captions of all sources, some of each held out. Fresh monsters are described now and drawn later."""

    def __init__(self, options: Options, size: int) -> None:
        self.training: dict[str, tuple[Tensor | None, list[str]]] = {}  # source → images (or fresh ones) and captions
        self.held_out: dict[str, tuple[Tensor, list[str]]] = {}  # source → pixels (n, 3, R, R) in [-1, 1] and captions
        n = options.validation_images
        for source in options.dataset:
            if source == "monsters":
                indices = HELD_OUT_MONSTERS[:n]
                drawn = [
                    image_to_pixels(monsters.draw(i, size))
                    for i in tqdm(indices, "drawing held-out monsters", disable=None)
                ]
                self.held_out[source] = torch.stack(drawn), [monsters.caption(i) for i in indices]
                captions = [monsters.caption(FIRST_TRAINING_MONSTER + i) for i in range(10_000)]
                self.training[source] = None, captions
            else:
                images, captions = load_images(source, size, options.on_bad_image)
                if len(images) < 2 * n:
                    raise UserError(f"--validation_images {n}: {source} has only {len(images)} images.")
                order = torch.randperm(len(images), generator=torch.Generator().manual_seed(options.seed)).tolist()
                self.held_out[source] = to_floats(images[order[:n]]), [captions[i] for i in order[:n]]
                self.training[source] = images[order[n:]], [captions[i] for i in order[n:]]

    def digest(self) -> str:
        """Of all images and captions; of fresh monsters, of what those held out look like."""
        images = [images for images, _ in [*self.held_out.values(), *self.training.values()] if images is not None]
        words = "\n".join(self.captions()).encode()
        return digest_of([*images, torch.frombuffer(bytearray(words), dtype=torch.uint8)])

    def captions(self) -> list[str]:
        return [caption for _, captions in self.training.values() for caption in captions]


class Run:
    """Model, tokenizer, data, optimizer and average of one training run."""

    def __init__(self, options: Options, folder: RunFolder) -> None:
        self.options, self.folder = options, folder
        with user_errors():
            device = self.device = choose_device(options.device)
            model, tokenizer = load_clip(options.pretrained, "--pretrained") if options.pretrained else (None, None)
        self.precision = resolve_precision(options.precision, device)
        size = model.config.vision_config.image_size if model else options.image_size
        state = load_checkpoint(folder.path, device) if options.resume else None
        self.sets = ImageSets(options, size)
        captions = self.sets.captions()
        if state:
            tokenizer = make_tokenizer(state["tokenizer"])
        elif tokenizer is None:
            tokenizer = train_tokenizer(captions, options.vocabulary_size)
        self.tokenizer = tokenizer
        self.model = (model or build_clip(options, tokenizer)).to(device).train()
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, options.weight_decay),
            lr=options.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True,
        )  # fmt: skip
        self.ema = EMA(self.model, options.ema_decay)

        duties = {"validation": options.validate_every, "checkpoint": options.checkpoint_every}
        self.reporter = Reporter(options, folder, Processes(0, 1, device), duties, state, self.sets.digest())
        length = min(POSITIONS, 8 + max(len(ids) for ids in tokenizer(captions).input_ids))  # no step need read all 77
        self.sources = self.build_sources(length, size)
        if state is None:
            folder.start(options, COLUMNS)
        else:
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            load_optimizer(self.optimizer, state["optimizer"])
            folder.resume(options, state["step"], COLUMNS, [SCORES[0]] if "validation" in state["undone"] else [])
            self.write_results()  # a kill may have come before they were written
        self.reporter.start_wandb("stable-diffusion-clip")
        print(
            f"{sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters, {len(tokenizer)} tokens, "
            f"{device.type}, {str(self.precision).removeprefix('torch.')}; results in {folder.path}"
        )

    def build_sources(self, length: int, size: int) -> list[tuple["FixedImages | FreshMonsters", int]]:
        """Each source with its share of a batch: equal shares, however many images it has."""
        options, sources = self.options, []
        count = len(options.dataset)
        for i, (images, captions) in enumerate(self.sets.training.values()):
            share = options.batch_size // count + (i < options.batch_size % count)
            if images is None:
                first_step = self.reporter.first_step
                source = FreshMonsters(options, self.tokenizer, length, first_step, share, size, self.device)
            else:
                ids = tokenize(self.tokenizer, captions, length)
                source = FixedImages(images.to(self.device), ids.to(self.device), options.seed)
            sources.append((source, share))
        return [(source, share) for source, share in sources if share]

    def train_step(self, step: int) -> dict[str, Tensor]:
        """One step: returns its loss and gradient norm, 0-d tensors on the device."""
        options, model = self.options, self.model
        batches = [source.batch(step, share) for source, share in self.sources]
        images, ids = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (N, 3, R, R), (N, L)
        pixels = augment(images, options.mirror, generator_for(self.device, options.seed, "augment", step))
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision != torch.float32):
            from_images, from_captions = embed_images(model, pixels), embed_captions(model, ids)  # (N, P) each
        loss = clip_loss(from_images, from_captions, model.logit_scale)
        loss.backward()
        norm = clip_and_step(self.optimizer, options.gradient_clip)
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        self.ema.update(model, step)
        return {"loss": loss, "gradient_norm": norm}

    def train(self) -> None:
        options, reporter = self.options, self.reporter
        with reporter.running():
            self.after_step()  # what a stop left undone at the step that a resumed run begins after
            for step in reporter.steps():
                rate = learning_rate_at(
                    step, options.learning_rate, options.warmup_steps, options.max_steps, floor=0.01
                )
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                reporter.record(learning_rate=rate, **self.train_step(step))
                self.after_step()

    def after_step(self) -> None:
        """Validation and checkpoint, each when it is due."""
        score = math.inf
        if self.reporter.due("validation"):
            with self.reporter.interruptible("validation"):
                scores = self.validate()
                self.reporter.log(**scores, logit_scale=self.ema.module.logit_scale.exp().item())
                score = -scores[SCORES[0]]
        if self.reporter.due("checkpoint"):
            self.save(is_best=self.reporter.is_best(score))

    def validate(self) -> dict[str, float]:
        """Mean R@1 over the sources; each one's go to the screen and scores.json."""
        step, rows = self.reporter.step, {}
        for source, pairs in self.sets.held_out.items():
            self.reporter.check_stop()
            rows[source] = dict(zip(SCORES, retrieval(self.ema.module, self.tokenizer, *pairs), strict=True))
            self.reporter.say(
                f"step {step}: {source}: R@1 among {len(pairs[1])}: image → caption {rows[source][SCORES[0]]:.0%}, "
                f"caption → image {rows[source][SCORES[1]]:.0%}"
            )
        self.folder.write_text("scores.json", json.dumps({"step": step, "held_out": rows}, indent=2) + "\n")
        return {name: float(np.mean([row[name] for row in rows.values()])) for name in SCORES}

    def save(self, is_best: bool) -> None:
        """A checkpoint; clip/ with the averaged weights; plots."""
        folder = self.folder
        parts = {"model": self.model, "ema": self.ema.module, "optimizer": self.optimizer}
        state = self.reporter.state() | {name: part.state_dict() for name, part in parts.items()}
        state["tokenizer"] = tokenizer_parts(self.tokenizer)
        folder.save_checkpoint(state, self.options.keep_checkpoints, is_best)
        self.write_results()
        folder.plot({"loss": "training loss"}, "loss (nats)", log_scale=True)
        labels = ("image → caption", "caption → image")
        folder.plot(dict(zip(SCORES, labels, strict=True)), "held-out R@1", "retrieval.png")
        self.reporter.saved()

    def write_results(self) -> None:
        averaged = copy.deepcopy(self.ema.module).cpu()
        self.folder.write_folder("clip", lambda path: save_clip(averaged, self.tokenizer, path))


def main(argv: list[str]) -> None:
    options = parse_options(Options, argv)
    torch.manual_seed(options.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with RunFolder(options) as folder:
        training_run = Run(options, folder)
        training_run.train()
        if training_run.reporter.finish():
            print(f"Wrote {folder.path / 'clip'}; use it with --text_encoder {folder.path / 'clip'}")


if __name__ == "__main__":
    run(main)
