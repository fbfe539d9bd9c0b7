"""The training script: what it learns, what it promises about resuming, and how it fails."""

import csv
import dataclasses
import filecmp
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextModel

import monsters
import train_stable_diffusion as script
from diffusion_model import UNet
from evaluation.timestep_loss import by_tenths
from noise_schedule import NoiseSchedule
from published import save_text_encoder
from stable_diffusion_model import StableDiffusion
from tests.conftest import ROOT
from tests.tiny import tiny_model, tiny_parts, tiny_text_encoder, tiny_unet, tiny_vae, training_arguments
from train_stable_diffusion import Batch, Options, diffusion_loss, train_step, validation_losses
from training.captioned_latents import split_images
from training.options import answer_early, parse_options
from training.plots import draw_columns
from training.presets import PARTS, PRESETS, VAEOptions
from training.reproducible import (
    EMA,
    Processes,
    batch_indices,
    clip_and_step,
    decay_groups,
    generator_for,
    learning_rate_at,
)
from training.run_folder import load_checkpoint
from training.script import UserError, run
from vae_model import VAE

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("ignore:The prompt is longer")  # the tiny tokenizer spells words by letter


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(parts: Path, output: Path, *more: str) -> list[str]:
    return [*training_arguments(parts), "--output_dir", str(output), *more]


# ----------------------------------------------------------------------------------------------------------------------
# It learns what it is told
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_two_images_come_back_from_their_own_captions() -> None:
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
        diffusion_loss(model.unet, model.schedule, batch, gamma=5.0).mean().backward()
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
    assert diffusion_loss(lambda x, t, c: batch.noise, schedule, batch, 5.0).tolist() == [0, 0, 0, 0]
    zero = diffusion_loss(lambda x, t, c: torch.zeros_like(x), schedule, batch, 5.0)
    weight = torch.minimum(schedule.snr(batch.t), torch.tensor(5.0)) / schedule.snr(batch.t)
    torch.testing.assert_close(zero, weight * batch.noise.square().mean(dim=(1, 2, 3)))
    assert zero[0] < 0.1 * zero[3]  # little noise weighs little


def test_the_network_is_shown_the_noisy_latents_and_the_timestep_and_the_words() -> None:
    batch = Batch(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.randn(2, 77, 8))
    shown = []
    diffusion_loss(lambda *inputs: shown.append(inputs) or inputs[0], NoiseSchedule(), batch, None)
    ((x_t, t, context),) = shown
    alpha_bar = NoiseSchedule().alphas_cumprod[batch.t][:, None, None, None]
    torch.testing.assert_close(x_t, alpha_bar.sqrt() * batch.latents + (1 - alpha_bar).sqrt() * batch.noise)
    assert torch.equal(t, batch.t) and torch.equal(context, batch.context)


# ----------------------------------------------------------------------------------------------------------------------
# Randomness is a function of (seed, step)
# ----------------------------------------------------------------------------------------------------------------------


def test_every_image_once_an_epoch() -> None:
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
    """Two processes together see what one would: same images, noise, timesteps and dropped captions."""
    data = StandInData(6)
    model, options = tiny_model(), Options(batch_size=8, noise_offset=0.1)
    chosen, _ = split_images(6, 0.2, 0, CPU)
    batches = [
        script.draw_batch(data, chosen, model, options, 5, Processes(rank, count, CPU))
        for rank, count in [(0, 1), (0, 2), (1, 2)]
    ]
    for whole, first, second in zip(*(vars(batch).values() for batch in batches), strict=True):
        assert torch.equal(whole, torch.cat([first, second]))


def test_split_is_fixed_and_complete() -> None:
    training, held_out = split_images(40, 0.1, 3, CPU)
    assert len(held_out) == 4 and sorted([*training.tolist(), *held_out.tolist()]) == list(range(40))
    assert torch.equal(split_images(40, 0.1, 3, CPU)[1], held_out)
    with pytest.raises(UserError, match=r"0\.05: of 1 image, none would be left .* --validation_share 0 holds none"):
        split_images(1, 0.05, 0, CPU)


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


def test_what_compiling_takes_is_said_and_counts_as_no_speed(parts: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    calls = []

    def compiled(network: torch.nn.Module) -> Callable:
        def call(*args) -> torch.Tensor:
            time.sleep(0 if calls else 2)
            calls.append(network)
            return network(*args)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    few = ("--max_steps", "3", "--log_every", "3", "--preview_every", "0", "--validate_every", "0")
    script.main(arguments(parts, tmp_path / "run", *few, "--compile"))
    printed = capsys.readouterr().out
    assert len(calls) == 3 and re.search(r"step 1: took [23] s, since torch\.compile", printed)
    speed = float(re.search(r"step 3/3: loss .*, (.*) images/s", printed)[1])
    assert speed > 12 / 2, "the images of all three steps, as if they had taken the two seconds, too"
    script.main(arguments(parts, tmp_path / "plain", *few))
    assert len(calls) == 3 and "torch.compile" not in capsys.readouterr().out


def test_a_run_folder_explains_itself_and_is_not_overwritten(parts: Path, tmp_path: Path) -> None:
    script.main(arguments(parts, tmp_path / "run"))
    _check_run_folder(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--resume"):
        script.main(arguments(parts, tmp_path / "run"))
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        before.pop(checkpoint)
        checkpoint.unlink()
    with pytest.raises(UserError, match="--overwrite"):  # the model is still worth asking for
        script.main(arguments(parts, tmp_path / "run"))
    assert all(path.read_bytes() == content for path, content in before.items())
    with pytest.raises(UserError, match="no checkpoint yet"):
        script.main(arguments(parts, tmp_path / "run", "--resume"))
    script.main(arguments(parts, tmp_path / "run", "--overwrite", "--max_steps", "1", "--preview_every", "0"))
    with open(tmp_path / "run" / "metrics.csv") as file:
        assert {row["step"] for row in csv.DictReader(file)} == {"1"}
    assert not (tmp_path / "run" / "samples").exists()


def _check_run_folder(folder: Path) -> None:
    """It explains itself, and its model opens and samples without being told anything."""
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["batch_size"] == 4 and config["versions"]["torch"] and "commit" in config
    assert "command" in config
    assert (folder / "loss.png").stat().st_size > 0 and (folder / "samples" / "step_000006.png").is_file()
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["validation_loss"] for row in rows) and all(float(row["loss"]) > 0 for row in rows if row["loss"])
    model = StableDiffusion.from_pretrained(folder / "model", device="cpu")
    image = model.sample(["a fox"], steps=2, height=64, width=64, progress=False)[0]
    assert image.size == (64, 64)
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
    one, four = (
        torch.load(tmp_path / n / "checkpoints" / "step_00000002.pt", weights_only=True)["unet"]
        for n in ("one", "four")
    )
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
    assert model.scheduler_config["timestep_spacing"] == "trailing"  # so that sampling begins at pure noise
    assert model._grid("ddim", 10, None, None).levels[0] == 0


def test_a_run_that_leaves_the_finite_numbers_stops_and_keeps_its_checkpoints(parts: Path, tmp_path: Path) -> None:
    wild = ("--learning_rate", "1e30", "--gradient_clip", "0", "--warmup_steps", "0", "--checkpoint_every", "1")
    with pytest.raises(FloatingPointError, match="--resume"):
        script.main(arguments(parts, tmp_path / "run", *wild, "--max_steps", "12"))
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(t).all() for part in ("unet", "ema") for t in state[part].values())


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    """Neither weights nor moments nor the count of steps: the optimizer is told on the device to skip it."""
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(decay_groups(module, 0.1), lr=0.1, fused=True)
    module(torch.randn(4, 3)).square().sum().backward()
    assert clip_and_step(optimizer, 1.0).isfinite()
    before = [p.clone() for p in module.parameters()]
    moments = [t.clone() for state in optimizer.state.values() for t in state.values()]
    (module(torch.randn(4, 3)).sum() * float("nan")).backward()
    assert not clip_and_step(optimizer, 1.0).isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    after = [t for state in optimizer.state.values() for t in state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))
    module(torch.randn(4, 3)).square().sum().backward()
    clip_and_step(optimizer, 1.0)
    assert not torch.equal(before[0], module.weight)


def test_gradients_are_clipped_to_the_norm_asked_for_and_0_switches_it_off() -> None:
    for max_norm, expected in ((0.5, 0.5), (0.0, 20.0)):
        module = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0, fused=True)
        before = module.weight.item()
        (module.weight * 20).sum().backward()
        assert clip_and_step(optimizer, max_norm).item() == pytest.approx(20)
        assert abs(module.weight.item() - before) == pytest.approx(expected, rel=1e-4)


def test_gains_and_biases_do_not_decay() -> None:
    unet = tiny_unet()
    decaying, free = decay_groups(unet, 0.01)
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    assert len(decaying["params"]) + len(free["params"]) == len(list(unet.parameters()))
    free_names = {name for name, p in unet.named_parameters() if any(p is q for q in free["params"])}
    assert free_names == {n for n, _ in unet.named_parameters() if n.endswith(".bias") or ".norm" in n or "_norm_" in n}


def test_validation_is_spread_over_the_timesteps_and_over_the_images() -> None:
    """Whether one image is held out or eleven: every timestep's part of the range is visited as often as any other."""
    model = tiny_model()
    model.vae.config.scaling_factor = 0.5
    unstopped = SimpleNamespace(processes=Processes(0, 1, CPU), check_stop=lambda together: None)
    for count in (1, 3, 11, 40):
        data = StandInData(count)
        seen: list[tuple[int, float]] = []

        def unet(x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
            seen.extend(zip(context[:, 0, 0].long().tolist(), t.tolist(), strict=True))  # noqa: B023
            clean = t < 10
            means = data.moments[context[clean, 0, 0].long(), 0, :4]  # noqa: B023
            torch.testing.assert_close(x[clean], 0.5 * means, atol=0.6, rtol=0)  # scaled, not mirrored, little noise
            return torch.zeros_like(x)

        losses = validation_losses(unet, data, torch.arange(count), model, unstopped)
        assert 0.95 < np.mean(losses) < 1.05  # the variance of the noise: every timestep weighs the same
        assert not any(drop.any() for drop in data.drops)
        timesteps = [t for _, t in seen]
        assert timesteps == sorted(timesteps) and len(losses) == len(seen)
        gaps = np.diff([-timesteps[0] - 1, *timesteps, 2000 - timesteps[-1] - 1])
        assert len(seen) >= 64 and max(gaps) - min(gaps) <= 1.5 * 1000 / len(seen) + 1
        for image in range(count):
            mine = [t for i, t in seen if i == image]
            assert abs(len(mine) - len(seen) / count) < 1 and min(mine) < 400 and max(mine) > 600
        assert validation_losses(unet, data, torch.arange(count), model, unstopped) == losses


@pytest.mark.parametrize(("held_out", "at_a_time"), [([], 0), ([0], script.VALIDATED_AT_ONCE)])
def test_a_validation_is_foretold_where_something_is_held_out(held_out: list, at_a_time: int, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(script, "forecast_run", lambda *of: seen.append(of[4]))
    run = {"options": Options(), "unet": tiny_unet(), "model": None, "data": None, "chosen": [1], "held_out": held_out}
    run |= {"processes": Processes(0, 1, CPU), "precision": torch.float32, "device": CPU}
    script.Run.summary(SimpleNamespace(**run))
    assert seen == [at_a_time]


def test_each_tenth_of_the_timesteps_is_logged_and_plotted(parts: Path, tmp_path: Path, monkeypatch: object) -> None:
    """Of a loss that is its timestep, tenth i is the middle of its timesteps, and their mean is the validation loss."""

    def loss(unet: torch.nn.Module, schedule: NoiseSchedule, batch: Batch, gamma: float | None) -> torch.Tensor:
        return batch.t.float() if gamma is None else original(unet, schedule, batch, gamma)

    original, plots = diffusion_loss, []
    plot = script.RunFolder.plot
    monkeypatch.setattr(script, "diffusion_loss", loss)
    monkeypatch.setattr(script.RunFolder, "plot", lambda *a, **k: (plots.append(k["beside"]), plot(*a, **k)))
    script.main(arguments(parts, tmp_path / "run"))
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    row = next(row for row in rows if row["validation_loss"])
    tenths = [float(row[f"validation_loss_{i}"]) for i in range(1, 11)]
    assert all(abs(tenth - (100 * i + 50)) < 12 for i, tenth in enumerate(tenths))
    assert float(row["validation_loss"]) == pytest.approx(500, abs=3)
    assert all(not row["validation_loss_1"] for row in rows if not row["validation_loss"])
    labels = {f"validation_loss_{i + 1}": f"held out, t = {100 * i}…{100 * i + 99}" for i in range(10)}
    assert list(plots[-1].items()) == list(labels.items())
    with Image.open(tmp_path / "run" / "loss.png") as sheet:
        assert sheet.width > 3 * sheet.height  # two panels


def test_the_panel_of_the_tenths_has_a_title() -> None:
    figure = draw_columns([{"step": "1", "a": "2", "b": "3"}], {"a": "training"}, "loss", beside={"b": "t = 0…99"})
    assert [axes.get_title() for axes in figure.axes] == ["", "held out, by tenths of the timesteps"]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "log"]


def test_the_tenths_are_coloured_in_their_order() -> None:
    tenths = {f"validation_loss_{i}": str(i) for i in range(1, 11)}
    row = {"step": "1", "loss": "2"} | dict.fromkeys(tenths, "3")
    _, axes = draw_columns([row], {"loss": "training"}, "loss", beside=tenths).axes
    colours = [line.get_color() for line in axes.lines]
    assert len(colours) == 10 and sorted(colours, key=sum) == colours != colours[::-1]  # viridis grows brighter


@pytest.mark.parametrize("count", [64, 65, 70, 156, 160, 1000])
def test_tenths_are_all_of_it(count: int) -> None:
    losses = torch.rand(count, generator=torch.Generator().manual_seed(0)).tolist()
    tenths = by_tenths(losses)
    assert len(tenths) == 10
    sizes = np.diff([round(i * count / 10) for i in range(11)])
    assert sum(tenths * sizes) / count == pytest.approx(np.mean(losses))
    if count % 10 == 0:  # as `spread` has it
        assert np.mean(tenths) == pytest.approx(np.mean(losses))
    assert by_tenths(sorted(losses)) == sorted(by_tenths(sorted(losses)))


class StandInData:
    """Latents and contexts that say which image they are of."""

    def __init__(self, count: int) -> None:
        self.moments = torch.randn(count, 2, 8, 4, 4)
        self.drops: list[torch.Tensor] = []

    def __len__(self) -> int:
        return len(self.moments)

    def gather(self, indices: torch.Tensor, mirrored: torch.Tensor, drop_caption: torch.Tensor) -> tuple:
        self.drops.append(drop_caption)
        context = torch.where(drop_caption, -1, indices)[:, None, None].float().expand(-1, 77, 8)
        return self.moments[indices, mirrored.long()], context


def test_a_batch_has_mirrors_dropped_captions_posterior_noise_scale_and_all_timesteps() -> None:
    data, model = StandInData(4096), tiny_model()
    data.moments[:, 1] += 100  # the mirrors
    data.moments[:, :, 4:] = -2.0  # log-variance: a standard deviation of 1/e
    model.vae.config.scaling_factor = 0.5
    options = Options(batch_size=4096, caption_dropout=0.3)
    batch = script.draw_batch(data, torch.arange(4096), model, options, 0, Processes(0, 1, CPU))
    indices = script.batch_indices(4096, 4096, 0, 0, CPU)
    mirrored = batch.latents.mean(dim=(1, 2, 3)) > 25
    means = data.moments[indices, mirrored.long()][:, :4]
    spread = batch.latents - 0.5 * means
    assert abs(mirrored.float().mean() - 0.5) < 0.05
    assert abs(spread.std() - 0.5 * torch.e**-1) < 0.01 and abs(spread.mean()) < 0.01
    dropped = batch.context[:, 0, 0] == -1
    assert abs(dropped.float().mean() - 0.3) < 0.05
    assert torch.equal(batch.context[~dropped, 0, 0].long(), indices[~dropped])
    assert (
        abs(batch.noise.std() - 1) < 0.01
        and abs(torch.corrcoef(torch.stack([spread.flatten(), batch.noise.flatten()]))[0, 1]) < 0.01
    )
    assert batch.t.min() < 10 and batch.t.max() > 989 and abs(batch.t.float().mean() - 499.5) < 20
    again = script.draw_batch(data, torch.arange(4096), model, options, 1, Processes(0, 1, CPU))
    assert not torch.equal(again.noise, batch.noise) and not torch.equal(again.t, batch.t)
    another_seed = dataclasses.replace(options, seed=1)
    other = script.draw_batch(data, torch.arange(4096), model, another_seed, 0, Processes(0, 1, CPU))
    assert not torch.equal(other.noise, batch.noise) and not torch.equal(other.t, batch.t)
    channels = torch.corrcoef(batch.noise.transpose(0, 1).flatten(1))  # (4, 4)
    assert (channels - torch.eye(4)).abs().max() < 0.02
    upright = script.draw_batch(
        data, torch.arange(4096), model, dataclasses.replace(options, mirror=False), 0, Processes(0, 1, CPU)
    )
    assert upright.latents.max() < 25 and torch.equal(upright.t, batch.t) and torch.equal(upright.noise, batch.noise)
    offset = script.draw_batch(
        data, torch.arange(4096), model, dataclasses.replace(options, noise_offset=0.5), 0, Processes(0, 1, CPU)
    )
    assert abs((offset.noise - batch.noise).mean(dim=(2, 3)).std() - 0.5) < 0.02


def test_a_step_adds_up_its_parts_to_the_gradient_of_the_mean() -> None:
    """Weights and reported loss are those of one pass over the whole batch, whatever the number of parts."""
    results = []
    for parts in (1, 4):
        torch.manual_seed(3)
        unet, schedule = tiny_unet(), NoiseSchedule()
        batch = Batch(
            torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.randint(1000, (8,)), torch.randn(8, 77, 32)
        )
        optimizer = torch.optim.SGD(unet.parameters(), lr=0.1, fused=True)
        options = Options(gradient_accumulation=parts, gradient_clip=0.0)
        loss, norm = train_step(unet, schedule, batch, optimizer, options, torch.float32)
        results.append((loss, norm, [p.detach().clone() for p in unet.parameters()]))
    (loss, norm, weights), (loss4, norm4, weights4) = results
    torch.testing.assert_close(loss, loss4)
    torch.testing.assert_close(norm, norm4, rtol=1e-4, atol=1e-6)
    for a, b in zip(weights, weights4, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_step_weighs_by_min_snr_and_clips_as_its_options_say() -> None:
    torch.manual_seed(3)
    unet, schedule = tiny_unet(), NoiseSchedule()
    latents, noise = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    batch = Batch(latents, noise, torch.tensor([1, 20, 300, 900]), torch.randn(4, 77, 32))
    for gamma in (0.0, 5.0):
        expected = diffusion_loss(unet, schedule, batch, gamma or None).mean()
        before = torch.cat([p.detach().flatten() for p in unet.parameters()])
        optimizer = torch.optim.SGD(unet.parameters(), lr=1.0, fused=True)
        options = Options(min_snr_gamma=gamma, gradient_clip=1e-3)
        loss, norm = train_step(unet, schedule, batch, optimizer, options, torch.float32)
        moved = (torch.cat([p.detach().flatten() for p in unet.parameters()]) - before).norm()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert norm > 0.01 and moved.item() == pytest.approx(1e-3, rel=0.01)


def test_a_step_computes_in_the_precision_asked_for() -> None:
    seen = []
    unet = tiny_unet()
    unet.conv_in.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    batch = Batch(torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([1, 20]), torch.randn(2, 77, 32))
    optimizer = torch.optim.SGD(unet.parameters(), lr=1.0, fused=True)
    for precision in (torch.bfloat16, torch.float32):
        train_step(unet, NoiseSchedule(), batch, optimizer, Options(), precision)
    assert seen == [torch.bfloat16, torch.float32]


def test_the_average_moves_by_one_minus_its_decay() -> None:
    module = torch.nn.Linear(2, 2)
    ema = EMA(module, 0.9)
    old = ema.module.weight.clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    ema.update(module, step=10_000)
    torch.testing.assert_close(ema.module.weight, old + 0.1)
    ema.update(module, step=0)  # early on it follows fast: decay (1 + 0) / (10 + 0)
    torch.testing.assert_close(ema.module.weight, old + 0.1 + 0.9 * 0.9)


def test_an_average_on_another_device_moves_as_far() -> None:
    """Each parameter is brought to it, one by one."""
    module, bring = torch.nn.Linear(2, 2), []
    ema, before = EMA(module, 0.9), [p.clone() for p in module.parameters()]

    def elsewhere(parameter: torch.Tensor) -> SimpleNamespace:
        def to(device: torch.device) -> torch.Tensor:
            bring.append(device)
            return parameter + 1

        return SimpleNamespace(requires_grad=True, device=torch.device("meta"), to=to)

    ema.update(SimpleNamespace(parameters=lambda: map(elsewhere, module.parameters())), step=10_000)
    for average, old in zip(ema.module.parameters(), before, strict=True):
        torch.testing.assert_close(average, old + 0.1)
    assert bring == [torch.device("cpu")] * 2


@pytest.mark.parametrize("decay", ["0.9", "0"])
def test_a_run_judges_samples_and_saves_the_average_and_sets_the_rate(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decay: str
) -> None:
    """What is validated, previewed and saved are the averaged weights (the plain ones without an average)."""
    runs, judged, rates, validated = [], [], [], []
    validate, step, sample, init = (
        script.validation_losses,
        script.train_step,
        StableDiffusion.sample,
        script.Run.__init__,
    )

    def remember(self: script.Run, *args: object) -> None:
        runs.append(self)
        init(self, *args)

    def stepping(
        unet: torch.nn.Module, schedule: NoiseSchedule, batch: Batch, optimizer: object, *more: object
    ) -> tuple:
        assert unet.training and [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(unet, schedule, batch, optimizer, *more)

    def judge(network: torch.nn.Module) -> None:
        judged.append((network, {name: p.clone() for name, p in network.state_dict().items()}))

    def validating(unet: torch.nn.Module, data: object, held_out: torch.Tensor, *more: object) -> list[float]:
        judge(unet)
        validated.append(held_out)
        return validate(unet, data, held_out, *more)

    monkeypatch.setattr(script.Run, "__init__", remember)
    monkeypatch.setattr(script, "train_step", stepping)
    monkeypatch.setattr(script, "validation_losses", validating)
    monkeypatch.setattr(StableDiffusion, "sample", lambda self, *a, **k: (judge(self.unet), sample(self, *a, **k))[1])
    more = ("--ema_decay", decay, "--preview_every", "3", "--weight_decay", "0.05")
    script.main(arguments(parts, tmp_path / "run", *more))
    (run,) = runs
    assert not float(decay) or run.ema.decay == 0.9
    assert all(torch.equal(held_out, run.held_out) for held_out in validated) and len(validated) == 2
    assert not set(run.held_out.tolist()) & set(run.chosen.tolist())
    average = run.ema.module if float(decay) else run.unet
    assert len(judged) == 4 and all(network is average for network, _ in judged)
    assert rates == [[learning_rate_at(i, run.options.learning_rate, 2, 6)] * 2 for i in range(6)]
    assert all(torch.equal(judged[-1][1][name], p) for name, p in average.state_dict().items())
    saved = StableDiffusion.from_pretrained(tmp_path / "run" / "model", device="cpu").unet.state_dict()
    assert all(torch.equal(saved[name], p) for name, p in average.state_dict().items())
    if float(decay):
        assert any(not torch.equal(p, run.unet.state_dict()[name]) for name, p in saved.items())
    rows = list(csv.DictReader(open(tmp_path / "run" / "metrics.csv")))
    assert [row["learning_rate"] for row in rows if row["loss"]] == [f"{rates[i][0]:.6g}" for i in (1, 3, 5)]


def test_the_best_model_is_the_one_with_the_lowest_validation_loss(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.2, 0.4, 0.3])
    monkeypatch.setattr(script, "validation_losses", lambda *_: [next(losses)] * 64)
    every = ("--validate_every", "1", "--checkpoint_every", "1", "--max_steps", "4", "--preview_every", "0")
    script.main(arguments(parts, tmp_path / "run", *every))
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert best["step"] == 2 and best["best_validation"] == 0.2
    saved = StableDiffusion.from_pretrained(tmp_path / "run" / "best_model", device="cpu").unet.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in best["ema"].items())


def test_steps_that_are_not_finite_are_skipped_and_counted(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [], script.diffusion_loss

    def sometimes(unet: torch.nn.Module, *more: object) -> torch.Tensor:
        calls.append(unet.training)
        return loss(unet, *more) * (float("nan") if calls.count(True) in (2, 3) and unet.training else 1.0)

    monkeypatch.setattr(script, "diffusion_loss", sometimes)
    script.main(arguments(parts, tmp_path / "run", "--log_every", "3", "--preview_every", "0"))
    rows = [row for row in csv.DictReader(open(tmp_path / "run" / "metrics.csv")) if row["loss"]]
    assert [row["skipped_steps"] for row in rows] == ["2", ""]
    assert all(np.isfinite(float(row["loss"])) and np.isfinite(float(row["gradient_norm"])) for row in rows)


def test_a_skipped_step_keeps_no_checkpoint_from_being_written(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, loss = [], script.diffusion_loss

    def once(unet: torch.nn.Module, *more: object) -> torch.Tensor:
        calls.append(unet)
        return loss(unet, *more) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(script, "diffusion_loss", once)
    quiet = ("--preview_every", "0", "--validate_every", "0", "--log_every", "6", "--checkpoint_every", "3")
    script.main(arguments(parts, tmp_path / "run", *quiet))
    assert (tmp_path / "run" / "checkpoints" / "step_00000003.pt").is_file()


def test_a_changed_data_set_is_not_resumed(parts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(8):
        monsters.draw(i, 64).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(monsters.caption(i))
    quiet = ("--dataset", str(folder), "--preview_every", "0", "--validate_every", "0")
    script.main(arguments(parts, tmp_path / "run", *quiet, "--max_steps", "2"))
    (folder / "3.txt").write_text("something else")
    with pytest.raises(UserError, match="the data set is not what it was"):
        script.main(["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "3"])
    (folder / "3.txt").write_text(monsters.caption(3))
    script.main(["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "3"])


def test_another_vae_or_text_encoder_is_not_resumed(tmp_path: Path) -> None:
    """The same path with other weights in it, as after an update of this repository: what was learned would be lost."""
    parts, run = tiny_parts(tmp_path / "parts"), tmp_path / "run"
    script.main(arguments(parts, run, "--preview_every", "0", "--validate_every", "0", "--max_steps", "2"))
    resume = ["--resume", "--output_dir", str(run), "--max_steps", "3"]
    torch.manual_seed(1)
    vae, whole = tiny_vae(), (parts / "vae_model.pth").read_bytes()
    vae.save(parts / "vae_model.pth")
    with pytest.raises(UserError, match="networks that encode them"):
        script.main(resume)
    (parts / "vae_model.pth").write_bytes(whole)
    save_text_encoder(tiny_text_encoder(), parts / "clip", parts / "clip", torch.float32)
    with pytest.raises(UserError, match="networks that encode them"):
        script.main(resume)


def test_the_latest_preview_has_one_name_and_the_end_says_what_is_drawn(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    few = ("--preview_every", "2", "--validate_every", "0", "--max_steps", "4", "--final_samples", "2")
    script.main(arguments(parts, run, *few, "--dataset", "monsters:6:turquoise"))
    assert filecmp.cmp(run / "samples" / "latest.png", run / "samples" / "step_000004.png", shallow=False)
    assert (run / "samples" / "step_000002.png").read_bytes() != (run / "samples" / "step_000004.png").read_bytes()
    report = json.loads((run / "unseen.json").read_text())
    assert report["r_precision_of_real_images"] == 1.0 and (run / "samples" / "unseen.png").is_file()
    last = capsys.readouterr().out.splitlines()[-1]
    assert "Of 2 monsters that it never saw" in last and "of real drawings: 100%" in last
    assert last.endswith(f"Of 2 turquoise ones, {report['turquoise']['on_white_in_the_colour']:.0%} are.")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_that_is_asked_for_trains(parts: Path, tmp_path: Path, optimizer: str) -> None:
    """And its moments are in the checkpoint: three steps and three more end with the bits of six."""
    quiet = ("--preview_every", "0", "--validate_every", "0", "--optimizer", optimizer)
    script.main(arguments(parts, tmp_path / "whole", *quiet))
    script.main(arguments(parts, tmp_path / "parted", *quiet))
    (tmp_path / "parted" / "checkpoints" / "step_00000006.pt").unlink()
    script.main(["--resume", "--output_dir", str(tmp_path / "parted")])
    ends = [tmp_path / run / "checkpoints" / "step_00000006.pt" for run in ("whole", "parted")]
    whole, parted = (torch.load(file, weights_only=True) for file in ends)
    assert all(torch.equal(whole["unet"][name], parted["unet"][name]) for name in whole["unet"])
    names = {name for state in whole["optimizer"]["state"].values() for name in state}
    assert ("momentum" in names) == (optimizer == "muon") and "exp_avg" in names


@pytest.mark.parametrize(
    "content", ['{"options": []}', '{"options": {}}', '{"options": {"batch_size": [4]}}', "{", "[]"]
)
def test_a_damaged_config_is_a_sentence(parts: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        parse_options(Options, ["--resume", "--output_dir", str(tmp_path / "run")], PRESETS, "pokemon")


def test_a_run_of_another_script_is_not_resumed(parts: Path, tmp_path: Path) -> None:
    script.main(arguments(parts, tmp_path / "run", "--max_steps", "1", "--preview_every", "0"))
    with pytest.raises(UserError, match="a run of another script"):
        parse_options(VAEOptions, ["--resume", "--output_dir", str(tmp_path / "run")])


def test_a_job_that_torchrun_restarts_goes_on_with_its_own_run_only(
    parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.main(arguments(parts, tmp_path / "run", "--max_steps", "2", "--preview_every", "0"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "mine")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UserError, match="holds a model already"):
        script.main(arguments(parts, tmp_path / "run", "--max_steps", "3", "--preview_every", "0"))
    script.main(arguments(parts, tmp_path / "new", "--max_steps", "2", "--preview_every", "0"))
    script.main(arguments(parts, tmp_path / "new", "--max_steps", "3", "--preview_every", "0"))
    assert load_checkpoint(tmp_path / "new", CPU)["step"] == 3


def test_resuming_checks_everything_before_it_writes_anything(parts: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    script.main(arguments(parts, run, "--max_steps", "3", "--preview_every", "0", "--validate_every", "0"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = [
        (["--batch_size", "8"], "--batch_size 8: the run in .* has 4"),
        (["--seed", "7"], "--seed 7"),
        (["--resolution", "128"], "--resolution 128"),
        (["--block_out_channels", "16", "48"], "--block_out_channels"),
        (["--preset", "pokemon"], "--preset pokemon"),
        (["--max_steps", "2"], "--max_steps 2: .* has taken 3 steps"),
        (["--learning_rate", "-1"], "--learning_rate"),
    ]
    for more, sentence in refused:
        with pytest.raises(UserError, match=sentence):
            script.main(["--resume", "--output_dir", str(run), *more])
        assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    config = tmp_path / "more.yaml"
    config.write_text("max_steps: 4\nlearning_rate: 1e-5\n")
    script.main(["--resume", "--output_dir", str(run), "--config", str(config), "--log_every", "1"])
    saved = json.loads((run / "config.json").read_text())
    assert saved["resumed"][0]["changed"] == {"max_steps": 4, "learning_rate": 1e-5, "log_every": 1}
    script.main(["--resume", "--output_dir", str(run), "--max_steps", "5", "--weight_decay", "0.5"])
    assert load_checkpoint(run, CPU)["optimizer"]["param_groups"][0]["weight_decay"] == 0.5
    config.write_text("seed: 4\n")
    with pytest.raises(UserError, match="--seed 4"):
        script.main(["--resume", "--output_dir", str(run), "--config", str(config)])


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--batch_size", "3", "--gradient_accumulation", "2"], "--batch_size 3 must be divisible"),
        (["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--gradient_accumulation", "0"], "--gradient_accumulation 0: must be at least 1"),
        (["--max_steps", "0"], "--max_steps 0"),
        (["--preview_steps", "0"], "--preview_steps 0"),
        (["--min_snr_gamma", "-1"], "--min_snr_gamma -1.0: must be at least 0"),
        (["--gradient_clip", "-1"], "--gradient_clip -1.0"),
        (["--learning_rate", "0"], "--learning_rate 0.0: must be above 0"),
        (["--learning_rate", "nan"], "--learning_rate nan: must be a finite number"),
        (["--ema_decay", "1"], "--ema_decay 1.0: must be below 1"),
        (["--caption_dropout", "1.5"], "--caption_dropout 1.5: must be at most 1"),
        (["--validation_share", "1"], "--validation_share 1.0"),
        (["--validation_share", "0.99"], "--validation_share 0.99"),
        (["--keep_checkpoints", "0"], "--keep_checkpoints 0"),
        (["--seed", "-1"], "--seed -1"),
        (["--seed", "99999999999999999999"], "--seed 99999999999999999999: must be at most"),
        (["--min_snr_gamma", "1e308"], "--min_snr_gamma 1e+308: must be at most"),
        (["--log_every", "-5"], "--log_every -5"),
        (["--prediction_type", "x0"], "--prediction_type x0: choose epsilon or v_prediction"),
        (["--zero_terminal_snr"], "zero_terminal_snr"),
        (["--block_out_channels", "16", "30"], "block_out_channels: 30"),
        (["--attention_levels", "1"], "attention_levels"),
        (["--resolution", "100"], "--resolution 100"),
        (["--preset", "digimon"], "--preset digimon"),
        (["--device", "tpu"], "--device tpu"),
        (["--precision", "int3"], "--precision int3"),
        (["--save_precision", "int3"], "--save_precision int3"),
        (["--wandb", "maybe"], "--wandb maybe"),
        (["--vae", "./nowhere.pth"], "nowhere.pth"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml"),
        (["--resume", "--output_dir", "nowhere"], "--resume: nowhere"),
        (["--text_encoder", "openai/clip-vit-large-patch14"], "--text_encoder"),
        (["--dataset", "monsters:-3"], "monsters:-3"),
        (["--dataset", "./nowhere"], "--dataset ./nowhere"),
    ],
)
def test_bad_options_end_in_one_sentence(parts: Path, tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises((UserError, OSError)) as caught:
        script.main(arguments(parts, tmp_path / "run", *more))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value).strip()
    assert not list(tmp_path.glob("run/*"))  # and nothing was written


@pytest.mark.parametrize("name", ["log_every", "validate_every", "preview_every", "gradient_clip", "warmup_steps",
                                  "weight_decay", "ema_decay", "min_snr_gamma", "caption_dropout", "noise_offset",
                                  "validation_share", "checkpoint_every"])  # fmt: skip
def test_0_switches_off(parts: Path, tmp_path: Path, name: str) -> None:
    script.main(arguments(parts, tmp_path / "run", "--max_steps", "2", "--preview_every", "0", f"--{name}", "0"))
    assert (tmp_path / "run" / "model").is_dir() and (tmp_path / "run" / "checkpoints" / "step_00000002.pt").is_file()


def test_an_unknown_option_is_named(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        script.main(["--no_such_option", "3"])
    assert caught.value.code == 2 and "--no_such_option" in capsys.readouterr().err


def test_options_from_preset_file_and_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("max_steps: 7\nseed: 5\n")
    options = parse_options(Options, ["--preset", "monsters", "--config", str(file), "--seed", "9"], PRESETS, "pokemon")
    assert (options.preset, options.max_steps, options.seed, options.resolution) == ("monsters", 7, 9, 128)
    for wrong in (
        "preview_prompts: [123]",
        "block_out_channels: [16, x]",
        "max_steps: many",
        "resume: 3",
        "seed: true",
    ):
        file.write_text(wrong)
        with pytest.raises(UserError, match="is not of the kind"):
            parse_options(Options, ["--config", str(file)], PRESETS, "pokemon")
    file.write_text("max_stepz: 7\n")
    with pytest.raises(UserError, match="max_stepz"):
        parse_options(Options, ["--config", str(file)], PRESETS, "pokemon")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_begins_as_it_says(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options fit together, and what it lacks here is asked for in a sentence that says what to do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("published.weight_files._hub_folder", lambda *_: (_ for _ in ()).throw(LookupError("offline")))
    options = parse_options(Options, ["--preset", preset], PRESETS, "pokemon")
    assert options.batch_size % options.gradient_accumulation == 0 and options.resolution % 8 == 0
    if options.pretrained:  # brings its own shape
        assert not {"block_out_channels", "attention_levels", "layers_per_block"} & PRESETS[preset].keys()
    else:
        assert len(options.block_out_channels) == len(options.attention_levels)
    small = ["--dataset", "monsters:4", "--resolution", "16", "--device", "cpu", "--wandb", "off"]
    if preset == "monsters":
        torch.manual_seed(0)
        model = script.build_model(options)
        assert model.unet.config.block_out_channels == tuple(options.block_out_channels)
        # The sheet and the figures in README.md began with these weights: text encoder, VAE and U-Net draw in turn.
        torch.manual_seed(0)
        CLIPTextModel(model.text_encoder.model.config), VAE(model.vae.config)
        assert torch.equal(UNet(model.unet.config).conv_in.weight, model.unet.conv_in.weight)
        return
    after_the_quickstart = ("turquoise", "turquoise_lora")
    assert Path(PARTS[preset]["vae"]).is_file() == (preset in (*after_the_quickstart, "pokemon_cpu"))
    ships = "model; " if options.pretrained else "model; or take what ships: --vae .*, "
    said = "--preset monsters" if preset in after_the_quickstart else f"{ships}or go on from .*: --pretrained"
    with pytest.raises(UserError, match=said):
        script.main(["--preset", preset, *small])
    if preset in after_the_quickstart:  # not for whatever else may be missing
        with pytest.raises(UserError, match="or go on from the whole model that ships: --pretrained"):
            script.main(["--preset", preset, *small, "--pretrained", "nobody/has_this"])
    assert not [path for path in (tmp_path / "stable_diffusion_results").rglob("*") if path.is_file()]


def test_no_garbage_is_looked_for_while_a_script_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train_stable_diffusion.py", "--preset", "monsters"])
    seen = []
    try:
        answer_early(Options, PRESETS, "pokemon")
        assert not gc.isenabled()
        run(lambda _: seen.append(gc.isenabled()))
        assert seen == [True] and gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_an_unreachable_hub_ends_the_script_with_one_line(tmp_path: Path) -> None:
    """As a user sees it: an exit code and one line, no traceback."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    def run(*argv: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "train_stable_diffusion.py", *argv]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    offline = run("--output_dir", str(tmp_path / "run"), "--wandb", "off", "--device", "cpu")
    assert offline.returncode == 1 and "Traceback" not in offline.stderr
    assert offline.stderr.strip().splitlines()[-1].startswith("error: --dataset")
