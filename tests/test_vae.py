"""The VAE against diffusers' `AutoencoderKL`, its files, and its tiles."""

import os
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from published import load_vae, vae_config, vae_dict
from tests.tiny import randomised, tiny_vae
from vae_model import VAE, DiagonalGaussian, VAEConfig

CONFIGS = {
    "sd": VAEConfig(),
    "small": VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=8),
    "grey, 8 channels, f4": VAEConfig(
        in_channels=1, out_channels=1, latent_channels=8, block_out_channels=(16, 32, 32), norm_num_groups=8
    ),
}


def theirs(config: VAEConfig) -> AutoencoderKL:
    options = {name: value for name, value in vae_dict(config).items() if not name.startswith("_")}
    return randomised(AutoencoderKL(**options))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name: str) -> None:
    config = CONFIGS[name]
    reference = theirs(config)
    ours = VAE(vae_config(dict(reference.config))).eval()
    assert ours.config == config
    ours.load_state_dict(reference.state_dict(), strict=True)
    images = torch.rand(1, config.in_channels, 64, 96) * 2 - 1
    with torch.no_grad():
        posterior, expected = ours.encode(images), reference.encode(images).latent_dist
        latents = posterior.sample(torch.Generator().manual_seed(3))
        for ours_, theirs_ in [
            (posterior.mean, expected.mean),
            (posterior.logvar, expected.logvar),
            (posterior.kl(), expected.kl()),
            (latents, expected.sample(torch.Generator().manual_seed(3))),
            (ours.decode(latents), reference.decode(latents).sample),
        ]:
            assert ((ours_ - theirs_).norm() / theirs_.norm()).item() < 2e-5
    reference.load_state_dict(ours.state_dict(), strict=True)


def test_save_and_load(tmp_path) -> None:
    vae = tiny_vae()
    vae.config.scaling_factor = 0.7
    vae.save(tmp_path / "vae_model.pth")
    again = VAE.load(tmp_path / "vae_model.pth")
    assert again.config == vae.config and not again.training
    same = load_vae(tmp_path / "vae_model.pth")
    assert same.config == vae.config
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in same.state_dict().items())
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            again.encode(images).mean, vae.encode(images).mean, rtol=0, atol=2e-2
        )  # float16 file
    assert not list(tmp_path.glob("*.tmp"))


def test_loads_a_diffusers_folder_and_a_pipeline_folder(tmp_path) -> None:
    reference = theirs(CONFIGS["small"])
    reference.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline" / "vae", tmp_path / "pipeline"):
        weights = load_vae(folder).state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in reference.state_dict().items())


def test_unknown_option_is_named() -> None:
    with pytest.raises(ValueError, match="latents_mean"):
        vae_config(vae_dict(VAEConfig()) | {"latents_mean": [0.0] * 4})


@pytest.mark.parametrize("load", [VAE.load, load_vae])
def test_missing_files_say_so(tmp_path, load) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("./nowhere.pth")
    (tmp_path / "vae_model.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"vae_model\.pth"):
        load(tmp_path / "vae_model.pth")


def test_feature_maps_are_channels_last_on_a_cpu_and_weights_and_outputs_as_files_want_them() -> None:
    vae, seen = tiny_vae(), []
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(
                lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
            )
    images = vae.decode(vae.encode(torch.randn(2, 3, 32, 32)).mean)
    assert len(seen) > 10 and all(seen) and images.is_contiguous()
    assert all(tensor.is_contiguous() for tensor in vae.state_dict().values())


def test_other_files_are_refused_in_a_sentence_that_says_what_reads_them(tmp_path) -> None:
    tiny_vae().save(tmp_path / "vae_model.pth")
    whole = (tmp_path / "vae_model.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    save_file(tiny_vae().state_dict(), tmp_path / "vae.safetensors")
    torch.save(tiny_vae().state_dict(), tmp_path / "bare.pth")
    torch.save({"config": {"colour": 1}, "state_dict": tiny_vae().state_dict()}, tmp_path / "option.pth")
    torch.save({"config": {}, "state_dict": tiny_vae().state_dict()}, tmp_path / "shape.pth")
    damaged = ["cut.pth", "option.pth", "shape.pth"]
    for name in (*damaged, "vae.safetensors", "bare.pth", "absent.pth", ""):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            VAE.load(tmp_path / name)
        text = str(error.value)
        assert text.startswith(str(tmp_path / name)) and "published.load_vae" in text
        assert "\n" not in text and text.endswith(".")
    with pytest.raises(FileNotFoundError, match=r"published\.load_vae also takes folders and hub ids"):
        VAE.load("stabilityai/sd-vae-ft-mse")
    for name in damaged:
        with pytest.raises(ValueError, match=name):
            load_vae(tmp_path / name)


class Malice:
    """Unpickled, it would leave a folder behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("load", [VAE.load, load_vae])
def test_nothing_in_a_file_is_executed(tmp_path, load) -> None:
    torch.save({"config": Malice(tmp_path / "executed"), "state_dict": {}}, tmp_path / "vae_model.pth")
    with pytest.raises(ValueError, match=r"vae_model\.pth"):
        load(tmp_path / "vae_model.pth")
    assert not (tmp_path / "executed").exists()


def test_latents_are_scaled_and_unscaled() -> None:
    vae = tiny_vae()
    vae.config.scaling_factor = 0.25
    raw = 4 * torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(vae.scale_latents(raw), raw / 4)
    torch.testing.assert_close(vae.unscale_latents(raw / 4), raw)


def test_size_must_divide() -> None:
    with pytest.raises(ValueError, match="divisible by 8"):
        tiny_vae().encode(torch.zeros(1, 3, 60, 64))


def test_posterior_of_known_moments() -> None:
    """N(0, 1) has no divergence from itself; N(1, 1) has 1/2 nat for each latent."""
    zero = torch.zeros(1, 4, 2, 2)
    assert DiagonalGaussian(zero, zero).kl().item() == 0
    assert DiagonalGaussian(zero + 1, zero).kl().item() == pytest.approx(8.0)
    samples = DiagonalGaussian(torch.full((1, 1, 400, 400), 2.0), torch.full((1, 1, 400, 400), -2.0)).sample()
    assert samples.mean().item() == pytest.approx(2.0, abs=0.01)
    assert samples.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), abs=0.01)


def test_tiles_cover_and_blend() -> None:
    """One tile equals plain decoding; several keep the size, leave no gap, and stay close where tiles don't meet."""
    vae = tiny_vae()
    latents = torch.randn(1, 4, 24, 40)
    with torch.no_grad():
        whole = vae.decode(latents)
        torch.testing.assert_close(vae.decode_tiled(latents, tile=64), whole)
        tiled = vae.decode_tiled(latents, tile=16, overlap=8)
    assert tiled.shape == whole.shape
    assert torch.isfinite(tiled).all()


def test_large_tensors_ask_for_large_pages():
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"  # "0" where a user has said so, before
