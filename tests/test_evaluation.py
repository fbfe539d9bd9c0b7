"""Evaluation: it must be able to say no."""

import pytest
import torch
from PIL import Image

import evaluate_stable_diffusion as script
import monsters


def test_obedience_counts_what_was_asked_for() -> None:
    """Drawn monsters obey their own colour and not another one; a blank sheet and a dark one obey nothing."""
    indices = [i for i in range(40) if monsters.roll(i).colour in ("red", "blue", "green")][:6]
    drawn = [monsters.draw(i, 128) for i in indices]
    colours = [monsters.roll(i).colour for i in indices]
    report = script.obedience(drawn, colours)
    assert report == {"on_white": 1.0, "on_white_in_the_colour": 1.0, "wrong": []}
    others = ["yellow"] * 6
    report = script.obedience(drawn, others)
    assert report["on_white"] == 1.0 and report["on_white_in_the_colour"] == 0.0 and len(report["wrong"]) == 6
    blank = [Image.new("RGB", (128, 128), colour) for colour in ("white", "black")]
    assert script.obedience(blank, ["red", "black"])["on_white_in_the_colour"] == 0.0


def test_a_planted_copy_is_nearest_to_its_original_mirrored_or_not() -> None:
    known = script.thumbnails([monsters.draw(i, 64) for i in range(30)])
    queries = torch.stack([known[7], known[12].flip(-1), script.thumbnails([monsters.draw(900, 64)])[0]])
    distance, which, mirrored = script.nearest(queries, known)
    assert which[:2].tolist() == [7, 12] and mirrored[:2].tolist() == [False, True]
    assert distance[:2].max() < 1e-3 < 0.1 < distance[2]


def test_prompts_are_of_unseen_monsters_and_name_their_colour() -> None:
    options = script.Options(num_samples=20)
    prompts, colours = script.unseen_prompts(options, script.TrainingImages("monsters:10"))
    assert len(prompts) == len(colours) == 20
    assert all(colour in prompt for prompt, colour in zip(prompts, colours, strict=True))
    seen = {monsters.caption(i) for i in range(10)}
    assert not seen & set(prompts)


def test_a_report_is_written(tmp_path, capsys: pytest.CaptureFixture) -> None:
    from tests.tiny import tiny_model

    tiny_model().save_pretrained(tmp_path / "model")
    argv = [str(tmp_path / "model"), "--dataset", "monsters:4", "--num_samples", "2", "--resolution", "64"]
    script.main([*argv, "--steps", "2", "--device", "cpu", "--output_dir", str(tmp_path / "report")])
    import json

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["samples"] == 2 and 0 <= report["obedience"]["on_white_in_the_colour"] <= 1
    assert report["vae_ceiling"]["psnr"] > 0 and report["nearest_training_image"]["mean"] > 0
    assert (tmp_path / "report" / "samples.png").is_file() and (tmp_path / "report" / "nearest.png").is_file()
