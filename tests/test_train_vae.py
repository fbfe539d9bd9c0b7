"""The VAE's training script: crops, losses, measures, and a run that can be stopped."""

import copy
import csv
import filecmp
import json
import os
import signal
from pathlib import Path

import datasets
import pytest
import torch

import monsters
import train_vae as script
from pokemon_dataset import load_images
from tests.tiny import folder_at, tiny_vae
from train_vae import Crops, Options, PatchDiscriminator, adaptive_weight, reconstruction_loss, standardised
from training.reconstruction import measure, to_floats
from training.reproducible import generator_for
from training.script import UserError
from vae_model import VAE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(output: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "monsters:8", "--resolution", "64", "--crop", "32", "--validation_images", "2"),
        *("--block_out_channels", "8", "8", "8", "8", "--norm_num_groups", "4", "--batch_size", "4"),
        *("--layers_per_block", "1"),
        *("--max_steps", "6", "--warmup_steps", "2", "--validate_every", "3", "--checkpoint_every", "3"),
        *("--log_every", "2", "--precision", "float32", "--discriminator_start", "4", "--device", "cpu"),
        *("--wandb", "off", "--output_dir", str(output)),
        *more,
    ]  # fmt: skip


def image_with_a_corner() -> torch.Tensor:
    """White, but for a black square of 32 pixels at the lower right; uint8 (1, 3, 128, 128)."""
    image = torch.full((1, 3, 128, 128), 255, dtype=torch.uint8)
    image[..., 96:, 96:] = 0
    return image


def test_crops_look_where_something_is_drawn() -> None:
    indices = torch.zeros(200, dtype=torch.long)
    seen = Crops(image_with_a_corner(), 32, blank_weight=0.02)(indices, generator_for(CPU, 0))
    anywhere = Crops(image_with_a_corner(), 32, blank_weight=1000.0)(indices, generator_for(CPU, 0))
    share, share_anywhere = ((crops < 0).float().mean().item() for crops in (seen, anywhere))
    assert seen.shape == (200, 3, 32, 32) and seen.min() == -1 and seen.max() == 1
    assert share > 3 * share_anywhere > 0


def test_crops_are_cut_and_mirrored_not_changed() -> None:
    columns = torch.arange(64, dtype=torch.uint8).expand(1, 3, 64, 64).contiguous()
    crops = Crops(columns, 16, 1.0)(torch.zeros(50, dtype=torch.long), generator_for(CPU, 1))
    steps = (crops[:, 0, 0].diff(dim=-1) * 127.5).round()
    assert ((steps == 1).all(dim=1) | (steps == -1).all(dim=1)).all()
    assert (steps == 1).any() and (steps == -1).any()


def test_adaptive_weight_balances_gradients_at_the_last_layer() -> None:
    layer = torch.nn.Parameter(torch.ones(3))
    weight = adaptive_weight(6 * layer.sum(), 2 * layer.sum(), layer)
    assert weight.item() == pytest.approx(3.0, rel=1e-3)


def test_hinge_loss_is_zero_beyond_the_margins() -> None:
    critic = PatchDiscriminator(32)
    real, made = torch.ones(1, 3, 32, 32), -torch.ones(1, 3, 32, 32)
    critic.forward = lambda images: 2 * images  # certain, and right
    assert critic.loss(real, made).item() == 0
    assert critic.loss(made, real).item() == 3  # certain, and wrong


def test_measures_of_a_perfect_and_a_blind_vae() -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)

    class Perfect(torch.nn.Module):
        quant_conv = torch.nn.Conv2d(1, 1, 1)

        def encode(self, pixels: torch.Tensor) -> object:
            return type("Posterior", (), {"mode": lambda _: pixels})()

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            return latents + 10 / 127.5  # ten grey levels off

    psnr, ssim = measure(Perfect(), images.clamp(0, 245))
    assert psnr == pytest.approx(20 * torch.log10(torch.tensor(25.5)).item(), abs=0.05)
    assert 0.9 < ssim < 1
    assert measure(Perfect(), torch.full_like(images, 255)) == (100, 1)  # white stays white: no infinite PSNR


def test_latents_are_standardised_and_reconstructions_stay() -> None:
    """Mean 0 in each channel, variance 1 in all, posterior noise in proportion; the VAE in training is not touched."""
    vae, images = tiny_vae(), torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        vae.quant_conv.bias[:4] = torch.tensor([3.0, -2.0, 0.5, 0.0])
        before = copy.deepcopy(vae.state_dict())
        new = standardised(vae, images, generator_for(CPU, 0))
        assert all(torch.equal(before[name], tensor) for name, tensor in vae.state_dict().items())
        assert new.config.scaling_factor == 0.18215
        old_posterior, posterior = vae.encode(to_floats(images)), new.encode(to_floats(images))
        latents = new.scale_latents(posterior.sample(generator_for(CPU, 1)))
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=0.06, rtol=0)
        assert latents.std().item() == pytest.approx(1.0, abs=0.05)
        ratio = (posterior.logvar - old_posterior.logvar).mul(0.5).exp()
        scale = posterior.mean.std(dim=(0, 2, 3)) / old_posterior.mean.std(dim=(0, 2, 3))
        torch.testing.assert_close(ratio, scale[:, None, None].expand_as(ratio), rtol=1e-3, atol=1e-6)
        noise = torch.randn(posterior.mean.shape)
        old, made = vae.decode(old_posterior.sample(noise=noise)), new.decode(posterior.sample(noise=noise))
        torch.testing.assert_close(made, old, rtol=1e-5, atol=1e-5)


def test_stopped_run_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.main(arguments(tmp_path / "whole"))
    stop_in_step(monkeypatch, 4)
    script.main(arguments(tmp_path / "parted"))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "parted" / "checkpoints").glob("step_*")][-1] == "step_00000004.pt"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    script.main(["--resume", "--output_dir", str(tmp_path / "parted")])

    files = [tmp_path / run / "checkpoints" / "step_00000006.pt" for run in ("whole", "parted")]
    whole, parted = (torch.load(file, weights_only=True) for file in files)
    for part in ("vae", "ema", "discriminator"):
        assert all(torch.equal(whole[part][name], parted[part][name]) for name in whole[part])
    for name in ("metrics.csv", "scores.json", "samples/step_000003.png", "samples/step_000006.png"):
        assert filecmp.cmp(tmp_path / "whole" / name, tmp_path / "parted" / name, shallow=False), name

    vae = VAE.load(tmp_path / "whole" / "vae_model.pth")
    for name, tensor in vae.state_dict().items():  # the average is what is saved, standardised
        if "quant_conv" not in name:
            torch.testing.assert_close(tensor, whole["ema"][name], rtol=1e-3, atol=1e-6)
    pixels = to_floats(load_images("monsters:8", 32)[0])
    with torch.no_grad():
        latents = vae.scale_latents(vae.encode(pixels).mode())
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.5
    assert not torch.allclose(vae.post_quant_conv.weight, whole["ema"]["post_quant_conv.weight"], rtol=0.01)
    assert any(not torch.equal(whole["ema"][name], whole["vae"][name]) for name in whole["vae"])
    with open(tmp_path / "whole" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["psnr"] for row in rows) and any(row["kl"] for row in rows)
    assert json.loads((tmp_path / "whole" / "scores.json").read_text())["held_out"]["monsters:8"]["psnr"] > 0


def test_other_images_are_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        monsters.draw(i, 64).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(monsters.caption(i))
    script.main(arguments(tmp_path / "run", "--dataset", str(folder), "--max_steps", "1", "--validate_every", "0"))
    monsters.draw(9, 64).save(folder / "3.png")
    with pytest.raises(UserError, match="the data set is not what it was"):
        script.main(["--resume", "--output_dir", str(tmp_path / "run"), "--max_steps", "2"])


def stop_in_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Sends this process SIGTERM in its `number`-th training step."""
    calls, train_step = [], script.Run.train_step

    def stopping(self: script.Run, *args: object) -> dict:
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, *args)

    monkeypatch.setattr(script.Run, "train_step", stopping)


def test_a_validation_that_was_stopped_is_left_to_the_next_run_and_logged_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, one = tmp_path / "run", torch.ones(())
    monkeypatch.setattr(script.RunFolder, "plot", lambda *_, **how: None)  # takes half a second
    with folder_at(path) as folder:
        run = script.Run(script.parse_options(Options, arguments(path, "--max_steps", "1")), folder)
        run.reporter.record(learning_rate=0.1, loss=one, gradient_norm=one)
        run.reporter.stop.asked = True  # after the step
        run.after_step()
        assert run.reporter.state()["undone"] == ["checkpoint", "validation"] and not (path / "scores.json").exists()
    monkeypatch.setattr(script.Run, "save", lambda *_, **how: None)  # killed before its checkpoint
    for _ in range(2):
        with folder_at(path, resume=True) as folder:
            script.Run(script.parse_options(Options, ["--resume", "--output_dir", str(path)]), folder).after_step()
            assert [row["step"] for row in folder.metrics() if row["psnr"]] == ["1"]


def test_goes_on_from_a_vae(tmp_path: Path) -> None:
    tiny_vae().save(tmp_path / "vae_model.pth")
    script.main(arguments(tmp_path / "run", "--pretrained", str(tmp_path / "vae_model.pth"), "--max_steps", "1"))
    assert (tmp_path / "run" / "vae_model.pth").is_file()


def test_rates_are_set_and_the_best_is_the_one_with_the_highest_psnr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    psnr, rates, judged, step = iter([30.0, 20.0]), [], [], script.Run.train_step

    def stepping(self: script.Run, *args: object) -> dict:
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(script.Run, "train_step", stepping)
    monkeypatch.setattr(script, "measure", lambda vae, images: (judged.append(vae), (next(psnr), 0.5))[1])
    script.main(arguments(tmp_path / "run"))
    assert rates == [script.learning_rate_at(i, 1e-3, 2, 6, floor=0.02) for i in range(6)]
    best = torch.load(tmp_path / "run" / "checkpoints" / "best.pt", weights_only=True)
    assert best["step"] == 3
    vae = {name: p for name, p in judged[-1].state_dict().items()}
    last = torch.load(tmp_path / "run" / "checkpoints" / "step_00000006.pt", weights_only=True)
    assert all(torch.equal(vae[name], last["ema"][name]) for name in vae)


def test_each_step_draws_its_own_posterior_noise(tmp_path: Path) -> None:
    run, seen = make_run(tmp_path), []
    forward = run.vae.decode
    run.vae.decode = lambda latents: (seen.append(latents.detach().clone()), forward(latents))[1]
    run.optimizer.step = lambda: None
    for step in (1, 2, 1):
        run.train_step(crops_of_a_corner(), step)
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


def make_run(tmp_path: Path, *more: str) -> script.Run:
    options = script.parse_options(Options, arguments(tmp_path / "run", "--validate_every", "0", *more))
    return script.Run(options, folder_at(tmp_path / "run"))


def crops_of_a_corner() -> torch.Tensor:
    return Crops(image_with_a_corner(), 32, 0.02)(torch.zeros(8, dtype=torch.long), generator_for(CPU, 0))


def test_it_learns(tmp_path: Path) -> None:
    """A few dozen steps on one batch of crops: the error falls well below that of the start."""
    run = make_run(
        tmp_path,
        "--block_out_channels",
        "8",
        "16",
        "16",
        "16",
        "--learning_rate",
        "5e-3",
        "--discriminator_start",
        "-1",
    )
    losses = [run.train_step(crops_of_a_corner(), step)["loss"].item() for step in range(40)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_loss_adds_its_terms_with_their_weights() -> None:
    images = torch.rand(2, 3, 8, 8) * 2 - 1

    def reconstruct(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return images + 0.5, torch.tensor([30.0, 66.0])  # KL in nats of each image

    options = Options(l1_weight=2.0, l2_weight=10.0, kl_weight=3.0)
    terms = reconstruction_loss(reconstruct, images, options)
    assert terms["loss"].item() == pytest.approx(2 * 0.5 + 10 * 0.25 + 3 * 96 / images.numel())
    assert terms["kl"].item() == pytest.approx(96 / images.numel())


def test_the_discriminator_joins_in_when_it_is_told_to(tmp_path: Path) -> None:
    """Before its start neither network hears of the other; from it on the VAE is pulled by it, and it learns itself."""
    runs = {}
    for name, start, weight in (("never", -1, 0.5), ("now", 0, 0.5), ("weightless", 0, 0.0), ("later", 5, 0.5)):
        torch.manual_seed(0)
        run = make_run(tmp_path / name, "--discriminator_start", str(start), "--discriminator_weight", str(weight))
        critic = [p.clone() for p in run.discriminator.parameters()]
        run.train_step(crops_of_a_corner(), 0)
        learned = any(not torch.equal(a, b) for a, b in zip(critic, run.discriminator.parameters(), strict=True))
        runs[name] = (torch.cat([p.flatten() for p in run.vae.parameters()]), learned)
    assert [learned for _, learned in runs.values()] == [False, True, True, False]
    assert torch.equal(runs["never"][0], runs["later"][0])
    assert torch.equal(runs["never"][0], runs["weightless"][0])
    assert not torch.equal(runs["never"][0], runs["now"][0])


def test_the_decoder_learns_to_look_real(tmp_path: Path) -> None:
    """Where a discriminator likes bright images, its part of the gradient makes the decoder's brighter."""
    shifts = []
    for weight in ("0", "0.9"):
        torch.manual_seed(0)
        run = make_run(tmp_path / weight, "--discriminator_start", "0", "--discriminator_weight", weight)
        run.discriminator.forward = lambda images: images.mean(dim=1, keepdim=True)
        run.critic.step = lambda: None
        run.discriminator.loss = lambda real, made: run.discriminator.layers[0].bias.sum() * 0  # noqa: B023
        before = run.vae.decoder.conv_out.bias.sum().item()
        run.train_step(torch.zeros(4, 3, 32, 32), 0)
        shifts.append(run.vae.decoder.conv_out.bias.sum().item() - before)
    assert shifts[1] > shifts[0]


def test_the_discriminator_learns_from_its_own_loss_alone(tmp_path: Path) -> None:
    """The gradients that pass through it on their way to the VAE are not added to its own."""
    run = make_run(tmp_path, "--discriminator_start", "0", "--gradient_clip", "0")
    seen: list[list[torch.Tensor]] = []
    before = [p.detach().clone() for p in run.discriminator.parameters()]
    step = run.critic.step
    run.critic.step = lambda: (seen.append([p.grad.clone() for p in run.discriminator.parameters()]), step())
    real = crops_of_a_corner()
    torch.manual_seed(run.options.seed * 1_000_003)
    with torch.no_grad():
        made, _ = run.reconstruct(real)
    run.train_step(real, 0)
    for parameter, value in zip(run.discriminator.parameters(), before, strict=True):
        parameter.data.copy_(value)
    expected = torch.autograd.grad(run.discriminator.loss(real, made), list(run.discriminator.parameters()))
    for ours, theirs in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--crop", "100"], "--crop 100"),
        (["--validation_images", "20"], "--validation_images 20"),
        (["--pretrained", "./nowhere.pth"], "nowhere.pth"),
        (["--dataset", "./nowhere"], "--dataset ./nowhere"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        script.main(arguments(tmp_path / "run", *more))
