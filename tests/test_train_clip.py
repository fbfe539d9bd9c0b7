"""The small CLIP: tokenizer and folder open everywhere, the loss is the paper's, a stopped run resumes to the bit."""

import csv
import filecmp
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

import monsters
import train_clip
from images import image_to_pixels, to_pixels
from published import load_text_encoder
from tests.tiny import folder_at
from train_clip import FIRST_TRAINING_MONSTER, HELD_OUT_MONSTERS, FreshMonsters, Options, augment, clip_loss
from training import clip_model
from training.clip_model import (
    build_clip,
    embed_captions,
    embed_images,
    load_clip,
    retrieval,
    save_clip,
    tokenize,
    train_tokenizer,
)

CAPTIONS = [monsters.caption(i) for i in range(500)]
TINY = {
    "image_size": 32, "patch_size": 16, "vision_width": 32, "vision_layers": 1, "text_width": 32, "text_layers": 1,
    "head_width": 16, "projection_width": 16, "vocabulary_size": 900,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, TINY["vocabulary_size"])


def tiny_clip(tokenizer, **changes) -> CLIPModel:
    torch.manual_seed(0)
    return build_clip(Options(**(TINY | changes)), tokenizer).eval()


def drawn(count: int, size: int = 32) -> tuple[Tensor, list[str]]:
    """Monsters whose colours differ, so that a small network can tell them apart."""
    chosen = {monsters.roll(i).colour: i for i in range(100)}
    indices = list(chosen.values())[:count]
    images = torch.stack([torch.from_numpy(np.array(monsters.draw(i, size))).permute(2, 0, 1) for i in indices])
    return images, [f"a {monsters.roll(i).colour} pokemon" for i in indices]


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ----------------------------------------------------------------------------------------------------------------------


def test_ids_are_in_clips_order(tokenizer) -> None:
    vocabulary = tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))
    assert len(tokenizer) <= TINY["vocabulary_size"]
    assert tokenizer.convert_ids_to_tokens([0, 256])[1] == tokenizer.convert_ids_to_tokens(0) + "</w>"
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(tokenizer) - 1  # the highest: argmax finds it too
    assert tokenizer.model_max_length == 77


def test_common_words_are_one_token_and_case_does_not_matter(tokenizer) -> None:
    ids = tokenizer("a Blue  POKEMON,\twinking").input_ids
    tokens = ["<|startoftext|>", "a</w>", "blue</w>", "pokemon</w>", ",</w>", "winking</w>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(ids) == tokens


@pytest.mark.parametrize("text", ["übergroße 火 monster №42!", "can't won't 🦊", "x" * 30, ""])
def test_no_text_is_unknown(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_cuts_text_as_the_published_tokenizer_does(tokenizer) -> None:
    """The joins are learned within the pieces that `CLIPTokenizer` will look for them in, or they would lie idle."""
    text = "It's a GREEN  pokemon's 12 horns...ok"
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text.lower())]
    assert pieces == ["it", "'s", "a", "green", "pokemon", "'s", "1", "2", "horns", "...", "ok"]
    learned = train_tokenizer([text] * 50, 700)
    assert {"it</w>", "'s</w>", "green</w>", "horns</w>", "...</w>"} <= set(learned.get_vocab())


def test_long_captions_keep_their_end(tokenizer) -> None:
    ids = tokenize(tokenizer, ["pokemon " * 200, "a pokemon", ""], length=20)
    assert ids.shape == (3, 20)
    assert (ids == tokenizer.eos_token_id).any(dim=1).all()
    assert (ids[:, 0] == tokenizer.bos_token_id).all()


def test_a_vocabulary_without_room_for_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="--vocabulary_size 100"):
        train_tokenizer(CAPTIONS, 100)
    assert len(train_tokenizer(CAPTIONS, 514)) == 514  # bytes and marks alone


# ----------------------------------------------------------------------------------------------------------------------
# Loss and measure
# ----------------------------------------------------------------------------------------------------------------------


def test_loss_is_transformers_own(tokenizer) -> None:
    model = tiny_clip(tokenizer)
    images, captions = drawn(6)
    pixels, ids = images.float() / 127.5 - 1, tokenize(tokenizer, captions)
    theirs = model(input_ids=ids, pixel_values=pixels, return_loss=True)
    from_images, from_captions = embed_images(model, pixels), embed_captions(model, ids)
    torch.testing.assert_close(from_images, theirs.image_embeds)
    torch.testing.assert_close(from_captions, theirs.text_embeds)
    torch.testing.assert_close(clip_loss(from_images, from_captions, model.logit_scale), theirs.loss)


def test_loss_of_known_geometry() -> None:
    same = torch.ones(5, 4) / 2  # nothing to tell apart: as good as guessing
    assert clip_loss(same, same, torch.tensor(3.0)).item() == pytest.approx(math.log(5))
    apart = torch.eye(5)  # own similarity 1, others 0, at temperature 1/s: log(1 + 4 e^-s)
    assert clip_loss(apart, apart, torch.tensor(2.0).log()).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))


def test_summary_is_read_at_the_end_token_whatever_follows(tokenizer) -> None:
    model = tiny_clip(tokenizer)
    short, long = tokenize(tokenizer, ["a red pokemon"], length=12), tokenize(tokenizer, ["a red pokemon"])
    torch.testing.assert_close(embed_captions(model, short), embed_captions(model, long))
    states = model.text_model(long).last_hidden_state
    end = long[0].tolist().index(tokenizer.eos_token_id)
    torch.testing.assert_close(model.text_model(long).pooler_output, states[:, end])


def test_retrieval_counts_hits_and_lets_twins_pass(tokenizer, monkeypatch) -> None:
    vectors = {"a": [1.0, 0, 0], "b": [0, 1.0, 0], "c": [0, 0, 1.0]}
    captions = ["a", "a", "b", "c"]
    monkeypatch.setattr(clip_model, "tokenize", lambda _, texts: torch.tensor([vectors[t] for t in texts]))
    monkeypatch.setattr(clip_model, "embed_captions", lambda _, ids: ids)
    monkeypatch.setattr(clip_model, "embed_images", lambda _, pixels: pixels)
    # Three images look like their captions; the last looks like b, a little more so than b's own.
    pixels = torch.tensor([[1.0, 0, 0], [0.9, 0, 0], [0, 0.8, 0], [0, 0.9, 0.1]])
    assert retrieval(tiny_clip(tokenizer), tokenizer, pixels, captions) == (0.75, 0.75)


def test_overfits_a_handful(tokenizer) -> None:
    images, captions = drawn(8)
    ids, model = tokenize(tokenizer, captions, 12), tiny_clip(tokenizer).train()
    pixels = images.float() / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = clip_loss(embed_images(model, pixels), embed_captions(model, ids), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < math.log(8)
    assert retrieval(model.eval(), tokenizer, pixels, captions) == (1.0, 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The folder
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "clip"
    save_clip(tiny_clip(tokenizer), tokenizer, path)
    return path


def test_every_reader_opens_the_folder(folder, tokenizer) -> None:
    ours, same_tokenizer = load_clip(folder)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()
    theirs = CLIPModel.from_pretrained(folder)
    assert theirs.dtype == torch.float32  # half precision is for the disk
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name])

    prompts = ["a red pokemon with two horns", "", "nonsense zyx 42"]
    encoder = load_text_encoder(folder)
    states = CLIPTextModel.from_pretrained(folder)(tokenize(tokenizer, prompts)).last_hidden_state
    assert states.shape == (3, 77, 32)
    torch.testing.assert_close(encoder(prompts), states)


@pytest.mark.parametrize("reader", [AutoTokenizer, CLIPTokenizer])
@pytest.mark.parametrize("layout", ["tokenizer.json", "vocab.json"])
def test_both_layouts_of_the_tokenizer_agree(folder, tokenizer, tmp_path, reader, layout) -> None:
    for file in folder.iterdir():  # the older layout alone, the newer alone
        other = {"tokenizer.json": ("vocab.json", "merges.txt"), "vocab.json": ("tokenizer.json",)}[layout]
        if file.name not in other:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    again = reader.from_pretrained(tmp_path)
    assert again(CAPTIONS[:50]).input_ids == tokenizer(CAPTIONS[:50]).input_ids
    padded = again("a pokemon", padding="max_length", truncation=True, max_length=again.model_max_length)
    assert torch.equal(torch.tensor([padded.input_ids]), tokenize(tokenizer, ["a pokemon"]))


def test_diffusers_takes_it_as_a_pipelines_text_encoder(folder, tmp_path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    encoder = load_text_encoder(folder)
    small = {"block_out_channels": (32,), "norm_num_groups": 8}
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(
            **small, down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
        ),
        unet=UNet2DConditionModel(
            **small, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
            cross_attention_dim=32, layers_per_block=1, attention_head_dim=8,
        ),
        text_encoder=CLIPTextModel.from_pretrained(folder), tokenizer=CLIPTokenizer.from_pretrained(folder),
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "pipeline")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    theirs, empty = pipeline.encode_prompt("a Red pokemon", "cpu", 1, True)
    torch.testing.assert_close(theirs, encoder(["a Red pokemon"]))
    torch.testing.assert_close(empty, encoder([""]))


def test_preprocessing_says_what_the_pixels_are(folder) -> None:
    image = monsters.draw(5, 96)
    theirs = CLIPProcessor.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values[0]
    assert (theirs - to_pixels(image, 32)).abs().mean() < 0.01


def test_whole_model_of_default_shape_is_small(tokenizer) -> None:
    model = build_clip(Options(), train_tokenizer(CAPTIONS, Options().vocabulary_size))
    assert 2 * sum(p.numel() for p in model.parameters()) < 10e6  # bytes, two a weight


def test_a_text_encoder_alone_is_no_clip(folder, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="holds no whole CLIP"):
        load_clip(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Data
# ----------------------------------------------------------------------------------------------------------------------


def test_fresh_monsters_are_new_true_and_the_same_when_resumed(tokenizer) -> None:
    options = Options(**TINY, fresh_monsters=4, pool=12, workers=0, max_steps=6)
    cpu = torch.device("cpu")
    whole = FreshMonsters(options, tokenizer, 40, 0, 3, 32, cpu)
    batches = [whole.batch(step, 3) for step in range(6)]
    resumed = FreshMonsters(options, tokenizer, 40, 4, 3, 32, cpu)
    for step in (4, 5):
        for a, b in zip(batches[step], resumed.batch(step, 3), strict=True):
            assert torch.equal(a, b)

    # Every row is a training monster with its own caption, and old ones give way to new ones.
    first, last = FIRST_TRAINING_MONSTER, FIRST_TRAINING_MONSTER + 12 + 5 * 4
    known = {np.asarray(monsters.draw(i, 32)).tobytes(): i for i in range(first, last)}
    seen = []
    for images, ids in batches:
        for image, row in zip(images, ids, strict=True):
            index = known[image.permute(1, 2, 0).contiguous().numpy().tobytes()]
            assert torch.equal(row, tokenize(tokenizer, [monsters.caption(index)], 40)[0])
            seen.append(index)
    assert all(index >= last - 12 for index in seen[-3:])
    ring = {known[image.permute(1, 2, 0).contiguous().numpy().tobytes()] for image in whole.images}
    assert ring == set(range(last - 12, last))


def test_workers_draw_the_same_in_order(tokenizer) -> None:
    cpu = torch.device("cpu")
    pools = [
        FreshMonsters(Options(**TINY, fresh_monsters=4, pool=16, workers=w, max_steps=2), tokenizer, 40, 0, 4, 32, cpu)
        for w in (0, 2)
    ]
    for step in range(2):
        (images, ids), (same, as_well) = (pool.batch(step, 4) for pool in pools)
        assert torch.equal(images, same) and torch.equal(ids, as_well)


def test_training_monsters_are_no_others() -> None:
    assert HELD_OUT_MONSTERS.stop <= FIRST_TRAINING_MONSTER
    assert HELD_OUT_MONSTERS.start > 100_000  # data sets of monsters count from 0


def test_augmentation_moves_and_mirrors_without_inventing() -> None:
    image = torch.from_numpy(np.array(monsters.draw(3, 48))).permute(2, 0, 1)[None]
    plain = image_to_pixels(monsters.draw(3, 48))
    allowed = []
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            rows, columns = (torch.arange(48) + dy).clamp(0, 47), (torch.arange(48) + dx).clamp(0, 47)
            allowed.append(plain[:, rows][:, :, columns])
    mirrored = [one.flip(-1) for one in allowed]
    made = augment(image.expand(40, -1, -1, -1), True, torch.Generator().manual_seed(0))
    kinds = [(any(torch.equal(m, a) for a in allowed), any(torch.equal(m, a) for a in mirrored)) for m in made]
    assert all(plain_one or mirrored_one for plain_one, mirrored_one in kinds)
    assert any(plain_one for plain_one, _ in kinds) and any(mirrored_one for _, mirrored_one in kinds)
    unmirrored = augment(image.expand(20, -1, -1, -1), False, torch.Generator().manual_seed(0))
    assert all(any(torch.equal(m, a) for a in allowed) for m in unmirrored)


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def arguments(folder, *more: str, steps: int = 6) -> list[str]:
    shape = [text for name, value in TINY.items() for text in (f"--{name}", str(value))]
    run = f"--output_dir {folder} --max_steps {steps} --batch_size 8 --warmup_steps 2 --validation_images 8 --seed 3"
    every = "--validate_every 3 --checkpoint_every 3 --log_every 1 --device cpu --precision float32 --wandb off"
    return [*shape, *run.split(), *every.split(), *more]


@pytest.fixture(scope="module")
def images_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(24):
        monsters.draw(i, 40).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(monsters.caption(i))
    return folder


def test_stopped_run_ends_with_the_same_bits(tmp_path, images_folder, monkeypatch) -> None:
    """Fresh monsters and a folder together: stopped half way and resumed, the run writes the same files."""
    data = ["--dataset", "monsters", str(images_folder), "--workers", "0", "--fresh_monsters", "4", "--pool", "8"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train_clip.main(arguments(whole, *data))
    train_step = train_clip.Run.train_step

    def stopping(self: train_clip.Run, step: int) -> dict:
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_clip.Run, "train_step", stopping)
        train_clip.main(arguments(halves, *data))
    assert sorted(path.name for path in (halves / "checkpoints").glob("step_*"))[-1] == "step_00000004.pt"
    train_clip.main(["--output_dir", str(halves), "--resume"])

    for name in ("clip/model.safetensors", "clip/tokenizer.json", "clip/config.json", "metrics.csv", "scores.json"):
        assert filecmp.cmp(whole / name, halves / name, shallow=False), name
    rows = list(csv.DictReader(open(whole / "metrics.csv")))
    assert [row["step"] for row in rows if row["loss"]] == list("123456")
    assert [row["step"] for row in rows if row["image_to_text_r1"]] == list("36")
    for name in ("config.json", "loss.png", "retrieval.png", "scores.json"):
        assert (whole / name).stat().st_size > 0
    assert set(json.loads((whole / "scores.json").read_text())["held_out"]) == {"monsters", str(images_folder)}
    state = torch.load(whole / "checkpoints" / "step_00000006.pt", weights_only=True)
    saved, _ = load_clip(whole / "clip")
    for name, tensor in saved.state_dict().items():  # the average is what is saved
        torch.testing.assert_close(tensor, state["ema"][name], rtol=1e-3, atol=1e-5)
    assert any(not torch.equal(state["ema"][name], state["model"][name]) for name in state["model"])


def test_a_validation_that_was_stopped_is_left_to_the_next_run_and_logged_once(
    tmp_path, images_folder, monkeypatch
) -> None:
    path, one = tmp_path / "run", torch.ones(())
    argv = arguments(path, "--dataset", str(images_folder), steps=1)
    monkeypatch.setattr(train_clip.RunFolder, "plot", lambda *_, **how: None)  # takes half a second
    with folder_at(path) as folder:
        run = train_clip.Run(train_clip.parse_options(Options, argv), folder)
        run.reporter.record(learning_rate=0.1, loss=one, gradient_norm=one)
        run.reporter.stop.asked = True  # after the step
        run.after_step()
        assert run.reporter.state()["undone"] == ["checkpoint", "validation"] and not (path / "scores.json").exists()
    monkeypatch.setattr(train_clip.Run, "save", lambda *_, **how: None)  # killed before its checkpoint
    for _ in range(2):
        with folder_at(path, resume=True) as folder:
            options = train_clip.parse_options(Options, ["--resume", "--output_dir", str(path)])
            train_clip.Run(options, folder).after_step()
            assert [row["step"] for row in folder.metrics() if row["image_to_text_r1"]] == ["1"]


def test_rates_mirror_held_out_images_and_the_judged_model(tmp_path, images_folder, monkeypatch) -> None:
    rates, mirrors, judged, step, r1 = [], [], [], train_clip.Run.train_step, iter([0.5, 0.25])
    monkeypatch.setattr(train_clip.Run, "train_step", lambda self, i: (rates.append(rates_of(self)), step(self, i))[1])
    monkeypatch.setattr(
        train_clip, "augment", lambda images, mirror, g: (mirrors.append(mirror), augment(images, mirror, g))[1]
    )
    monkeypatch.setattr(train_clip, "retrieval", lambda model, *_: (judged.append(model), (next(r1), 0.5))[1])
    argv = arguments(tmp_path / "run", "--dataset", str(images_folder), "--mirror", "no")
    with folder_at(tmp_path / "run") as folder:
        run = train_clip.Run(train_clip.parse_options(Options, argv), folder)
        run.train()
    assert rates == [[train_clip.learning_rate_at(i, 1e-3, 2, 6, floor=0.01)] * 2 for i in range(6)]
    assert mirrors == [False] * 6 and all(model is run.ema.module for model in judged)
    assert torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)["step"] == 3
    ((held_out, _),) = run.sets.held_out.values()
    ((training, _),) = run.sets.training.values()
    rows = {row.numpy().tobytes() for row in (held_out * 127.5 + 127.5).round().to(torch.uint8)}
    assert len(rows) == 8 and not rows & {row.numpy().tobytes() for row in training}


def rates_of(run: train_clip.Run) -> list[float]:
    return [group["lr"] for group in run.optimizer.param_groups]


def test_the_temperature_stays_within_the_papers_bound(tmp_path, images_folder) -> None:
    run = make_run(tmp_path, images_folder)
    with torch.no_grad():
        run.model.logit_scale.fill_(9.0)
    run.train_step(0)
    assert run.model.logit_scale.item() == pytest.approx(math.log(100))


def make_run(tmp_path, images_folder, *more: str) -> train_clip.Run:
    argv = arguments(tmp_path / "run", "--dataset", str(images_folder), *more)
    return train_clip.Run(train_clip.parse_options(Options, argv), folder_at(tmp_path / "run"))


def test_pretrained_goes_on_from_a_folder(tmp_path, images_folder, folder) -> None:
    data = ("--dataset", str(images_folder), "--pretrained", str(folder), "--learning_rate", "1e-9")
    train_clip.main(arguments(tmp_path / "run", *data, "--ema_decay", "0", steps=1))
    (before, tokenizer), (after, same) = load_clip(folder), load_clip(tmp_path / "run" / "clip")
    assert tokenizer.get_vocab() == same.get_vocab()
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--image_size", "50"), "--image_size 50"),
        (("--text_width", "40"), "--text_width 40"),
        (("--pool", "30"), "--pool 30"),
        (("--dataset", "monsters:10"), "--validation_images 8"),
        (("--dataset", "/no/such/folder"), "no such folder"),
        (("--pretrained", "/no/such/clip"), "clip"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, more, words) -> None:
    with pytest.raises((ValueError, OSError), match=words):
        train_clip.main(arguments(tmp_path / "run", *more))
