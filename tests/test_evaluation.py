"""Evaluation: it must be able to say no."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate_stable_diffusion as script
import monsters
from evaluation import obedience
from tests.conftest import ROOT
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def judge() -> obedience.Judge:
    return obedience.Judge.load()


@pytest.fixture(scope="module")
def asked() -> list[obedience.Unseen]:
    return obedience.unseen_monsters(24)


def test_colours_counts_what_was_asked_for() -> None:
    """Drawn monsters obey their own colour and not another one; a blank sheet and a dark one obey nothing."""
    indices = [i for i in range(40) if monsters.roll(i).colour in ("red", "blue", "green")][:6]
    drawn = [monsters.draw(i, 128) for i in indices]
    colours = [monsters.roll(i).colour for i in indices]
    report = obedience.colours(drawn, colours)
    assert report == {"on_white": 1.0, "on_white_in_the_colour": 1.0, "wrong": []}
    others = ["yellow"] * 6
    report = obedience.colours(drawn, others)
    assert report["on_white"] == 1.0 and report["on_white_in_the_colour"] == 0.0 and len(report["wrong"]) == 6
    blank = [Image.new("RGB", (128, 128), colour) for colour in ("white", "black")]
    assert obedience.colours(blank, ["red", "black"])["on_white_in_the_colour"] == 0.0


def test_r_precision_knows_its_captions_from_others(judge: obedience.Judge, asked: list[obedience.Unseen]) -> None:
    """Real drawings are all but always found, whatever their size; in another order, none or next to none is."""
    captions = [monster.caption for monster in asked]
    for size in (128, 256):
        drawn = [monsters.draw(monster.index, size) for monster in asked]
        assert judge.r_precision(drawn, captions) >= 0.95
        assert judge.r_precision(drawn[1:] + drawn[:1], captions) <= 0.1
    blank = [Image.new("RGB", (128, 128), "white")] * len(asked)
    assert judge.r_precision(blank, captions) <= 1 / len(asked) + 1e-9  # one caption is the nearest of all of them
    assert judge.r_precision(drawn[:2], [captions[0]] * 2) == 1.0  # captions that are equal word for word


def test_pixels_reach_the_clip_as_its_preprocessor_would_bring_them(
    judge: obedience.Judge, asked: list[obedience.Unseen], tmp_path: Path
) -> None:
    """A published CLIP has another mean and std; its folder says which."""
    shutil.copytree(obedience.SHIPPED_CLIP, tmp_path / "clip")
    file = tmp_path / "clip" / "preprocessor_config.json"
    published = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    file.write_text(json.dumps(json.loads(file.read_text()) | published))
    other = obedience.Judge.load(tmp_path / "clip")
    seen: list[torch.Tensor] = []
    for one in (judge, other):
        one.clip.vision_model.embeddings.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
        one.r_precision([monsters.draw(asked[0].index, 128)], [asked[0].caption])
    torch.testing.assert_close(seen[1], ((seen[0] + 1) / 2 - other.mean) / other.std)


def test_the_controls_are_the_real_images_and_other_captions(
    judge: obedience.Judge, asked: list[obedience.Unseen]
) -> None:
    drawn = [monsters.draw(monster.index, 128) for monster in asked]
    report = obedience.measure_monsters(drawn, asked, judge)
    assert report["r_precision"] >= 0.95 and report["r_precision_of_real_images"] >= 0.95
    assert report["r_precision_of_shuffled_images"] <= 0.1 and report["on_white_in_the_colour"] == 1.0
    blank = [Image.new("RGB", (128, 128), "white")] * len(asked)
    report = obedience.measure_monsters(blank, asked, judge)
    assert report["r_precision"] < 0.1 and report["r_precision_of_real_images"] >= 0.95


def test_images_are_judged_in_the_order_of_their_captions(tmp_path: Path) -> None:
    """What is asked for in parts is put together in order, each part with seeds of its own."""
    calls = []

    def draw_them(prompts: list[str], seed: int) -> list[Image.Image]:
        calls.append((len(prompts), seed))
        index = {monster.caption: monster.index for monster in obedience.unseen_monsters(10)}
        return [monsters.draw(index[prompt], 128) for prompt in prompts]

    sentence = obedience.judge_monsters(draw_them, 10, tmp_path)
    assert calls == [(4, 0), (4, 4), (2, 8)]
    report = json.loads((tmp_path / "unseen.json").read_text())
    assert report["r_precision"] == 1.0 and report["on_white_in_the_colour"] == 1.0
    assert "first for 100%" in sentence and "100% are a monster on white" in sentence
    with Image.open(tmp_path / "samples" / "unseen.png") as sheet:
        assert sheet.width >= 8 * 128


def test_a_planted_copy_is_nearest_to_its_original_mirrored_or_not() -> None:
    known = script.thumbnails([monsters.draw(i, 64) for i in range(30)])
    queries = torch.stack([known[7], known[12].flip(-1), script.thumbnails([monsters.draw(900, 64)])[0]])
    distance, which, mirrored = script.nearest(queries, known)
    assert which[:2].tolist() == [7, 12] and mirrored[:2].tolist() == [False, True]
    assert distance[:2].max() < 1e-3 < 0.1 < distance[2]
    others, which, _ = script.nearest(known, known, but=torch.arange(30))
    assert others.min() > 0.1 and (which != torch.arange(30)).all()


@pytest.mark.parametrize("of_a_folder", [False, True])
def test_planted_copies_are_counted(of_a_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three training images, a little blurred and one of them mirrored, among eight samples: three copies."""
    if of_a_folder:
        (tmp_path / "images").mkdir()
        for i in range(24):
            monsters.draw(i, 64).save(tmp_path / "images" / f"{i:02d}.png")
            (tmp_path / "images" / f"{i:02d}.txt").write_text(monsters.caption(i))
    copies = [monsters.draw(i, 32).resize((64, 64)) for i in (3, 8, 20)]
    copies[1] = copies[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    fresh = [monsters.draw(800_000 + i, 64) for i in range(5)]
    monkeypatch.setattr(script, "sample_all", lambda *_: copies + fresh)
    tiny_model().save_pretrained(tmp_path / "model")
    source = str(tmp_path / "images") if of_a_folder else "monsters:24"
    argv = [str(tmp_path / "model"), "--dataset", source, "--num_samples", "8", "--resolution", "64"]
    script.main([*argv, "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["share_of_copies"] == 3 / 8


def test_prompts_are_of_unseen_monsters_and_name_their_colour(asked: list[obedience.Unseen]) -> None:
    assert len(asked) == 24 and all(monster.colour in monster.caption for monster in asked)
    assert all(monster.index >= 900_000 and monster.caption == monsters.caption(monster.index) for monster in asked)
    assert all(monster.colour == monsters.roll(monster.index).colour for monster in asked)


def test_a_report_is_written(tmp_path, capsys: pytest.CaptureFixture) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    script.main([*argv, "--steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["obedience"]["r_precision_of_real_images"] == 1.0
    assert report["samples"] == 2 and 0 <= report["obedience"]["on_white_in_the_colour"] <= 1
    assert report["vae_ceiling"]["psnr"] > 0 and report["nearest_training_image"]["mean"] > 0
    assert (tmp_path / "report" / "samples.png").is_file() and (tmp_path / "report" / "nearest.png").is_file()


def test_captions_of_a_folder_are_judged_with_its_own_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, monster in enumerate(obedience.unseen_monsters(6)):
        monsters.draw(monster.index, 64).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(monster.caption)
    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", str(folder), "--num_samples", "6", "--resolution", "64"]
    script.main([*argv, "--steps", "1", "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert set(report["obedience"]) == {
        *("r_precision", "r_precision_of_real_images", "r_precision_of_shuffled_images")
    }
    assert report["obedience"]["r_precision_of_real_images"] == 1.0


def test_the_documented_command_takes_the_model_first(tmp_path: Path) -> None:
    command = [sys.executable, "evaluate_stable_diffusion.py", str(tmp_path / "nothing"), "--output_dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.splitlines()[-1].startswith("error: the model")
