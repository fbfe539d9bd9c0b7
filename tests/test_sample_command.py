"""The command line of `sample_stable_diffusion.py`: prompts in, PNG files out, one sentence for what cannot be done."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sample_stable_diffusion
import samplers
import sampling.packed
from images import read_parameters
from sample_stable_diffusion import SHIPPED_MODEL, main, parse
from stable_diffusion_model import StableDiffusion
from tests.tiny import tiny_model
from training.script import UserError

SCRIPT = Path(sample_stable_diffusion.__file__)
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


@pytest.fixture
def no_model(monkeypatch) -> None:
    """Loading a model fails the test."""

    def from_pretrained(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(StableDiffusion, "from_pretrained", from_pretrained)


def run(folder: str, *arguments: str) -> None:
    main([*arguments, "--model", folder, *SMALL])


def noise(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_mask(path: str, width: int, height: int, white: int) -> None:
    """White from the left edge to column `white`."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, white, height))
    mask.save(path)


# ----------------------------------------------------------------------------------------------------------------------
# The program itself
# ----------------------------------------------------------------------------------------------------------------------


def test_help_is_there_at_once():
    """Nothing heavy is imported before the options are read: no torch, so a tenth of a second instead of four."""
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    start = time.perf_counter()
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.perf_counter() - start < 2
    imported = {line.rsplit("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert not imported & {"torch", "torchvision", "transformers", "numpy"}
    assert shown.stdout.startswith("usage: sample_stable_diffusion.py PROMPT")


def test_it_runs_from_any_directory(folder, tmp_path):
    """And into a file or pipe: the name of the image on standard output, plain lines elsewhere."""
    command = [sys.executable, str(SCRIPT), "a fox", "--model", folder, *SMALL]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ended.stdout == "sample.png\n"
    assert ended.stderr == "drawing 1 image of 48×64 with the model tiny on cpu: 2 steps, guidance 7.5\n"
    assert read_parameters(tmp_path / "sample.png")["prompt"] == "a fox"


def test_it_ends_in_a_sentence_not_a_traceback(tmp_path):
    command = [sys.executable, str(SCRIPT), "a fox", "--model", "nowhere/model"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert "nowhere/model" in ended.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Options
# ----------------------------------------------------------------------------------------------------------------------


def test_help_spells_each_option_once(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    text = capsys.readouterr().out
    groups = ("what to draw:", "how to draw it:", "start from an image:", "output:", "machine:")
    assert [text.index(group) for group in groups] == sorted(text.index(group) for group in groups)
    spelled = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(spelled) == len(set(spelled)) == len(vars(parse(["x"]))) - 1  # all but the prompts
    assert "None" not in text


def test_samplers_and_their_options_are_those_of_the_library():
    assert sample_stable_diffusion.SAMPLERS == tuple(samplers.SAMPLERS)
    assert sample_stable_diffusion.KARRAS_SAMPLERS == tuple(samplers.KARRAS_SAMPLERS)


def test_a_lora_may_count_negatively():
    assert parse(["x", "--lora", "a", "--lora_scale", "-0.5"]).lora_scale == [-0.5]


def test_guidance_suits_the_model_that_ships(monkeypatch):
    assert parse(["x"]).guidance_scale == 5
    assert parse(["x", "--model", str(SHIPPED_MODEL)]).guidance_scale == 5
    monkeypatch.chdir(SHIPPED_MODEL.parent)
    assert parse(["x", "--model", "model"]).guidance_scale == 5
    assert parse(["x", "--model", "stable-diffusion-v1-5/stable-diffusion-v1-5"]).guidance_scale == 7.5
    assert parse(["x", "--guidance_scale", "2"]).guidance_scale == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "PROMPT"),
        (["a", "--stesp", "3"], "--stesp"),
        (["a", "--sampler", "plms"], r"plms.*dpm\+\+2m"),
        (["a", "--steps", "0"], "--steps: '0' is not a whole number from 1 to 1000"),
        (["a", "--steps", "2.5"], "--steps"),
        (["a", "--seeds", "1", "-1"], "--seeds: '-1'"),
        (["a", "--seeds", "9223372036854775808"], "--seeds"),
        (["a", "--height", "65"], "--height: 65 is not divisible by 8, such as 64"),
        (["a", "--width", "0"], "--width"),
        (["a", "--guidance_scale", "nan"], "--guidance_scale"),
        (["a", "--guidance_rescale", "1.1"], "--guidance_rescale"),
        (["a", "--eta", "0.5"], "--eta.*ddim"),
        (["a", "--eta", "2", "--sampler", "ddim"], "--eta"),
        (["a", "--karras", "--sampler", "ddim"], "--karras"),
        (["a", "--negative_prompt", "b", "--guidance_scale", "1"], "--negative_prompt"),
        (["a", "--batch_size", "0"], "--batch_size"),
        (["a", "--dtype", "int8"], "--dtype.*float32"),
        (["a", "--mask", "mask.png"], "--mask needs --init_image"),
        (["a", "--strength", "0.5"], "--strength needs --init_image"),
        (["a", "--init_image", "a.png", "--strength", "1.1"], "--strength"),
        (["a", "--init_image", "a.png", "--strength", "0.04"], "--strength 0.04 of 20 steps leaves no step"),
        (["a", "--init_image", "none.png"], "--init_image none.png: there is no such file"),
        (["a", "--output", "fox.jpg"], "fox.jpg.*PNG"),
        (["a", "--device", "tpu"], "--device tpu"),
    ],
)
def test_bad_options_are_one_sentence_before_a_model_is_loaded(no_model, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main(arguments)
    assert "\n" not in str(caught.value)
    assert not list(Path().glob("*.png"))


def test_what_only_the_model_knows(folder, monkeypatch):
    with pytest.raises(OSError, match="none/model"):
        main(["a", "--model", "none/model"])
    short = StableDiffusion.from_pretrained(folder, device="cpu")
    short.schedule.num_timesteps = 100
    monkeypatch.setattr(StableDiffusion, "from_pretrained", lambda *_: short)
    with pytest.raises(UserError, match="--steps 101: this model has 100 timesteps"):
        main(["a", "--model", folder, "--device", "cpu", "--steps", "101"])


def test_an_overflow_is_a_sentence_and_a_bug_is_not(folder, monkeypatch):
    def overflow(*_: object, **__: object) -> None:
        raise FloatingPointError("The latents overflowed.")

    def bug(*_: object, **__: object) -> None:
        raise ValueError("zip() argument 2 is shorter than argument 1")

    monkeypatch.setattr(StableDiffusion, "sample", overflow)
    with pytest.raises(UserError, match="overflowed"):
        run(folder, "a")
    monkeypatch.setattr(StableDiffusion, "sample", bug)
    with pytest.raises(ValueError, match="zip") as caught:
        run(folder, "a")
    assert not isinstance(caught.value, UserError)


# ----------------------------------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------------------------------


def test_one_prompt_is_one_file(folder, capsys):
    run(
        folder, "a red fox", "--output", "new/fox.png", "--seeds", "7", "--negative_prompt", "grey", "--sampler", "ddim"
    )
    assert capsys.readouterr().out == f"{Path('new/fox.png')}\n"
    read = read_parameters("new/fox.png")
    expected = {
        "prompt": "a red fox", "negative_prompt": "grey", "Seed": "7", "Steps": "2", "Sampler": "ddim",
        "Size": "48x64", "Model": "tiny",
    }  # fmt: skip
    assert {name: read[name] for name in expected} == expected


def test_every_prompt_meets_every_seed(folder, capsys):
    run(folder, "a/b: c", "d", "--seeds", "1", "2", "--output", "sheet", "--batch_size", "3")
    made = sorted(Path("sheet").iterdir())
    assert [path.name for path in made] == [
        "000_a_b_c_seed1.png", "001_a_b_c_seed2.png", "002_d_seed1.png", "003_d_seed2.png"
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [str(path) for path in made]
    read = [read_parameters(path) for path in made]
    assert [(r["prompt"], r["Seed"]) for r in read] == [("a/b: c", "1"), ("a/b: c", "2"), ("d", "1"), ("d", "2")]


def test_a_cpu_orders_the_weights_once_for_all_images(folder, monkeypatch):
    monkeypatch.setattr("sampling.packed.FROM_CALLS", 2)
    ordered, pack = [], sampling.packed.pack
    monkeypatch.setattr("sampling.packed.pack", lambda unet: ordered.append(pack(unet)))
    main(["a fox", "--model", folder, *SMALL, "--seeds", "1", "2", "3"])
    assert len(ordered) == 1
    main(["a fox", "--model", folder, *SMALL, "--seeds", "2", "--output", "alone.png"])
    assert Path("alone.png").read_bytes() == Path("sample_001.png").read_bytes()


def test_several_images_number_the_file(folder):
    run(folder, "a", "--seeds", "1", "2", "--output", "fox.png")
    assert sorted(path.name for path in Path().glob("*.png")) == ["fox_000.png", "fox_001.png"]


def test_a_slash_makes_a_folder_of_any_name(folder):
    run(folder, "a", "--output", "version.2/")
    assert Path("version.2/000_a_seed0.png").is_file()


def test_output_that_cannot_be_written_is_refused_before_a_model_is_loaded(no_model, monkeypatch):
    Path("file").touch()
    with pytest.raises(UserError, match=r"--output.*folder file \(there is a file of this name\)"):
        main(["a", "--output", "file/fox.png"])
    Path("fox_000.png").mkdir()
    with pytest.raises(UserError, match=r"--output: fox_000.png exists"):
        main(["a", "b", "--output", "fox.png"])

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(sample_stable_diffusion.tempfile, "TemporaryFile", denied)  # the tests may run as root
    with pytest.raises(UserError, match=r"--output.*folder new \(Permission denied\)"):
        main(["a", "--output", "new/fox.png"])


def test_ctrl_c_keeps_what_is_written(folder, monkeypatch, capsys):
    sample, calls = StableDiffusion.sample, []

    def interrupted(*arguments: object, **options: object) -> list[Image.Image]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(StableDiffusion, "sample", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(folder, "a", "--seeds", "0", "1", "2", "3", "--output", "many/")
    assert ended.value.code == 130
    out, err = capsys.readouterr()
    assert [Path(line).is_file() for line in out.splitlines()] == [True, True]  # on a CPU, one after the other
    assert err.splitlines()[-1] == "stopped: 2 of 4 images are written."


def test_a_long_prompt_is_a_plain_warning_said_once(folder, capsys):
    run(folder, "a" * 75 + " xyz", "--seeds", "0", "1")
    warned = [line for line in capsys.readouterr().err.splitlines() if "warn" in line.lower()]
    assert len(warned) == 1
    assert warned[0].startswith("warning: The prompt is longer than 75 tokens") and "x y z" in warned[0]


# ----------------------------------------------------------------------------------------------------------------------
# Images to start from
# ----------------------------------------------------------------------------------------------------------------------


def test_inpainting_takes_its_size_from_the_image(folder, capsys):
    pixels = noise(56, 40)
    Image.fromarray(pixels).save("start.png")
    save_mask("mask.png", 56, 40, white=20)
    main(["a", "--model", folder, "--device", "cpu", "--steps", "2", "--init_image", "start.png", "--mask", "mask.png"])
    with Image.open("sample.png") as made:
        assert np.array_equal(np.asarray(made)[:, 20:], pixels[:, 20:])
        assert not np.array_equal(np.asarray(made)[:, :20], pixels[:, :20])
    assert "note" not in capsys.readouterr().err


def test_a_size_that_is_no_multiple_of_8_is_cropped_not_scaled(folder, capsys):
    """So what is not drawn anew keeps its pixels: 61 × 47 loses 2 + 3 columns and 3 + 4 rows."""
    pixels = noise(61, 47)
    Image.fromarray(pixels).save("start.png")
    save_mask("mask.png", 61, 47, white=30)
    main(["a", "--model", folder, "--device", "cpu", "--steps", "2", "--init_image", "start.png", "--mask", "mask.png"])
    with Image.open("sample.png") as made:
        assert made.size == (56, 40)
        assert np.array_equal(np.asarray(made)[:, 28:], pixels[4:44, 30:58])
    assert "note: --init_image is 61×47; it is fitted to 56×40." in capsys.readouterr().err


@pytest.mark.parametrize("size", [(1, 1), (200, 3), (640, 480)])
@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_an_image_of_any_size_and_mode_is_fitted_to_the_size_asked_for(folder, size, mode):
    Image.new(mode, size).save("start.png")
    save_mask("mask.png", 30, 20, white=15)
    run(folder, "a", "--init_image", "start.png", "--mask", "mask.png")
    with Image.open("sample.png") as made:
        assert made.size == (48, 64)
        kept = np.asarray(made)[:, 26:]  # the mask's edge lies at column 24
        assert (kept == (255 if mode == "RGBA" else 0)).all()  # transparent is white


def test_an_image_smaller_than_a_latent_is_drawn_at_8_by_8(folder):
    Image.new("RGB", (5, 3)).save("start.png")
    main(["a", "--model", folder, "--device", "cpu", "--steps", "2", "--init_image", "start.png"])
    assert read_parameters("sample.png")["Size"] == "8x8"


def test_a_turned_photo_is_measured_upright(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    Image.fromarray(noise(64, 40)).save("start.jpg", exif=exif)
    main(["a", "--model", folder, "--device", "cpu", "--steps", "2", "--init_image", "start.jpg"])
    assert read_parameters("sample.png")["Size"] == "40x64"


def test_a_file_that_is_no_image(no_model):
    Path("words.png").write_text("hello")
    with pytest.raises(UserError, match=r"--init_image words.png: not an image"):
        main(["a", "--init_image", "words.png"])
    Image.new("RGB", (300, 300)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"--init_image cut.png: not an image"):
        main(["a", "--init_image", "cut.png"])
