"""Fine-tuning: from published layouts through the preset to a folder that diffusers opens; and its memory, foretold."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch

import train_stable_diffusion as script
from diffusion_model import UNet, UNetConfig
from stable_diffusion_model import StableDiffusion
from tests.test_interchange import (
    SD1_SCHEDULER,
    SD2_SCHEDULER,
    assert_equal,
    assert_same,
    make_folder,
    open_both,
    ours,
    set_scheduler,
    theirs,
    weights,
)
from tests.tiny import tiny_model
from training import memory_forecast
from training.captioned_latents import CaptionedLatents, memory_of
from training.memory_forecast import Forecast, Meter, bytes_of, forecast, rehearse_rest, rehearse_step
from training.presets import UNetOptions
from training.reproducible import Processes
from training.run_folder import load_checkpoint
from vae_model import VAE, VAEConfig

ZERO_SNR = SD2_SCHEDULER | {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Narrow models as they are published: SD 1 and SD 2 folders, one with zero-terminal SNR, and a single file."""
    folder = tmp_path_factory.mktemp("published")
    made = {"sd1": make_folder(folder / "sd1", 1), "sd2": make_folder(folder / "sd2", 2)}
    made["zero SNR"] = Path(shutil.copytree(made["sd2"], folder / "zero_snr"))
    set_scheduler(made["zero SNR"], ZERO_SNR)
    made["file"] = folder / "file" / "model.safetensors"
    StableDiffusion.from_pretrained(made["zero SNR"], device="cpu").export(made["file"])  # v-prediction as well
    shutil.copytree(made["sd2"] / "tokenizer", folder / "file" / "tokenizer")
    return made


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def finetune(pretrained: Path | str, output: Path, *more: str) -> Path:
    """Some steps of the preset, as the user calls it but for what makes it small; returns the model's folder."""
    script.main([
        *("--preset", "finetune", "--pretrained", str(pretrained), "--dataset", "monsters:8", "--resolution", "64"),
        *("--max_steps", "2", "--batch_size", "4", "--gradient_accumulation", "2", "--warmup_steps", "1"),
        *("--learning_rate", "1e-3", "--validation_share", "0.25", "--preview_prompts", "a fox"),
        *("--preview_steps", "2", "--device", "cpu", "--precision", "float32", "--wandb", "off"),
        *("--output_dir", str(output), *more),
    ])  # fmt: skip
    return output / "model"


# ----------------------------------------------------------------------------------------------------------------------
# From published weights and back
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("source", "scheduler"), [("sd1", SD1_SCHEDULER), ("zero SNR", ZERO_SNR), ("file", {})])
def test_what_was_finetuned_opens_in_diffusers_and_gives_the_same_image(sources, tmp_path, source, scheduler):
    before = StableDiffusion.from_pretrained(sources[source], device="cpu")
    model, pipe = open_both(finetune(sources[source], tmp_path / "run"))
    assert model.schedule == before.schedule
    written = json.loads((tmp_path / "run" / "model" / "scheduler" / "scheduler_config.json").read_text())
    assert {name: value for name, value in scheduler.items() if value is not None}.items() <= written.items()
    assert_same(ours(model, "ddim"), theirs(pipe, "ddim"))
    assert_same(ours(model, "dpm++2m"), theirs(pipe, "dpm++2m"))

    # The U-Net has learned; all else is what it was, in half precision.
    now, then = weights(model), {name: t.half().float() for name, t in weights(before).items()}
    moved = {name for name in now if name.startswith("unet.") and not torch.equal(now[name], then[name])}
    assert len(moved) == sum(name.startswith("unet.") for name in now)
    frozen = [{name: t for name, t in state.items() if not name.startswith("unet.")} for state in (now, then)]
    assert_equal(*frozen)
    assert (tmp_path / "run" / "samples" / "step_000002.png").stat().st_size > 0


def test_memory_may_be_traded_without_changing_the_steps(sources, tmp_path):
    """Checkpointing and micro-batches change what is held in memory, not what is learned."""
    quiet = ("--save_precision", "float32", "--validate_every", "0")
    frugal = StableDiffusion.from_pretrained(finetune(sources["sd1"], tmp_path / "frugal", *quiet), "cpu")
    lavish = ("--gradient_checkpointing", "False", "--gradient_accumulation", "1", "--ema_decay", "0.9", "--ema_on_cpu")
    finetune(sources["sd1"], tmp_path / "lavish", *quiet, *lavish)
    trained = load_checkpoint(tmp_path / "lavish", torch.device("cpu"))["unet"]
    before = StableDiffusion.from_pretrained(sources["sd1"], "cpu").unet.state_dict()
    step, other = (
        torch.cat([(after[name] - before[name]).flatten() for name in before])
        for after in (frugal.unet.state_dict(), trained)
    )
    assert (step - other).norm() < 0.02 * step.norm()


def test_a_handful_of_real_images(sources, tmp_path, pokemon_folder):
    rows = [json.loads(line) for line in (pokemon_folder / "metadata.jsonl").read_text().splitlines()[:5]]
    (tmp_path / "five").mkdir()
    for row in rows:
        shutil.copy(pokemon_folder / row["file_name"], tmp_path / "five")
    (tmp_path / "five" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = ("--dataset", str(tmp_path / "five"), "--max_steps", "4", "--log_every", "1", "--precision", "bfloat16")
    model, pipe = open_both(finetune(sources["sd1"], tmp_path / "run", *real))
    assert_same(ours(model, "euler"), theirs(pipe, "euler"))
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) >= 5


# ----------------------------------------------------------------------------------------------------------------------
# Stopping, going on, and what is refused
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "then"), [("0", "0.9"), ("0.9", "0")])
def test_a_run_goes_on_with_its_average_or_without(sources, tmp_path, first, then):
    finetune(sources["sd1"], tmp_path / "run", "--ema_decay", first, "--max_steps", "1")
    finetune(sources["sd1"], tmp_path / "run", "--ema_decay", then, "--max_steps", "2", "--resume")
    state = load_checkpoint(tmp_path / "run", torch.device("cpu"))
    assert state["step"] == 2 and ("ema" in state) == (then != "0")


@pytest.mark.parametrize(
    ("source", "more", "sentence"),
    [
        ("sd2", ["--prediction_type", "epsilon"], "--prediction_type epsilon: .* predicts v_prediction"),
        ("sd1", ["--prediction_type", "v_prediction"], "--prediction_type v_prediction: .* predicts epsilon"),
        ("sd2", ["--zero_terminal_snr"], "--zero_terminal_snr"),
        ("sd1", ["--save_precision", "float8"], "--save_precision float8"),
        ("sd1", ["--gradient_accumulation", "0"], "--gradient_accumulation"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", [], "the hub did not give it"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(sources, tmp_path, source, more, sentence):
    with pytest.raises((ValueError, OSError), match=sentence) as caught:
        finetune(sources.get(source, source), tmp_path / "run", *more)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing to clean up before the next attempt


# ----------------------------------------------------------------------------------------------------------------------
# Memory, foretold
# ----------------------------------------------------------------------------------------------------------------------

SMALL = UNetConfig(block_out_channels=(64, 128), layers_per_block=1, attention_levels=(False, True), context_dim=32)


def allocated(unet: UNet, n: int, side: int, accumulates: bool, precision: torch.dtype) -> int:
    """Most bytes that a real step allocates."""
    x, t, context = torch.randn(n, 4, side, side), torch.zeros(n), torch.randn(n, 77, 32)

    def step() -> None:
        for _ in range(2 if accumulates else 1):
            with torch.autocast("cpu", dtype=precision, enabled=precision != torch.float32, cache_enabled=False):
                loss = unet(x, t, context).float().square().mean()
            loss.backward()

    return allocated_by(step)


def allocated_by(work: Callable[[], object]) -> int:
    """Most bytes at one moment, by PyTorch's own account of every allocation."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    now = peak = 0
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    ("precision", "checkpointing", "accumulates"),
    [(torch.float32, False, False), (torch.bfloat16, False, True), (torch.bfloat16, True, False),
     (torch.bfloat16, True, True)],
)  # fmt: skip
def test_the_rehearsal_takes_what_the_step_will_take(precision, checkpointing, accumulates):
    if precision == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU emulates bfloat16, which takes room of its own; --precision auto is float32 here")
    unet = UNet(SMALL)
    unet.gradient_checkpointing = checkpointing
    real = allocated(unet, 4, 32, accumulates, precision)
    assert rehearse_step(SMALL, (4, 32, 32), 77, accumulates, precision, checkpointing) == pytest.approx(real, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["encoding", "validation", "preview"])
def test_the_rehearsal_of_the_rest_takes_what_that_takes(what, precision):
    if precision == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU emulates bfloat16, which takes room of its own; --precision auto is float32 here")
    vae_config = VAEConfig(block_out_channels=(32, 64), norm_num_groups=8)
    unet, vae = UNet(SMALL).requires_grad_(False), VAE(vae_config).to(memory_format=torch.channels_last)

    def preview() -> None:
        unet(torch.randn(2, 4, 32, 32), torch.zeros(2), torch.randn(2, 77, 32))
        vae.decode(torch.randn(1, 4, 32, 32))

    works = {
        "encoding": lambda: vae.encode(torch.randn(3, 3, 64, 64)),
        "validation": lambda: unet(torch.randn(5, 4, 32, 32), torch.zeros(5), torch.randn(5, 77, 32)),
        "preview": preview,
    }
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        works[what]()  # what kernels set up once
        real = allocated_by(works[what])
    rehearsed = rehearse_rest(SMALL, vae_config, (5, 32, 32), 77, precision, 3, 1)
    assert rehearsed[what] == pytest.approx(real, rel=0.15)
    assert rehearse_rest(SMALL, vae_config, (0, 32, 32), 77, precision, 3, 0).keys() == {"encoding"}


def test_the_worst_moment_is_foretold_whichever_it_is():
    unet, cpu = UNet(SMALL), torch.device("cpu")
    trained = bytes_of(unet)

    def worst(**rest: int) -> tuple[str, int]:
        how = {"averaged": True, "rest": lambda: rest}
        parts = forecast(unet, [], (1, 8, 8), 77, 0, cpu, torch.float32, **how).parts
        ((name, size),) = ((name, parts[name]) for name in ("activations", *rest) if name in parts)
        return name, size

    name, step = worst()
    assert name == "activations" and step > 0
    assert worst(preview=trained + step // 2, validation=trained) == ("activations", step)
    assert worst(preview=trained + 2 * step) == ("preview", 2 * step)
    assert worst(encoding=trained + 2 * step) == ("activations", step)  # before there are moments and average
    assert worst(encoding=4 * trained + 2 * step) == ("encoding", 2 * step)
    how = {"rest": lambda: 1 / 0}  # no reason to keep anyone from training, nor to forget what a step takes
    assert forecast(unet, [], (1, 8, 8), 77, 0, cpu, torch.float32, **how).parts["activations"] == step


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_a_run_does_beside_training_is_foretold_for_its_device(device, monkeypatch):
    """On a GPU the VAE comes for previews, and encodes before the U-Net is there."""
    plans, asked = [], []
    peaks = {"encoding": 1000, "validation": 2000, "preview": 3000}
    monkeypatch.setattr(memory_forecast, "rehearse_rest", lambda *how: asked.append(how) or dict(peaks))
    monkeypatch.setattr(memory_forecast, "forecast", lambda *_, **how: plans.append(how["rest"]()))
    model = tiny_model()
    options = UNetOptions(resolution=512, preview_every=5, validate_every=5)
    processes = Processes(0, 1, torch.device(device))
    data = CaptionedLatents(torch.zeros(3), torch.zeros(5), torch.zeros(3), ["", "a", "b"])
    for more, validated in ({}, 8), ({"preview_every": 0, "validate_every": 0}, 8), ({}, 0):
        run = (dataclasses.replace(options, **more), model.unet, model, data)
        memory_forecast.forecast_run(*run, validated, processes, torch.bfloat16)
    vae = 0 if device == "cpu" else bytes_of(model.vae)
    unet = 0 if device == "cpu" else bytes_of(model.unet)
    assert plans[0] == {"encoding": 1000 + vae - unet, "validation": 2000, "preview": 3000 + vae}
    side = 512 // model.vae.config.downsampling
    assert [how[2] for how in asked] == [(8, side, side), (0, side, side), (0, side, side)]
    encodes, previews = (1, 1) if device == "cpu" else (4, 2)
    assert [how[5:7] for how in asked] == [(encodes, previews), (encodes, 0), (encodes, previews)]


@pytest.mark.parametrize(("processes", "parts", "images"), [(1, 1, 16), (2, 1, 8), (2, 4, 2)])
def test_a_step_is_foretold_of_the_images_that_go_through_one_process_at_a_time(processes, parts, images, monkeypatch):
    asked, model = [], tiny_model()
    monkeypatch.setattr(memory_forecast, "forecast", lambda *_, latents, **how: asked.append(latents))
    options = UNetOptions(resolution=64, batch_size=16, gradient_accumulation=parts)
    data = CaptionedLatents(torch.zeros(0), torch.zeros(0), torch.zeros(0), ["", "a"])
    group = Processes(0, processes, torch.device("cpu"))
    memory_forecast.forecast_run(options, model.unet, model, data, 8, group, torch.float32)
    side = 64 // model.vae.config.downsampling
    assert asked == [(images, side, side)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_rehearsal_takes_what_a_gpu_will_take(precision, checkpointing):
    with torch.device("cuda"):
        unet = UNet(SMALL)
        unet.gradient_checkpointing = checkpointing
        x, t, context = torch.randn(8, 4, 64, 64), torch.zeros(8), torch.randn(8, 77, 32)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", precision, precision != torch.float32, cache_enabled=False):
        loss = unet(x, t, context).float().square().mean()
    loss.backward()
    real = torch.cuda.max_memory_allocated() - before
    rehearsed = rehearse_step(SMALL, (8, 64, 64), 77, False, precision, checkpointing, "cuda")
    assert rehearsed == pytest.approx(real, rel=0.25)  # workspaces of cuDNN and cuBLAS are not rehearsed


def test_the_full_size_is_foretold_without_having_it():
    """SD 1.5 at 512×512, bfloat16, checkpointing, no average: what `finetune` takes, whose weights are 3.4 GB."""
    with torch.device("meta"):
        unet = UNet(UNetConfig())
    text = str(forecast(unet, [], (1, 64, 64), 77, 0, torch.device("cpu"), torch.bfloat16, 4, checkpointing=True))
    assert "weights 3.4, gradients 3.4, AdamW 6.9, activations 0.3" in text
    assert 15 < float(re.match(r"Memory: about (\d+\.\d) GB", text)[1]) < 16


def test_the_meter_counts_storages_while_they_live():
    old = torch.zeros(1000)
    with Meter([old]) as meter:
        old.view(10, 100)  # not new
        first = torch.zeros(100)
        view = first[:50]
        assert meter.now == 400
        del first
        assert meter.now == 400  # the view keeps it
        del view
        assert meter.now == 0 and meter.peak == 400
        old + 1
        assert meter.now == 0 and meter.peak == 4000


def test_too_little_memory_is_said_with_a_way_out(monkeypatch):
    monkeypatch.setattr(memory_forecast, "memory_of", lambda device: 10**9)
    unet = UNet(SMALL)
    cpu = torch.device("cpu")
    text = str(forecast(unet, [unet], (4, 32, 32), 77, 10**9, cpu, torch.float32, 2, averaged=True))
    line, warning = text.splitlines()
    assert "data 1.0" in line and "EMA" in line and "this machine has 1.0" in line
    for option in ("--gradient_checkpointing", "--gradient_accumulation 8", "--precision bfloat16", "--ema_decay 0"):
        assert option in warning
    thrifty = str(forecast(unet, [], (1, 32, 32), 77, 10**9, cpu, torch.bfloat16, 8, checkpointing=True))
    assert "try a lower --resolution" in thrifty
    assert "warning" not in str(Forecast({"weights": 10**9}, "GPU", None))


def test_a_container_has_what_it_may_use(tmp_path, monkeypatch):
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr("training.captioned_latents.CONTAINER_LIMIT", limit)
    whole = memory_of(cpu)
    limit.write_text("max\n")
    assert memory_of(cpu) == whole > 10**8
    limit.write_text("12345\n")
    assert memory_of(cpu) == 12345


def test_a_rehearsal_that_fails_keeps_nobody_from_training(monkeypatch):
    def fail(*step) -> int:
        raise NotImplementedError("no fake kernel")

    monkeypatch.setattr(memory_forecast, "rehearse_step", fail)
    text = str(forecast(UNet(SMALL), [], (1, 8, 8), 77, 0, torch.device("cpu"), torch.float32))
    assert "activations not foreseen" in text and "AdamW" in text


def test_the_forecast_is_said_before_the_first_step(sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", sys.stdout)
    finetune(sources["sd1"], tmp_path / "run", "--max_steps", "1")
    said = capsys.readouterr().out
    assert "not foreseen" not in said
    assert 0 < said.index("Memory: about") < said.index("step 1/1: loss")
