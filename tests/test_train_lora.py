"""Training by LoRA: what is trained, saved, resumed and foretold."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

import lora
import sample_stable_diffusion
import train_stable_diffusion as script
from diffusion_model import UNet, UNetConfig
from images import read_parameters
from published import read_lora
from stable_diffusion_model import StableDiffusion
from tests.conftest import ROOT
from tests.test_interchange import make_folder
from tests.tiny import tiny_model, tiny_unet
from training import low_rank
from training.captioned_latents import CaptionedLatents
from training.encoded_cache import fingerprint
from training.memory_forecast import bytes_of, forecast, forecast_run, rehearse_rest, rehearse_step
from training.options import parse_options
from training.presets import PRESETS, UNetOptions
from training.reproducible import EMA, Processes
from training.run_folder import load_checkpoint
from training.script import UserError
from vae_model import VAE, VAEConfig


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("training.memory_forecast.rehearse_step", lambda *_: 0)
    monkeypatch.setattr("training.memory_forecast.rehearse_rest", lambda *_: dict.fromkeys(("preview", "encoding"), 0))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "tiny"
    tiny_model().save_pretrained(path)
    return path


def train(base: Path, output: Path, *more: str) -> Path:
    script.main([
        *("--preset", "lora", "--pretrained", str(base), "--dataset", "monsters:8", "--resolution", "64"),
        *("--max_steps", "6", "--batch_size", "4", "--gradient_accumulation", "2", "--warmup_steps", "1"),
        *("--learning_rate", "1e-2", "--validation_share", "0.25", "--preview_prompts", "a fox", "--log_every", "1"),
        *("--checkpoint_every", "3", "--validate_every", "3", "--preview_steps", "1", "--device", "cpu"),
        *("--precision", "float32", "--wandb", "off", "--save_precision", "float32"),
        *("--output_dir", str(output), *more),
    ])  # fmt: skip
    return output


def learned(run: Path) -> dict:
    return load_checkpoint(run, torch.device("cpu"))


@pytest.mark.parametrize("factor", [1, 3], ids=["alpha as the rank", "three times the rank"])
def test_only_the_low_rank_weights_are_trained_and_kept(base: Path, tmp_path: Path, capsys, factor: int) -> None:
    run = train(base, tmp_path / "run", *(["--lora_alpha", str(8 * factor)] if factor > 1 else []))
    state = learned(run)
    assert state["unet"].keys() == state["ema"].keys()
    assert all(".changes.default." in name for name in state["unet"])
    assert all(t.any() for t in state["ema"].values())
    assert not (run / "model").exists()
    assert sum(file.stat().st_size for file in (run / "lora").iterdir()) < 100_000
    assert (run / "best_lora").exists()
    assert (run / "samples" / "latest.png").exists()

    # The file holds the average, and what it does to the model is what was trained.
    model = StableDiffusion.from_pretrained(base, "cpu")
    unet = model.unet
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    model.load_lora(run / "lora")
    changed = lora.adapted(unet)
    assert list(changed) == lora.targets(tiny_unet())
    for name, layer in changed.items():
        down, up = (state["ema"][f"{name}.changes.default.{half}.weight"] for half in ("down", "up"))
        torch.testing.assert_close(layer.weight, before[f"{name}.weight"] + factor * up @ down)
    printed = capsys.readouterr().out
    command = next(line for line in printed.splitlines() if line.startswith("Sample from it:"))
    assert command.endswith(f"--model {base} --lora {run / 'lora'}")


def test_a_resumed_run_ends_with_the_same_bits(base: Path, tmp_path: Path) -> None:
    whole = learned(train(base, tmp_path / "whole"))
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for checkpoint in (cut / "checkpoints").iterdir():
        if "000003" not in checkpoint.name:
            checkpoint.unlink()
    assert learned(cut)["step"] == 3
    script.main(["--preset", "lora", "--output_dir", str(cut), "--resume"])
    assert learned(cut)["step"] == 6
    for part in ("unet", "ema"):
        assert all(torch.equal(whole[part][name], learned(cut)[part][name]) for name in whole[part])


def test_the_forecast_counts_what_is_trained(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an average, which is what the model holds meanwhile, and is itself not trained."""
    plans, made, rehearsed = [], script.forecast_run, []
    monkeypatch.setattr(script, "forecast_run", lambda *args: plans.append(made(*args)) or plans[-1])
    monkeypatch.setattr("training.memory_forecast.rehearse_step", lambda *step: rehearsed.append(step[-1]) or 0)
    run = train(base, tmp_path / "run", "--lora_layers", "all", "--lora_rank", "3")
    weights = learned(run)["unet"]
    assert {name.partition(".changes.")[0] for name in weights} == set(lora.targets(tiny_unet(), "all"))
    numbers = 4 * sum(tensor.numel() for tensor in weights.values())
    parts = plans[0].parts
    assert (parts["gradients"], parts["AdamW"], parts["EMA"]) == (numbers, 2 * numbers, numbers)
    assert parts["weights"] > 5 * numbers
    assert {name for name, p in rehearsed[0](tiny_unet()).named_parameters() if p.requires_grad} == weights.keys()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_would_make_it_less_is_something_that_a_lora_may_have(device: str, monkeypatch) -> None:
    monkeypatch.setattr("training.memory_forecast.memory_of", lambda _: 1)
    unet = low_rank.adapt(tiny_unet(), UNetOptions(lora_rank=2), torch.float32)
    frugal = {"checkpointing": True, "averaged": True}
    plan = forecast(unet, [], (1, 8, 8), 77, 0, torch.device(device), torch.float32, 4, **frugal)
    assert plan.parts["EMA"] and plan.remedies == ["--precision bfloat16", "a lower --resolution"]


def test_the_rehearsal_gives_no_gradients_to_what_is_frozen() -> None:
    """Those of the first micro-batch, which are there while the second goes through."""
    adapt = partial(low_rank.adapt, options=UNetOptions(lora_rank=2), precision=torch.float32)
    config = tiny_unet().config
    alone, after_another = (
        rehearse_step(config, (1, 8, 8), 77, accumulates, torch.float32, False, adapt=adapt)
        for accumulates in (False, True)
    )
    assert after_another - alone < 2 * bytes_of(adapt(tiny_unet()), trained_only=True)


def test_the_rehearsed_validation_needs_no_copies_of_what_is_frozen_in_bfloat16() -> None:
    """Which autocast would make of each matrix in float32."""
    adapt = partial(low_rank.adapt, options=UNetOptions(lora_rank=2), precision=torch.bfloat16)
    vae_config = VAEConfig(block_out_channels=(8,), layers_per_block=1, norm_num_groups=4)
    config = UNetConfig(block_out_channels=(16,), attention_levels=(True,), layers_per_block=1, norm_num_groups=8)
    how = (config, vae_config, (1, 8, 8), 77, torch.bfloat16, 1, 0)
    assert rehearse_rest(*how, adapt=adapt)["validation"] < rehearse_rest(*how)["validation"]


def test_the_frozen_matrices_are_in_the_precision_of_the_run(base: Path, tmp_path: Path, monkeypatch) -> None:
    seen = []
    unit = torch.ones(())  # what a step says of loss and gradient
    monkeypatch.setattr(script, "train_step", lambda unet, *_: seen.append(unet.conv_in) or (unit, unit))
    quick = ("--max_steps", "1", "--preview_every", "0", "--validate_every", "0")
    train(base, tmp_path / "run", "--precision", "bfloat16", *quick)
    assert seen[0].weight.dtype == seen[0].bias.dtype == torch.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_the_base_is_never_there_in_float32(base: Path, tmp_path: Path, stored: torch.dtype, monkeypatch) -> None:
    """It is read where it lies; and known again in whichever precision a run goes on."""
    seen, adapt, load_model = [], low_rank.adapt, low_rank.load_model

    def watched(unet: UNet, *how: object) -> UNet:
        seen.append({name: p.data_ptr() for name, p in unet.named_parameters()})
        return adapt(unet, *how)

    monkeypatch.setattr(low_rank, "adapt", watched)
    monkeypatch.setattr(low_rank, "load_model", lambda path, dtype: load_model(path, asked.append(dtype) or dtype))
    asked = []
    StableDiffusion.from_pretrained(base, "cpu").save_pretrained(tmp_path / "base", stored)
    options = UNetOptions(pretrained=str(tmp_path / "base"), lora_rank=2, output_dir=str(tmp_path / "run"))
    digests, norms = set(), set()
    for precision in (torch.float32, torch.bfloat16, torch.float16):
        model, digest = low_rank.build_model(options, precision)
        digests.add(digest)
        norms.add(model.unet.conv_norm_out.weight.dtype)
        own = dict(model.unet.named_parameters())
        assert all(own[name].data_ptr() != in_file for name, in_file in seen[-1].items())
        assert model.unet.conv_in.weight.dtype == precision and model.name == "run"
    assert norms == {torch.float32} and set(asked) == {None}
    assert digests == {fingerprint(StableDiffusion.from_pretrained(tmp_path / "base", "cpu").unet)}  # of float32


def test_the_memory_of_the_weights_before_is_given_back(monkeypatch) -> None:
    """Else a `pokemon` U-Net stood at 1.2 times its size in bfloat16."""
    seen, unet = [], tiny_unet()
    monkeypatch.setattr(low_rank, "give_memory_back", lambda: seen.append(unet.conv_in.weight.dtype))
    low_rank.adapt(unet, UNetOptions(lora_rank=2), torch.bfloat16)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("wanted", ["yes", "no"])
def test_gradient_checkpointing_reaches_the_network(base: Path, tmp_path: Path, wanted: str, monkeypatch) -> None:
    seen = []
    unit = torch.ones(())  # what a step says of loss and gradient
    monkeypatch.setattr(script, "train_step", lambda unet, *_: seen.append(unet.gradient_checkpointing) or (unit, unit))
    train(base, tmp_path / "run", "--gradient_checkpointing", wanted, "--max_steps", "1")
    assert seen == [wanted == "yes"]


@pytest.mark.parametrize("other", ["--lora_layers all", "--lora_alpha 3", "--lora_rank 4"])
def test_what_a_lora_is_stays(base: Path, tmp_path: Path, other: str) -> None:
    train(base, tmp_path / "run", "--max_steps", "3")
    with pytest.raises(UserError, match=f"{other}.*a resumed run may change only"):
        script.main(["--preset", "lora", "--output_dir", str(tmp_path / "run"), "--resume", *other.split()])


def test_a_base_that_has_moved_is_known_by_all_its_weights(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run", "--max_steps", "3")
    (tmp_path / "base").rename(tmp_path / "moved")
    go_on = ["--preset", "lora", "--output_dir", str(tmp_path / "run"), "--resume"]
    go_on += ["--pretrained", str(tmp_path / "moved"), "--precision", "bfloat16"]  # the weights as they are in the file
    script.main([*go_on, "--max_steps", "6"])
    assert learned(tmp_path / "run")["step"] == 6
    model = StableDiffusion.from_pretrained(tmp_path / "moved", "cpu")
    with torch.no_grad():
        model.unet.conv_out.weight[0, 0, 0, 0] += 1
    model.save_pretrained(tmp_path / "moved")
    with pytest.raises(UserError, match="has other weights than when the run was begun"):
        script.main([*go_on, "--max_steps", "9"])


def test_a_lora_is_kept_and_put_back_as_a_model_is(base: Path, tmp_path: Path) -> None:
    run = train(base, tmp_path / "run", "--max_steps", "1")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="holds a lora already"):
        train(base, run)
    written = (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes()
    for name in ("lora", "best_lora"):
        (run / name).rename(run / f".{name}.old")  # a kill between the two renames
    with pytest.raises(UserError, match="holds a lora already"):
        train(base, run)
    assert (run / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == written
    assert (run / "best_lora").is_dir()


@pytest.mark.parametrize(("preset", "may_move"), [("lora", True), ("finetune", False)])
def test_only_the_base_of_a_lora_may_have_moved(tmp_path: Path, preset: str, may_move: bool) -> None:
    """A run that trains all weights does not know its base by them."""
    rank = PRESETS[preset].get("lora_rank", 0)
    run = {"kind": "UNetOptions", "options": {"preset": preset, "pretrained": "here", "lora_rank": rank}}
    (tmp_path / "config.json").write_text(json.dumps(run))
    argv = ["--preset", preset, "--output_dir", str(tmp_path), "--resume", "--pretrained", "there"]
    if may_move:
        assert parse_options(UNetOptions, argv, PRESETS, "pokemon").pretrained == "there"
    else:
        with pytest.raises(UserError, match=r"--pretrained there: the run in .* has here"):
            parse_options(UNetOptions, argv, PRESETS, "pokemon")


def test_a_checkpoint_of_another_lora_says_what_is_other() -> None:
    unet = low_rank.adapt(tiny_unet(), UNetOptions(lora_rank=2), torch.float32)
    trained = {name for name, p in unet.named_parameters() if p.requires_grad}
    state = low_rank.trained_state(unet, trained)
    low_rank.load_trained(unet, state, trained)
    name, tensor = next(iter(state.items()))
    for others in ({other: t for other, t in state.items() if other != name}, state | {"more": tensor}):
        with pytest.raises(RuntimeError, match="is in one of them only"):
            low_rank.load_trained(unet, others, trained)
    wider = low_rank.adapt(tiny_unet(), UNetOptions(lora_rank=3), torch.float32)
    with pytest.raises(RuntimeError, match="a LoRA of rank 3, not 2"):
        low_rank.load_trained(unet, low_rank.trained_state(wider, trained), trained)
    with pytest.raises(RuntimeError, match=r"up.weight is \(1,\), not \("):
        low_rank.load_trained(unet, {k: t[:1, 0] if k.endswith("up.weight") else t for k, t in state.items()}, trained)


def test_the_base_is_not_overwritten_by_its_lora(base: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(base, run / "model")
    with pytest.raises(UserError, match=r"--overwrite: .*run holds .*model, without which its LoRA is of no use"):
        train(run / "model", run, "--overwrite")
    assert (run / "model" / "unet").is_dir()


def test_a_seed_begins_with_the_same_matrices_whatever_was_read_before(base: Path, tmp_path: Path) -> None:
    StableDiffusion.from_pretrained(base, "cpu").export(tmp_path / "one.safetensors")
    begun = []
    for source, seed in ((base, 0), (tmp_path / "one.safetensors", 0), (base, 1)):
        torch.rand(7)
        options = UNetOptions(pretrained=str(source), lora_rank=2, seed=seed)
        model, _ = low_rank.build_model(options, torch.float32)
        begun.append(next(iter(lora.adapted(model.unet).values())).changes["default"].down.weight)
    assert torch.equal(begun[0], begun[1]) and not torch.equal(begun[0], begun[2])


def test_another_base_is_no_base_to_resume_on(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    train(tmp_path / "base", tmp_path / "run", "--max_steps", "3")
    with torch.no_grad():
        model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="has other weights than when the run was begun"):
        script.main(["--preset", "lora", "--output_dir", str(tmp_path / "run"), "--resume", "--max_steps", "6"])


def test_a_frozen_matrix_in_bfloat16_changes_no_bit() -> None:
    """Autocast computes in copies of that type anyway."""
    options = UNetOptions(lora_rank=2, pretrained="x")
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([1, 900]), torch.randn(2, 77, 32)
    torch.manual_seed(0)
    unet = tiny_unet()
    results = []
    for precision in (torch.float32, torch.bfloat16):
        torch.manual_seed(1)
        network = tiny_unet()
        network.load_state_dict(unet.state_dict())
        low_rank.adapt(network, options, precision)
        for change in (layer.changes["default"] for layer in lora.adapted(network).values()):
            torch.nn.init.normal_(change.up.weight, std=0.1, generator=torch.Generator().manual_seed(0))
            torch.nn.init.normal_(change.down.weight, std=0.1, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            out = network(x, t, context)
        out.float().square().mean().backward()
        results.append((out, [p.grad for p in network.parameters() if p.requires_grad]))
        assert all(p.grad is None for p in network.parameters() if not p.requires_grad)
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert network.conv_in.weight.dtype == network.conv_in.bias.dtype == torch.bfloat16
    assert network.conv_norm_out.weight.dtype == torch.float32
    assert next(iter(lora.adapted(network).values())).changes["default"].up.weight.dtype == torch.float32


def test_the_average_shares_what_is_frozen() -> None:
    unet = low_rank.adapt(tiny_unet(), UNetOptions(lora_rank=2), torch.float32)
    average = EMA(unet, 0.5)
    with torch.no_grad():
        for p in unet.parameters():
            if p.requires_grad:
                p += 1
    before = [p.clone() for p in average.module.parameters()]
    average.update(unet, 10)
    for (name, p), own, old in zip(unet.named_parameters(), average.module.parameters(), before, strict=True):
        assert (own is p) == ("changes" not in name)
        assert torch.equal(own, old) == ("changes" not in name)


def test_what_does_not_go_together(base: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"lora_rank": 4}, "--lora_rank: LoRA changes a model that is trained already; say which with --pretrained"),
        ({"lora_rank": 4, "pretrained": "x", "ema_on_cpu": True}, "--ema_on_cpu: the average of a LoRA is small"),
        (
            {"lora_rank": 4, "pretrained": "x", "vae": "y"},
            r"--vae: only .* a --pretrained that has .*save_pretrained\)",
        ),
        (
            {"lora_rank": 4, "pretrained": "x", "text_encoder": "y"},
            r"--text_encoder: only .* \(set model.text_encoder ",
        ),
        ({"pretrained": "x", "lora_layers": "all"}, "--lora_layers: without --lora_rank all weights are trained"),
        ({"pretrained": "x", "lora_alpha": 4.0}, "--lora_alpha: without --lora_rank all weights are trained"),
    ):
        with pytest.raises(UserError, match=message):
            low_rank.check(UNetOptions(**options))
    with pytest.raises(UserError, match="--lora_rank"):
        script.main(["--preset", "monsters", "--lora_rank", "4", "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--prediction_type", "v_prediction"], "--prediction_type v_prediction: .* predicts epsilon"),
        (["--pretrained", "./nowhere"], r"'./nowhere' does not exist; .*; or .*--pretrained"),
    ],
)
def test_a_base_that_cannot_be_is_refused_in_one_sentence(
    base: Path, tmp_path: Path, more: list, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        train(base, tmp_path / "run", *more)
    assert not (tmp_path / "run").exists()


def unet_of(options: UNetOptions) -> UNet:
    """What the options train, without its numbers."""
    with torch.device("meta"):
        if options.pretrained:  # Stable Diffusion 1.5
            return low_rank.adapt(UNet(UNetConfig()), options, torch.bfloat16)
        return UNet(script.unet_config(options, latent_channels=4, context_dim=768))


IN_README = {  # GB at 512×512 in bfloat16 on two cores, all included
    "--preset lora": 4.2,
    "--preset lora --gradient_accumulation 1": 4.3,
    "--preset pokemon --gradient_accumulation 8": 5.8,
    "--preset pokemon": 11.7,
}


@pytest.mark.parametrize("words", IN_README)
def test_eight_gigabytes_are_enough(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README says, which names each of these figures."""
    options = parse_options(UNetOptions, [*words.split(), "--dataset", "x"], PRESETS, "pokemon")
    clip = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    with torch.device("meta"):
        vae, text_model = VAE(VAEConfig()), CLIPTextModel(CLIPTextConfig(**clip))
    model = SimpleNamespace(vae=vae, text_encoder=SimpleNamespace(model=text_model, length=77))
    data = CaptionedLatents(torch.zeros(0), torch.zeros(0), torch.zeros(0), ["", "a drawing of sks"])
    monkeypatch.setattr("training.memory_forecast.rehearse_step", rehearse_step)
    monkeypatch.setattr("training.memory_forecast.rehearse_rest", rehearse_rest)
    monkeypatch.setattr("training.memory_forecast.batches_at_once", lambda *_: 2)
    plan = forecast_run(options, unet_of(options), model, data, 8, Processes(0, 1, torch.device("cpu")), torch.bfloat16)
    assert plan.rehearsed
    assert plan.total / 1e9 == pytest.approx(IN_README[words], abs=0.1)
    assert f"{IN_README[words]} " in (ROOT / "README.md").read_text(encoding="utf-8").replace(")", " ")
    if options.lora_rank:
        assert plan.parts["weights"] < 1.8e9 and plan.parts["gradients"] < 1e7


def test_small_matrices_learn_at_a_higher_rate_than_all_weights() -> None:
    """They begin at zero."""
    assert PRESETS["lora"]["learning_rate"] >= 10 * PRESETS["finetune"]["learning_rate"]


def test_thirty_images_without_captions(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawings").mkdir()
    for k in range(6):
        Image.new("RGB", (70, 64), (40 * k, 0, 90)).save(tmp_path / "drawings" / f"{k}.png")
    words = ("--dataset", str(tmp_path / "drawings"), "--caption", "a drawing of sks")
    run = train(base, tmp_path / "run", *words, "--validation_share", "0", "--batch_size", "2")
    assert read_lora(run / "lora" / "pytorch_lora_weights.safetensors")["unet"]

    # And sampled from, by the command line.
    monkeypatch.chdir(tmp_path)
    other = str(shutil.copytree(run / "lora", run / "other"))
    small = ["--steps", "1", "--height", "64", "--width", "64", "--device", "cpu", "--model", str(base)]
    pixels = {}
    for words, said in (
        ([], None),
        (["--lora", str(run / "lora"), "--lora_scale", "0"], "run:0"),
        (["--lora", str(run / "lora")], "run:1"),
        (["--lora", str(run / "lora"), "--lora", other, "--lora_scale", "0.5"], "run:0.5, other:1"),
    ):
        sample_stable_diffusion.main(["a drawing of sks", *small, *words, "--output", "x.png"])
        assert read_parameters("x.png").get("LoRA") == said
        pixels[said] = np.asarray(Image.open("x.png")).astype(int)
    assert (pixels["run:0"] == pixels[None]).all()
    assert (pixels["run:1"] != pixels[None]).any()
    with pytest.raises(UserError, match="--lora_scale: give a --lora for each"):
        sample_stable_diffusion.parse(["a", "--lora_scale", "1"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        sample_stable_diffusion.main(["a", *small, "--lora", "./nowhere.safetensors"])


@pytest.mark.slow
def test_the_full_size_stays_within_what_is_foretold(tmp_path: Path) -> None:
    """Two steps, a validation and a preview on a model of SD 1.5's shape: what the process takes from start to end."""
    folder = make_folder(tmp_path / "sd15", 1, full_size=True)
    (tmp_path / "drawings").mkdir()
    for k in range(4):
        Image.new("RGB", (512, 512), (60 * k, 0, 90)).save(tmp_path / "drawings" / f"{k}.png")
    argv = ["--preset", "lora", "--pretrained", str(folder), "--dataset", str(tmp_path / "drawings")]
    argv += ["--caption", "a fox", "--max_steps", "2", "--preview_every", "2", "--preview_steps", "1", "--wandb", "off"]
    argv += ["--validation_share", "0.25", "--validate_every", "2", "--device", "cpu", "--precision", "bfloat16"]
    argv += ["--output_dir", str(tmp_path / "run")]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    del environment["OMP_NUM_THREADS"]  # as many as a user has
    code = WATCHED.format(argv=argv)
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr[-3000:]
    foretold = float(ended.stdout.split("Memory: about ")[1].split()[0])
    peak = int(ended.stdout.rpartition("at most ")[2]) / 1e6
    print(f"foretold {foretold} GB, at most {peak} GB")
    assert (tmp_path / "run" / "samples" / "latest.png").exists()
    assert peak <= foretold < 8


# Memory of the process's own; pages of the model's file, which is mapped while it is read, are the system's to drop.
WATCHED = """
import re, threading, time
peak = 0
def watch():
    global peak
    while True:
        status = open("/proc/self/status").read()
        peak = max(peak, sum(int(re.search(f"{{name}}:\\s*(\\d+)", status)[1]) for name in ("RssAnon", "RssShmem")))
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
import train_stable_diffusion
train_stable_diffusion.main({argv})
print("at most", peak)
"""
