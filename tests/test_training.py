"""The training script: what it learns, what it promises about resuming, and how it fails."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
import torch

import train_stable_diffusion as script
from diffusion_model import NoiseSchedule
from pokemon_dataset import CaptionedLatents
from samplers import timestep_grid
from stable_diffusion_model import LATENTS_MEAN, StableDiffusion
from tests.conftest import ROOT
from tests.tiny import tiny_model, tiny_text_encoder, tiny_unet, tiny_vae
from train_stable_diffusion import Batch, Options, diffusion_loss, split_pictures
from training import EMA, Processes, StopRequest, batch_indices, generator_for, learning_rate_at, parse_options

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The prompt is longer")  # the tiny tokenizer spells words by letter


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny VAE and a tiny CLIP, as the options take them."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tiny_vae().save(folder / "vae_model.pth")
    tiny_text_encoder().save(folder / "clip", folder / "clip", torch.float32)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(parts: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--preset", "monsters", "--dataset", "monsters:8", "--resolution", "64", "--wandb", "off", "--device", "cpu"),
        *("--vae", str(parts / "vae_model.pth"), "--text_encoder", str(parts / "clip"), "--output_dir", str(output)),
        *("--block_out_channels", "16", "32", "--attention_levels", "0", "1", "--norm_num_groups", "8"),
        *("--num_attention_heads", "2", "--batch_size", "4", "--max_steps", "6", "--warmup_steps", "2"),
        *("--checkpoint_every", "3", "--validate_every", "3", "--preview_every", "6", "--preview_steps", "2"),
        *("--log_every", "2", "--validation_share", "0.25", "--precision", "float32", "--preview_prompts", "a fox"),
        *more,
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# It learns what it is told
# ----------------------------------------------------------------------------------------------------------------------


def test_two_pictures_come_back_from_their_own_captions() -> None:
    """Overfitted to two captioned latents, guided sampling returns each from its caption, far from the other."""
    torch.manual_seed(1)
    model = tiny_model()
    model.unet = tiny_unet(randomise=False)
    captions = ["a red fox", "the blue sea"]
    latents = torch.randn(2, 4, 8, 8)
    context, empty = model.encode_prompts(captions), model.encode_prompts([""])
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=3e-3)
    ema = EMA(model.unet, 0.99)
    model.unet.train()
    steps = 500
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 3e-3, 20, steps)
        which = torch.arange(8) % 2
        shown = torch.where((torch.rand(8) < 0.1)[:, None, None], empty, context[which])
        batch = Batch(latents[which], torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), shown)
        diffusion_loss(model.unet, model.schedule, batch, gamma=5.0).backward()
        torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.unet, step)
    model.unet = ema.module
    seen: list[torch.Tensor] = []
    model.sample(
        captions, steps=20, guidance_scale=1.5, height=64, width=64, progress=False,
        callback=lambda step, t, x, x0: seen.append(x0),
    )  # fmt: skip

    def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
        return (10 * torch.log10((latents.max() - latents.min()) ** 2 / (a - b).square().mean())).item()

    for k in (0, 1):
        assert psnr(seen[-1][k], latents[k]) >= 20
        assert psnr(seen[-1][k], latents[1 - k]) < 16


def test_loss_is_the_weighted_error() -> None:
    """A perfect prediction costs nothing; predicting 0 costs the noise's variance times the min-SNR weight."""
    schedule = NoiseSchedule()
    batch = Batch(
        torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([1, 200, 600, 999]), torch.zeros(4, 77, 8)
    )
    assert diffusion_loss(lambda x, t, c: batch.noise, schedule, batch, 5.0).item() == 0
    zero = diffusion_loss(lambda x, t, c: torch.zeros_like(x), schedule, batch, 5.0)
    expected = (schedule.loss_weight(batch.t, 5.0) * batch.noise.square().mean(dim=(1, 2, 3))).mean()
    torch.testing.assert_close(zero, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Randomness is a function of (seed, step)
# ----------------------------------------------------------------------------------------------------------------------


def test_every_picture_once_an_epoch() -> None:
    count, batch = 10, 4
    seen = torch.cat([batch_indices(count, batch, step, seed=0, device=CPU) for step in range(5)])
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
    assert torch.equal(batch_indices(count, 25, 3, 0, CPU), batch_indices(count, 25, 3, 0, CPU))
    assert len(batch_indices(3, 8, 5, 0, CPU)) == 8  # a batch larger than the set


def test_keys_make_unrelated_generators() -> None:
    def draw(*key: int | str) -> torch.Tensor:
        return torch.randn(1000, generator=generator_for(CPU, *key))

    assert torch.equal(draw(0, "step", 1), draw(0, "step", 1))
    for other in [(0, "step", 2), (1, "step", 1), (0, "epoch", 1), (2**32, "step", 1)]:
        assert abs(torch.corrcoef(torch.stack([draw(0, "step", 1), draw(*other)]))[0, 1]) < 0.15


def test_processes_take_slices_of_one_batch() -> None:
    """Two processes together see what one would: same pictures, noise, timesteps and dropped captions."""
    moments, contexts = torch.randn(6, 2, 8, 4, 4), torch.randn(4, 77, 8)
    data = CaptionedLatents(moments, contexts, torch.tensor([1, 2, 3, 1, 2, 3]), ["", "a", "b", "c"])
    model, options = tiny_model(), Options(batch_size=8, noise_offset=0.1)
    chosen, _ = split_pictures(6, 0.2, 0, CPU)
    batches = [
        script.draw_batch(data, chosen, model, options, 5, Processes(rank, count, CPU))
        for rank, count in [(0, 1), (0, 2), (1, 2)]
    ]
    for whole, first, second in zip(*(vars(batch).values() for batch in batches), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_split_is_fixed_and_complete() -> None:
    training, held_out = split_pictures(40, 0.1, 3, CPU)
    assert len(held_out) == 4 and sorted([*training.tolist(), *held_out.tolist()]) == list(range(40))
    assert torch.equal(split_pictures(40, 0.1, 3, CPU)[1], held_out)
    with pytest.raises(ValueError, match="--validation_share"):
        split_pictures(1, 0.5, 0, CPU)


def test_learning_rate_shape() -> None:
    rates = [learning_rate_at(step, 1.0, 10, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[60] == pytest.approx(0.5)
    assert rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)


def test_ema_follows_and_forgets_its_start() -> None:
    module = torch.nn.Linear(4, 4)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for step in range(200):
        ema.update(module, step)
    torch.testing.assert_close(ema.module.weight, module.weight)
    assert not ema.module.weight.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# The script
# ----------------------------------------------------------------------------------------------------------------------


def test_resumed_run_equals_uninterrupted_one(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after step 3 and resumed: the same bits in weights, averages and optimizer; metrics without a gap."""
    script.main(arguments(parts, tmp_path / "whole"))

    class StopsAfterThree:
        def __init__(self) -> None:
            self.checks = 0

        @property
        def asked(self) -> bool:
            self.checks += 1
            return self.checks > 8  # looked at three times a step

    with monkeypatch.context() as patch:
        patch.setattr(script, "StopRequest", StopsAfterThree)
        script.main(arguments(parts, tmp_path / "parted"))
    stopped = torch.load(tmp_path / "parted" / "training_state.pt", weights_only=True)["step"]
    assert 0 < stopped < 6
    with pytest.raises(FileExistsError, match="--resume"):  # never over a run that is there
        script.main(arguments(parts, tmp_path / "parted"))
    script.main(["--resume", "--output_dir", str(tmp_path / "parted")])  # the options are taken up from the folder

    whole, parted = (torch.load(tmp_path / run / "training_state.pt", weights_only=True) for run in ("whole", "parted"))
    assert whole["step"] == parted["step"] == 6
    for part in ("unet", "ema"):
        assert all(torch.equal(whole[part][name], parted[part][name]) for name in whole[part])
    for a, b in zip(whole["optimizer"]["state"].values(), parted["optimizer"]["state"].values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    with open(tmp_path / "parted" / "metrics.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file) if row["loss"]][-1] == 6
    _check_run_folder(tmp_path / "whole")


def _check_run_folder(folder: Path) -> None:
    """It explains itself, and its model opens and samples without being told anything."""
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["batch_size"] == 4 and config["versions"]["torch"] and "commit" in config
    assert (folder / "loss.png").stat().st_size > 0 and (folder / "samples" / "step_000006.png").is_file()
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["validation_loss"] for row in rows) and all(float(row["loss"]) > 0 for row in rows if row["loss"])
    model = StableDiffusion.from_pretrained(folder / "model", device="cpu")
    picture = model.sample(["a fox"], steps=2, height=64, width=64, progress=False)[0]
    assert picture.size == (64, 64)
    assert not list(folder.glob(".*"))  # no temporary file stays


def test_second_start_encodes_nothing(
    parts: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ("--max_steps", "1", "--preview_every", "0", "--validate_every", "0")
    script.main(arguments(parts, tmp_path / "first", *short))
    assert "encoding images" in capfd.readouterr().err
    monkeypatch.setattr("vae_model.VAE.encode", None)  # calling it would raise
    script.main(arguments(parts, tmp_path / "second", *short))
    assert "encoding images" not in capfd.readouterr().err


def test_accumulation_changes_nothing(parts: Path, tmp_path: Path) -> None:
    quiet = ("--max_steps", "2", "--preview_every", "0", "--validate_every", "0")
    for name, parts_of_step in (("one", "1"), ("four", "4")):
        script.main(arguments(parts, tmp_path / name, *quiet, "--gradient_accumulation", parts_of_step))
    one, four = (torch.load(tmp_path / n / "training_state.pt", weights_only=True)["unet"] for n in ("one", "four"))
    for name in one:
        torch.testing.assert_close(one[name], four[name], rtol=1e-3, atol=2e-5)


def test_goes_on_from_a_model_at_another_resolution_with_v_prediction(parts: Path, tmp_path: Path) -> None:
    quick = ("--max_steps", "1", "--validate_every", "0", "--preview_every", "0")
    v = ("--prediction_type", "v_prediction", "--zero_terminal_snr", "--noise_offset", "0.05", "--ema_decay", "0")
    script.main(arguments(parts, tmp_path / "small", *quick, *v, "--gradient_checkpointing"))
    pretrained = ("--pretrained", str(tmp_path / "small" / "model"), "--resolution", "96")
    script.main(arguments(parts, tmp_path / "large", *quick, *pretrained))
    model = StableDiffusion.from_pretrained(tmp_path / "large" / "model", device="cpu")
    assert model.schedule.prediction_type == "v_prediction" and model.schedule.zero_terminal_snr


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="--resume"):
        script.main(arguments(parts, tmp_path / "run", "--learning_rate", "1e30", "--gradient_clip", "1e30"))
    state = tmp_path / "run" / "training_state.pt"
    assert not state.exists() or all(
        torch.isfinite(t).all() for t in torch.load(state, weights_only=True)["unet"].values()
    )


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--batch_size", "3", "--gradient_accumulation", "2"], "--batch_size 3 must be divisible"),
        (["--resolution", "100"], "--resolution 100"),
        (["--preset", "digimon"], "--preset digimon"),
        (["--device", "tpu"], "--device tpu"),
        (["--precision", "int3"], "--precision int3"),
        (["--vae", "./nowhere.pth"], "nowhere.pth"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--resume", "--output_dir", "nowhere"], "--resume: nowhere"),
        (["--text_encoder", "openai/clip-vit-large-patch14"], "--text_encoder"),
        (["--dataset", "monsters:-3"], "monsters:-3"),
    ],
)
def test_bad_options_end_in_one_sentence(parts: Path, tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError)) as caught:
        script.main(arguments(parts, tmp_path / "run", *more))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).strip()


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--no_such_option", "3"])
    assert caught.value.code == 2 and "--no_such_option" in capsys.readouterr().err


def test_options_from_preset_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\nseed: 5\n")
    options = parse_options(
        Options, ["--preset", "monsters", "--config", str(file), "--seed", "9"], script.PRESETS, "pokemon"
    )
    assert (options.preset, options.max_steps, options.seed, options.resolution) == ("monsters", 7, 9, 256)
    file.write_text("max_stepz: 7\n")
    with pytest.raises(ValueError, match="max_stepz"):
        parse_options(Options, ["--config", str(file)], script.PRESETS, "pokemon")


def test_an_unreachable_hub_ends_the_script_with_one_line(tmp_path: Path) -> None:
    """As a user sees it: an exit code and one line, no traceback."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "train_stable_diffusion.py", *argv]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    offline = run("--output_dir", str(tmp_path / "run"), "--wandb", "off", "--device", "cpu")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    assert offline.stderr.strip().splitlines()[-1].startswith("error: --text_encoder")


def test_a_model_from_scratch_starts_at_the_brightness_it_learned_from(parts: Path, tmp_path: Path) -> None:
    """Monsters stand on white, so their latents have a mean; the run's model knows it and sampling starts above it."""
    quick = ("--max_steps", "1", "--validate_every", "0", "--preview_every", "0")
    script.main(arguments(parts, tmp_path / "run", *quick))
    model = StableDiffusion.from_pretrained(tmp_path / "run" / "model", device="cpu")
    mean = torch.tensor(model.scheduler_config[LATENTS_MEAN])
    assert mean.shape == (4,) and mean.abs().max() > 0.01
    noise = torch.randn(1, 4, 8, 8)
    walk = timestep_grid("ddim", model.schedule, 10)
    started = model._start(walk, noise)
    a = walk.levels[0]
    torch.testing.assert_close(started, a**0.5 * mean[None, :, None, None] + (1 - a) ** 0.5 * noise)
    model.scheduler_config.pop(LATENTS_MEAN)
    torch.testing.assert_close(model._start(walk, noise), noise)  # what published models do


def test_a_stop_is_asked_of_this_process_and_ends_its_workers() -> None:
    """SIGTERM asks the trainer to save and stop; a forked worker, which inherits the handler, must still die of it."""
    stop = StopRequest()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    worker.start()
    time.sleep(0.5)  # a signal that comes before Python has started in the worker is lost
    worker.terminate()
    worker.join(timeout=20)
    assert worker.exitcode == -signal.SIGTERM and not stop.asked
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.asked
