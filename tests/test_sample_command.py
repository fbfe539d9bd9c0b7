"""The command line of `sample_stable_diffusion.py`: prompts in, PNGs out, one sentence for what cannot be done."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from images import read_parameters
from sample_stable_diffusion import main

ROOT = Path(__file__).parent.parent
SMALL = ["--steps", "2", "--height", "64", "--width", "48", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)


def run(folder: str, *arguments: str) -> None:
    main([*arguments, "--model", folder, *SMALL])


def test_one_prompt_is_one_file(folder, capsys):
    run(
        folder, "a red fox", "--output", "new/fox.png", "--seeds", "7", "--negative_prompt", "grey", "--sampler", "ddim"
    )
    assert capsys.readouterr().out == f"{Path('new/fox.png')}\n"
    read = read_parameters("new/fox.png")
    told = {name: read[name] for name in ("prompt", "negative_prompt", "Seed", "Steps", "Sampler", "Size", "Model")}
    assert told == {
        "prompt": "a red fox", "negative_prompt": "grey", "Seed": "7", "Steps": "2", "Sampler": "ddim",
        "Size": "48x64", "Model": "tiny",
    }  # fmt: skip


def test_every_prompt_meets_every_seed(folder):
    run(folder, "a/b: c", "d", "--seeds", "1", "2", "--output", "sheet", "--batch_size", "3")
    made = sorted(Path("sheet").iterdir())
    assert [path.name for path in made] == [
        "000_a_b_c_seed1.png", "001_a_b_c_seed2.png", "002_d_seed1.png", "003_d_seed2.png"
    ]  # fmt: skip
    read = [read_parameters(path) for path in made]
    assert [(r["prompt"], r["Seed"]) for r in read] == [("a/b: c", "1"), ("a/b: c", "2"), ("d", "1"), ("d", "2")]


def test_several_pictures_number_the_file(folder):
    run(folder, "a", "--seeds", "1", "2", "--output", "fox.png")
    assert sorted(path.name for path in Path().glob("*.png")) == ["fox_000.png", "fox_001.png"]


def test_inpainting_takes_its_size_from_the_picture(folder):
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(noise).save("start.png")
    mask = Image.new("L", (56, 40))
    mask.paste(255, (0, 0, 20, 40))
    mask.save("mask.png")
    main(["a", "--model", folder, "--device", "cpu", "--steps", "2", "--init_image", "start.png", "--mask", "mask.png"])
    with Image.open("sample.png") as made:
        assert np.array_equal(np.asarray(made)[:, 20:], noise[:, 20:])
        assert not np.array_equal(np.asarray(made)[:, :20], noise[:, :20])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sampler", "plms"], r"plms.*dpm\+\+2m"),
        (["--steps", "0"], "steps is 0"),
        (["--height", "65"], "height.*divisible by 8"),
        (["--guidance_scale", "nan"], "guidance_scale"),
        (["--output", "fox.jpg"], "fox.jpg.*PNG"),
        (["--batch_size", "0"], "--batch_size"),
        (["--device", "tpu"], "--device tpu"),
        (["--init_image", "none.png"], "--init_image none.png: there is no such file"),
        (["--model", "none"], "none"),
    ],
)
def test_bad_options_are_one_sentence(folder, arguments, message):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        main(["a", "--model", folder, *SMALL, *arguments])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_picture(folder):
    Path("words.png").write_text("hello")
    with pytest.raises(ValueError, match=r"--init_image words.png: not a picture"):
        run(folder, "a", "--init_image", "words.png")


def test_the_program_ends_in_a_sentence_not_a_traceback(tmp_path):
    command = [sys.executable, str(ROOT / "sample_stable_diffusion.py"), "a fox", "--model", "nowhere/model"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "nowhere/model" in ended.stderr
    assert "Traceback" not in ended.stderr
