"""The VAE's training script: crops, losses, measures, and a run that can be stopped."""

import csv
import json
from pathlib import Path

import datasets
import pytest
import torch

import train_vae as script
from tests.tiny import tiny_vae
from train_vae import Crops, Options, PatchDiscriminator, adaptive_weight, measure, measure_scaling_factor, to_floats
from training import generator_for
from vae_model import VAE

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def arguments(output: Path, *more: str) -> list[str]:
    return [
        *("--dataset", "monsters:8", "--resolution", "64", "--crop", "32", "--validation_pictures", "2"),
        *("--block_out_channels", "8", "8", "8", "8", "--norm_num_groups", "4", "--batch_size", "4"),
        *("--layers_per_block", "1"),
        *("--max_steps", "6", "--warmup_steps", "2", "--validate_every", "3", "--checkpoint_every", "3"),
        *("--log_every", "2", "--precision", "float32", "--discriminator_start", "4", "--device", "cpu"),
        *("--wandb", "off", "--output_dir", str(output)),
        *more,
    ]  # fmt: skip


def picture_with_a_corner() -> torch.Tensor:
    """White, but for a black square of 32 pixels at the lower right; uint8 (1, 3, 128, 128)."""
    picture = torch.full((1, 3, 128, 128), 255, dtype=torch.uint8)
    picture[..., 96:, 96:] = 0
    return picture


def test_crops_look_where_something_is_drawn() -> None:
    indices = torch.zeros(200, dtype=torch.long)
    seen = Crops(picture_with_a_corner(), 32, blank_weight=0.02)(indices, generator_for(CPU, 0))
    anywhere = Crops(picture_with_a_corner(), 32, blank_weight=1000.0)(indices, generator_for(CPU, 0))
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


def test_scaling_factor_gives_unit_variance() -> None:
    vae, images = tiny_vae(), torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    factor = measure_scaling_factor(vae, images, generator_for(CPU, 0))
    with torch.no_grad():
        latents = vae.encode(to_floats(images)).sample(generator_for(CPU, 1)) * factor
    assert latents.std().item() == pytest.approx(1.0, abs=0.05)


def test_run_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script.main(arguments(tmp_path / "whole"))

    class StopsEarly:
        checks = 0

        @property
        def asked(self) -> bool:
            StopsEarly.checks += 1
            return StopsEarly.checks > 9

    with monkeypatch.context() as patch:
        patch.setattr(script, "StopRequest", StopsEarly)
        script.main(arguments(tmp_path / "parted"))
    assert torch.load(tmp_path / "parted" / "training_state.pt", weights_only=True)["step"] < 6
    script.main(["--resume", "--output_dir", str(tmp_path / "parted")])

    whole, parted = (torch.load(tmp_path / run / "training_state.pt", weights_only=True) for run in ("whole", "parted"))
    assert whole["step"] == parted["step"] == 6
    for part in ("vae", "ema", "discriminator"):
        assert all(torch.equal(whole[part][name], parted[part][name]) for name in whole[part])

    vae = VAE.load(tmp_path / "whole" / "vae_model.pth")
    assert vae.config.scaling_factor != 0.18215  # its own, measured
    with open(tmp_path / "whole" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert any(row["psnr"] for row in rows) and any(row["kl"] for row in rows)
    assert json.loads((tmp_path / "whole" / "scores.json").read_text())["held_out"]["monsters:8"]["psnr"] > 0
    assert (tmp_path / "whole" / "samples" / "step_000006.png").is_file()


def test_goes_on_from_a_vae(tmp_path: Path) -> None:
    tiny_vae().save(tmp_path / "vae_model.pth")
    script.main(arguments(tmp_path / "run", "--pretrained", str(tmp_path / "vae_model.pth"), "--max_steps", "1"))
    assert (tmp_path / "run" / "vae_model.pth").is_file()


def test_it_learns(tmp_path: Path) -> None:
    """A few dozen steps on one batch of crops: the error falls well below that of the start."""
    options = Options(
        block_out_channels=[8, 16, 16, 16], norm_num_groups=4, learning_rate=5e-3, warmup_steps=5, max_steps=40
    )
    training = script.Training(options, CPU)
    crops = Crops(picture_with_a_corner(), 32, 0.02)(torch.zeros(8, dtype=torch.long), generator_for(CPU, 0))
    losses = [training.step(crops, step)[0].item() for step in range(40)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--crop", "100"], "--crop 100"),
        (["--validation_pictures", "20"], "--validation_pictures 20"),
        (["--pretrained", "./nowhere.pth"], "nowhere.pth"),
        (["--dataset", "./nowhere"], "--dataset ./nowhere"),
    ],
)
def test_bad_options_end_in_one_sentence(tmp_path: Path, more: list[str], sentence: str) -> None:
    with pytest.raises((ValueError, OSError), match=sentence):
        script.main(arguments(tmp_path / "run", *more))
