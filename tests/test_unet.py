"""The U-Net against diffusers' `UNet2DConditionModel`: same weights, same input, same output."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from diffusion_model import UNet, UNetConfig, attend
from published import unet_config, unet_dict
from tests.tiny import randomised, tiny_unet

SD1 = UNetConfig()
SMALL = {
    "sd1-like": UNetConfig(
        block_out_channels=(32, 64, 96, 96), context_dim=48, norm_num_groups=8, num_attention_heads=4
    ),
    "sd2-like": UNetConfig(
        block_out_channels=(32, 64, 128, 128),
        num_attention_heads=(1, 2, 4, 4),
        context_dim=64,
        use_linear_projection=True,
        norm_num_groups=16,
    ),
    "attention in the middle only": UNetConfig(
        block_out_channels=(32, 64),
        attention_levels=(False, False),
        layers_per_block=1,
        context_dim=24,
        norm_num_groups=8,
        num_attention_heads=4,
    ),
    "attention everywhere, two deep": UNetConfig(
        block_out_channels=(32, 48, 64),
        attention_levels=(True, True, True),
        layers_per_block=1,
        transformer_depth=2,
        context_dim=40,
        norm_num_groups=8,
        num_attention_heads=(2, 3, 4),
    ),
}


def theirs(config: UNetConfig) -> UNet2DConditionModel:
    options = {name: value for name, value in unet_dict(config).items() if not name.startswith("_")}
    return randomised(UNet2DConditionModel(**options))


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_on_a_cpu_it_is_laid_out_contiguous() -> None:
    unet = tiny_unet().to(memory_format=torch.channels_last)
    assert not unet.conv_in.weight.is_contiguous()
    assert unet.laid_out("cpu") is unet and all(weight.is_contiguous() for weight in unet.parameters())


@pytest.mark.parametrize("how", ["float32", "bfloat16", "compiled"])
@torch.no_grad()
def test_keys_and_values_made_beforehand_change_no_bit(how: str) -> None:
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    unet = randomised(tiny_unet()).to(dtype)
    network = torch.compile(unet, backend="eager", fullgraph=True) if how == "compiled" else unet
    x, t = torch.randn(2, 4, 16, 16, dtype=dtype), torch.tensor([7.0, 500.0])
    for _ in range(2):  # not those of the text before
        context = torch.randn(2, 77, unet.config.context_dim, dtype=dtype)
        beforehand = unet.keys_and_values(context)
        assert torch.equal(network(x, t, beforehand), unet(x, t, context))
    crosses = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    assert crosses == list(beforehand)
    with pytest.raises(ValueError, match="context is 5 wide"):
        unet.keys_and_values(torch.randn(2, 77, 5))


@pytest.mark.parametrize("length", [3, 77, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_and_its_gradients_are_those_of_pytorch(dtype: torch.dtype, length: int) -> None:
    """On the CPU, training in bfloat16 takes another way through short sequences; it is the same function."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 4, n, 8, dtype=dtype, requires_grad=True) for n in (50, length, length)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours, expected = attend(*inputs), torch.nn.functional.scaled_dot_product_attention(*exact)
    direction = torch.randn_like(expected)  # of the loss in the output
    gradients = torch.autograd.grad((ours * direction).sum(), inputs)
    tolerance = 2e-6 if dtype == torch.float32 else 0.01
    assert ours.dtype == dtype and relative_error(ours.double(), expected) < tolerance
    for a, b in zip(gradients, torch.autograd.grad((expected * direction).sum(), exact), strict=True):
        assert relative_error(a.double(), b) < tolerance


@pytest.mark.parametrize(
    ("dtype", "trains", "keys", "device", "fused"),
    [
        (torch.bfloat16, True, 256, "cpu", False),
        (torch.bfloat16, True, 257, "cpu", True),
        (torch.bfloat16, False, 77, "cpu", True),
        (torch.float32, True, 77, "cpu", True),
        (torch.bfloat16, True, 77, "meta", True),
    ],
)
def test_of_few_queries_only_training_in_bfloat16_on_a_cpu_leaves_pytorchs_kernel(
    dtype: torch.dtype, trains: bool, keys: int, device: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, kernel = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", lambda *a: calls.append(a) or kernel(*a))
    q, k, v = (torch.zeros(1, 1, n, 8, dtype=dtype, device=device, requires_grad=trains) for n in (9, keys, keys))
    assert attend(q, k, v).shape == q.shape and len(calls) == fused


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("height", "width", "length"), [(16, 16, 77), (24, 16, 5), (10, 14, 154)])
def test_equals_diffusers(name: str, height: int, width: int, length: int) -> None:
    """Also for latents that are not square or not divisible by the U-Net's strides, and texts of other lengths."""
    config = SMALL[name]
    reference = theirs(config)
    ours = UNet(config).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    latents, context = torch.randn(2, 4, height, width), torch.randn(2, length, config.context_dim)
    timesteps = torch.tensor([3, 981])
    with torch.no_grad():
        expected = reference(latents, timesteps, context).sample
        assert relative_error(ours(latents, timesteps, context), expected) < 2e-5
    reference.load_state_dict(ours.state_dict(), strict=True)  # and the way back


def test_full_stable_diffusion_1_equals_diffusers() -> None:
    """All 860 M parameters. One network at a time is filled with random numbers, then lends them to the other."""
    with torch.device("meta"):
        ours, reference = UNet(SD1), UNet2DConditionModel(**_options(SD1))
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964  # the published number
    weights = {name: torch.randn(p.shape) * 0.02 for name, p in reference.state_dict().items()}
    for name in weights:
        if "norm" in name and name.endswith("weight"):
            weights[name] = weights[name] + 1
    ours.load_state_dict(weights, strict=True, assign=True)
    reference.load_state_dict(weights, strict=True, assign=True)
    latents, timesteps, context = torch.randn(1, 4, 16, 24), torch.tensor([500]), torch.randn(1, 77, 768)
    with torch.no_grad():
        expected = reference(latents, timesteps, context).sample
        assert relative_error(ours(latents, timesteps, context), expected) < 2e-5


def _options(config: UNetConfig) -> dict:
    return {name: value for name, value in unet_dict(config).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", SMALL)
def test_config_round_trip(name: str) -> None:
    """Through our own dictionary, and through the full one that diffusers writes."""
    config = SMALL[name]
    assert unet_dict(unet_config(dict(theirs(config).config))) == unet_dict(config)
    assert unet_dict(unet_config(unet_dict(config))) == unet_dict(config)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("addition_embed_type", "text_time"),  # SDXL
        ("class_embed_type", "timestep"),
        ("time_cond_proj_dim", 256),  # LCM
        ("conv_in_kernel", 5),
        ("an_option_from_the_future", 1),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
    ],
)
def test_unknown_option_is_named(option: str, value: object) -> None:
    config = unet_dict(UNetConfig()) | {option: value}
    with pytest.raises(ValueError, match=option if option != "down_block_types" else "AttnDownBlock2D"):
        unet_config(config)


def test_bad_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="attention_levels"):
        UNetConfig(attention_levels=(True,))
    with pytest.raises(ValueError, match="num_attention_heads"):
        UNetConfig(num_attention_heads=(8, 8))
    with pytest.raises(ValueError, match="norm_num_groups"):
        UNetConfig(block_out_channels=(30, 60, 60, 60))
    with pytest.raises(ValueError, match="heads"):
        UNetConfig(num_attention_heads=7)


def test_context_of_another_text_encoder_is_refused() -> None:
    with pytest.raises(ValueError, match="width 32"):
        tiny_unet()(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.randn(1, 77, 48))


def test_first_prediction_is_zero() -> None:
    """Zero-initialised branches: the loss of an untrained U-Net is the variance of the noise."""
    unet = tiny_unet(randomise=False)
    assert not unet(torch.randn(2, 4, 8, 8), torch.tensor([1, 999]), torch.randn(2, 77, 32)).any()


def test_gradient_checkpointing_changes_nothing() -> None:
    unet = tiny_unet().train()
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([7, 700]), torch.randn(2, 77, 32)
    gradients = []
    for checkpointing in (False, True):
        unet.gradient_checkpointing = checkpointing
        unet.zero_grad()
        unet(*inputs).square().mean().backward()
        gradients.append([p.grad.clone() for p in unet.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
