"""Fast convolutions and attention are PyTorch's own up to the last bits, and are not taken where they do not pay."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from tiny import tiny_model
from torch import Tensor, nn
from torch.autograd import forward_ad

import layers
import lora
from diffusion_model import UNet, UNetConfig
from layers import Conv3x3, attend_in_blocks, convolve, convolve_repeated, filters_of
from published import unet_dict, vae_dict
from sampling.packed import PackedConv3x3, pack, unpack
from vae_model import VAE, ResnetBlock, VAEConfig


def channels_last(*shape: int) -> Tensor:
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _of_few_channels(monkeypatch) -> None:
    monkeypatch.setattr(layers, "WORK_FROM", 0)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which of the two ways were taken."""
    taken: list[str] = []
    monkeypatch.setattr(layers, "convolve", lambda *args: taken.append("F(4, 3)") or convolve(*args))
    repeated = lambda *args: taken.append("repeated") or convolve_repeated(*args)  # noqa: E731
    monkeypatch.setattr(layers, "convolve_repeated", repeated)
    return taken


def twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


@pytest.mark.parametrize("rows_of", [1, 600, 2**20], ids=["four rows at a time", "some", "all"])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (4, 4), (5, 7), (9, 2), (10, 5), (11, 16), (33, 40)])
def test_it_is_the_direct_convolution(size, rows_of, monkeypatch) -> None:
    monkeypatch.setattr(layers, "ROWS_OF", rows_of)
    torch.manual_seed(0)
    x, layer = channels_last(2, 6, *size).double(), nn.Conv2d(6, 5, 3, padding=1).double()
    with torch.no_grad():
        torch.testing.assert_close(convolve(x, layer.weight, layer.bias), layer(x), rtol=0, atol=1e-13)
        without = F.conv2d(x, layer.weight, padding=1)
        torch.testing.assert_close(convolve(x, layer.weight), without, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (3, 1), (5, 7), (8, 6)])
def test_repeated_pixels_are_convolved_as_if_they_were_written_out(size) -> None:
    torch.manual_seed(0)
    x, layer = channels_last(3, 6, *size).double(), nn.Conv2d(6, 5, 3, padding=1).double()
    with torch.no_grad():
        y = convolve_repeated(x, layer.weight, layer.bias)
        torch.testing.assert_close(y, layer(twice(x)), rtol=0, atol=1e-13)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(convolve_repeated(x, layer.weight), F.conv2d(twice(x), layer.weight, padding=1))


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_of_repeated_is_that_up_to_its_type_and_an_image_has_the_same_bits_in_any_batch(dtype, atol, calls) -> None:
    """In bfloat16 the direct one errs by 0.0009 on average, 0.008 at most."""
    torch.manual_seed(0)
    x, layer = channels_last(4, 64, 17, 16).to(dtype), Conv3x3(64, 32).to(dtype)
    with torch.no_grad():
        y, exact = layer.of_repeated(x, (34, 32)), F.conv2d(twice(x.double()), *layer.double().parameters(), padding=1)
        layer.to(dtype)
        assert y.dtype == dtype and (y - exact).abs().max() < atol and (y - exact).square().mean().sqrt() < atol / 14
        pairs = torch.cat([layer.of_repeated(pair, (34, 32)) for pair in x.split(2)])
    assert torch.equal(pairs, y) and calls == ["repeated"] * 3


def test_repeated_pixels_are_written_out_where_it_does_not_pay(calls) -> None:
    """Small maps, odd sizes, more channels than half the pixels, gradients, hooks, another program's convolution."""

    def same(layer: Conv3x3, x: Tensor, size: tuple[int, int]) -> None:
        expected = layer(F.interpolate(x, size=size, mode="nearest"))
        calls.clear()
        assert torch.equal(layer.of_repeated(x, size), expected) and "repeated" not in calls

    layer = Conv3x3(32, 32)
    same(layer, channels_last(1, 32, 16, 16).requires_grad_(), (32, 32))
    with torch.no_grad():
        same(layer, channels_last(4, 32, 16, 15), (32, 30))
        same(layer, channels_last(1, 32, 17, 17), (34, 33))
        same(layer, channels_last(1, 32, 17, 17), (33, 34))
        same(Conv3x3(32, 520), channels_last(1, 32, 16, 16), (32, 32))
        hooked = Conv3x3(32, 32)
        seen: list[tuple] = []
        hooked.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        same(hooked, channels_last(1, 32, 16, 16), (32, 32))
        assert seen == [(1, 32, 32, 32)] * 2
        behind = Conv3x3(32, 32)
        behind.register_forward_hook(lambda _, inputs, out: seen.append(out.shape))
        same(behind, channels_last(1, 32, 16, 16), (32, 32))
        handle = nn.modules.module.register_module_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
        same(layer, channels_last(1, 32, 16, 16), (32, 32))
        handle.remove()
        assert seen == [(1, 32, 32, 32)] * 6
        for name in ("_conv_forward", "forward"):
            other = Conv3x3(32, 32)
            setattr(other, name, lambda *_: torch.zeros(1))
            same(other, channels_last(1, 32, 16, 16), (32, 32))
        compiled = Conv3x3(32, 32)
        compiled.compile(backend="eager")
        same(compiled, channels_last(1, 32, 16, 16), (32, 32))
        layer.of_repeated(channels_last(1, 32, 16, 16), (32, 32))
    assert calls == ["repeated"]


def test_a_weight_that_another_thread_empties_meanwhile_is_computed_with_as_it_was(monkeypatch) -> None:
    torch.manual_seed(0)
    layer, x = Conv3x3(32, 32), channels_last(1, 32, 16, 16)
    with torch.no_grad():
        expected, is_large = layer.of_repeated(x, (32, 32)), Conv3x3.is_large

        def emptied_meanwhile(self: Conv3x3, *args) -> bool:
            answer = is_large(self, *args)
            self.weight.data = self.weight.new_empty(0)
            return answer

        monkeypatch.setattr(Conv3x3, "is_large", emptied_meanwhile)
        assert torch.equal(layer.of_repeated(x, (32, 32)), expected) and layer.weight.numel() == 0


def test_in_float32_it_is_exact_to_a_hundred_thousandth_and_an_image_has_the_same_bits_in_any_batch(calls) -> None:
    torch.manual_seed(0)
    x, layer = channels_last(4, 128, 33, 35), Conv3x3(128, 96)
    with torch.no_grad():
        y, exact = layer(x), F.conv2d(x.double(), layer.weight.double(), layer.bias.double(), padding=1)
        assert (y - exact).abs().max() < 3e-5 * exact.std() and (y - exact).square().mean().sqrt() < 5e-6 * exact.std()
        assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.float32
        pairs = torch.cat([layer(pair) for pair in x.split(2)])
    assert len(calls) == 3 and torch.equal(pairs, y)


def test_six_filters_are_values_of_a_polynomial() -> None:
    """At 0, ±1, ±2 and ∞, over the product of a point's distances from the others; at 0 and ∞ these are in the rows."""
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64)
    points, at = (0, 1, -1, 2, -2), lambda z: weight[:, :, 0] + z * weight[:, :, 1] + z * z * weight[:, :, 2]
    for point, filter in list(zip(points, filters_of(weight), strict=False))[1:]:
        distances = torch.tensor([point - other for other in points if other != point]).prod()
        torch.testing.assert_close(filter[:, :, 0], at(point) / distances)
    first, *_, last = filters_of(weight)
    assert torch.equal(first[:, :, 0], weight[:, :, 0]) and torch.equal(last[:, :, 0], weight[:, :, 2])


def reasons() -> dict[str, Callable[[Conv3x3], Tensor]]:
    """Why a convolution is computed as PyTorch does it: each changes a layer, and gives an input."""

    def circular(layer: Conv3x3) -> Tensor:
        layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
        return channels_last(1, 32, 32, 32)

    return {
        "gradients": lambda layer: channels_last(1, 32, 32, 32).requires_grad_(),
        "small maps": lambda layer: channels_last(2, 32, 31, 33),
        "feature maps that are contiguous": lambda layer: torch.randn(1, 32, 32, 32),
        "another dtype": lambda layer: layer.double() and channels_last(1, 32, 32, 32).double(),
        "no batch": lambda layer: torch.randn(32, 32, 32),
        "circular padding": circular,
    }


@pytest.mark.parametrize("why", reasons())
def test_elsewhere_it_is_pytorchs_own(why, calls) -> None:
    layer = Conv3x3(32, 32)
    x = reasons()[why](layer)
    with torch.set_grad_enabled(why == "gradients"):
        mode = {"mode": "circular"} if why == "circular padding" else {}
        padded = F.pad(x, (1, 1, 1, 1), **mode)
        assert torch.allclose(layer(x), F.conv2d(padded, layer.weight, layer.bias), atol=1e-6)
    assert calls == []
    for few in (Conv3x3(31, 32), Conv3x3(32, 31)):
        with torch.no_grad():
            few(channels_last(1, few.in_channels, 32, 32))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        Conv3x3(32, 32)(channels_last(1, 32, 32, 32))
    with torch.no_grad():
        Conv3x3(32, 32).bfloat16()(channels_last(1, 32, 32, 32).bfloat16())
    assert calls == []
    with torch.no_grad():
        Conv3x3(32, 32)(channels_last(1, 32, 32, 32))
    assert calls == ["F(4, 3)"]


def test_little_work_is_pytorchs_own(calls, monkeypatch) -> None:
    monkeypatch.setattr(layers, "WORK_FROM", 64 * 32 * 32 * 40)
    with torch.no_grad():
        Conv3x3(64, 32)(channels_last(9, 64, 32, 39))
        Conv3x3(64, 32).of_repeated(channels_last(9, 64, 16, 19), (32, 38))
        assert calls == []
        Conv3x3(64, 32)(channels_last(1, 64, 32, 40))
        Conv3x3(64, 32).of_repeated(channels_last(1, 64, 16, 20), (32, 40))
    assert calls == ["F(4, 3)", "repeated"]


def test_compiled_it_is_pytorchs_own(calls) -> None:
    layer, x = Conv3x3(32, 32), channels_last(1, 32, 32, 32)
    with torch.no_grad():
        torch.compile(layer, backend="eager", fullgraph=True)(x)
        torch.compile(layer.of_repeated, backend="eager", fullgraph=True)(x, (64, 64))
    assert calls == []


def test_within_torch_func_it_is_pytorchs_own(calls) -> None:
    layer, x = Conv3x3(32, 32), channels_last(2, 32, 32, 32)
    with torch.no_grad():
        expected = F.conv2d(x, layer.weight, layer.bias, padding=1)
        torch.testing.assert_close(torch.func.vmap(layer)(x[:, None])[:, 0], expected)
        torch.testing.assert_close(torch.func.jvp(layer, (x,), (x,))[1], F.conv2d(x, layer.weight, padding=1))
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x))).tangent
        torch.testing.assert_close(tangent, F.conv2d(x, layer.weight, padding=1))
    assert calls == []


def test_another_programs_convolution_is_used(calls, monkeypatch) -> None:
    layer = Conv3x3(32, 32)
    layer._conv_forward = lambda x, weight, bias: torch.zeros(1)
    with torch.no_grad():
        assert layer(channels_last(1, 32, 32, 32)).shape == (1,)
        plain = nn.Conv2d(32, 32, 3, padding=1)  # in the place of an upsampling's
        x = channels_last(1, 32, 16, 16)
        assert torch.equal(layers.upsampled(x, (32, 32), plain), plain(twice(x)))
        monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, weight, bias: torch.zeros(2))
        assert Conv3x3(32, 32)(channels_last(1, 32, 32, 32)).shape == (2,)
        assert layers.upsampled(x, (32, 32), Conv3x3(32, 32)).shape == (2,)
    assert calls == []


def test_a_block_of_the_vae_overwrites_nothing_that_others_hold() -> None:
    """Its input, what hooks keep, and the input of a norm that gives back what it got."""
    torch.manual_seed(0)
    block, x = ResnetBlock(32, 32, 8).eval(), channels_last(1, 32, 32, 32)
    before, held = x.clone(), []
    with torch.no_grad():
        expected = block(x)
        assert torch.equal(x, before)
        for layer in (block.norm1, block.conv2):
            layer.register_forward_hook(lambda _, inputs, out: held.append((out, out.clone())))
        assert torch.equal(block(x), expected) and len(held) == 2
        block.norm1 = nn.Identity()
        block(x)
        assert torch.equal(x, before) and all(torch.equal(*pair) for pair in held)
    block(x.requires_grad_()).sum().backward()
    assert all(torch.equal(*pair) for pair in held)


def test_low_rank_changes_are_added_and_it_is_a_conv3x3_again_without_them(calls) -> None:
    torch.manual_seed(0)
    network, x = nn.ModuleDict({"conv": Conv3x3(32, 40)}), channels_last(2, 32, 32, 33)
    with torch.no_grad():
        plain = network["conv"](x)
        (change,) = lora.add(network, ["conv"], rank=2, alpha=2.0)
        nn.init.normal_(change.up.weight)
        torch.testing.assert_close(network["conv"](x), plain + change(x))
        large, layer = (64, 66), network["conv"]
        torch.testing.assert_close(layer.of_repeated(x, large), layer(twice(x)), rtol=0, atol=1e-5)
        assert "repeated" not in calls
        lora.merge(network)
        assert torch.equal(layer.of_repeated(x, large), convolve_repeated(x, layer.weight, layer.bias))
        lora.unmerge(network)
        lora.set_scale(network, "default", 0.0)
        assert torch.equal(layer.of_repeated(x, large), convolve_repeated(x, layer.weight, layer.bias))
        lora.remove(network, "default")
        assert type(network["conv"]) is Conv3x3 and torch.equal(network["conv"](x), plain)
    assert calls.count("repeated") == 2


def test_both_networks_are_those_of_diffusers_by_it(calls) -> None:
    """At sizes that are large enough for it; the parity tests of each network are at smaller ones."""
    torch.manual_seed(0)
    shape = UNetConfig(
        block_out_channels=(32, 64), attention_levels=(False, True), context_dim=16, num_attention_heads=2
    )
    unet, vae = UNet(shape).eval(), VAE(VAEConfig(block_out_channels=(32, 64, 64, 64))).eval()
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    pairs = [(UNet2DConditionModel, unet_dict(shape), unet), (AutoencoderKL, vae_dict(vae.config), vae)]
    their_unet, their_vae = (kind.from_config(config).eval() for kind, config, _ in pairs)
    their_unet.load_state_dict(unet.state_dict())
    their_vae.load_state_dict(vae.state_dict())
    x, t, context = channels_last(2, 4, 64, 72), torch.tensor([9, 800]), torch.randn(2, 7, 16)
    images, latents = torch.randn(1, 3, 256, 256), torch.randn(1, 4, 32, 32)
    with torch.no_grad():
        ours = [unet.to(memory_format=torch.channels_last)(x, t, context), vae.encode(images).mean, vae.decode(latents)]
        assert len(calls) > 40
        theirs = [their_unet(x, t, context).sample, their_vae.encode(images).latent_dist.mean]
        theirs.append(their_vae.decode(latents).sample)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * other.abs().max().item())


def test_packing_leaves_large_maps_to_it_and_weights_as_they_were(calls) -> None:
    torch.manual_seed(0)
    shape = UNetConfig(block_out_channels=(32, 32), attention_levels=(False, False), context_dim=16, norm_num_groups=8)
    unet = UNet(shape).eval().to(memory_format=torch.channels_last)
    x, t, context = channels_last(2, 4, 32, 32), torch.tensor([9, 800]), torch.randn(2, 7, 16)
    resnets, weights = unet.down_blocks[0].resnets, {name: w.clone() for name, w in unet.state_dict().items()}
    with torch.no_grad():
        plain = unet(x, t, context)
        by_it = len(calls)
        pack(unet)
        torch.testing.assert_close(unet(x, t, context), plain, rtol=0, atol=1e-5)
        assert len(calls) == 2 * by_it > 0
        held = [layer.packed for layer in (resnets[0].conv1, unet.mid_block.resnets[0].conv1)]
        assert held[0] is None and held[1] is not None and unet.up_blocks[0].upsamplers[0].conv.packed is None
        large = Conv3x3(32, 32).bfloat16()
        assert not PackedConv3x3.is_faster_plain(large, channels_last(1, 32, 32, 32).bfloat16())
        assert calls.count("repeated") == 2
        unet(channels_last(2, 4, 16, 16), t, context)  # small maps after large ones
        up, small = unet.up_blocks[0].upsamplers[0].conv, channels_last(2, 32, 16, 16)
        assert up.packed is not None and up.weight.numel() == 0
        by_hand = F.conv2d(twice(small), weights["up_blocks.0.upsamplers.0.conv.weight"], up.bias, padding=1)
        torch.testing.assert_close(up.of_repeated(small, (32, 32)), by_hand, rtol=0, atol=1e-5)
        unpack(unet)
    assert all(torch.equal(weights[name], w) for name, w in unet.state_dict().items())


def test_a_sampled_image_is_the_same(monkeypatch) -> None:
    """The shipped sizes are larger than `tiny_model`'s, so the limits come down to it; pixels differ by rounding."""
    torch.manual_seed(0)
    model, how = tiny_model(), {"steps": 4, "height": 128, "width": 128, "progress": False}
    with monkeypatch.context() as never:
        never.setattr(layers, "PIXELS_FROM", 10**9)
        direct = model.sample("a red fox", **how)[0]
    monkeypatch.setattr(layers, "PIXELS_FROM", 16)
    monkeypatch.setattr(layers, "CHANNELS_FROM", 1)
    pixels = [
        torch.frombuffer(bytearray(im.tobytes()), dtype=torch.uint8).int()
        for im in (direct, model.sample("a red fox", **how)[0])
    ]
    assert (pixels[0] - pixels[1]).abs().max() <= 1


# ----------------------------------------------------------------------------------------------------------------------
# Attention in blocks
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def has_bfloat16(monkeypatch) -> None:
    """A CPU like those that it was measured on, and networks whose attentions are little work."""
    monkeypatch.setattr(layers, "PRODUCTS_FROM", 1)
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
    monkeypatch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: True)


@pytest.fixture
def blocks(monkeypatch) -> list[tuple]:
    """The shapes of queries that were attended to in blocks."""
    shapes: list[tuple] = []
    monkeypatch.setattr(layers, "attend_in_blocks", lambda q, k, v: shapes.append(q.shape) or attend_in_blocks(q, k, v))
    return shapes


def heads_of(n: int, length: int, heads: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As networks have them: heads lie within the channels."""
    return tuple(torch.randn(n, rows, heads, width, dtype=dtype).transpose(1, 2) for rows in (length, 7, 7))


@pytest.mark.parametrize(
    ("scores_of", "queries_of"),
    [(1, 1), (7 * 5, 1), (1, 4), (7 * 19 * 2, 1), (7 * 19 * 4, 1), (2**21, 512)],
    ids=["one query", "five", "four, although too many", "two heads", "four of six heads", "all"],
)
def test_blocks_are_attention(scores_of, queries_of, monkeypatch) -> None:
    monkeypatch.setattr(layers, "SCORES_OF", scores_of)
    monkeypatch.setattr(layers, "QUERIES_OF", queries_of)
    torch.manual_seed(0)
    for q, k, v in (heads_of(2, 19, 3, 6, torch.float64), heads_of(1, 19, 1, 6, torch.float64)):
        out = attend_in_blocks(q, k, v)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=1e-13)
        shared = k[:1, :1].expand_as(k)  # no memory of its own
        expected = F.scaled_dot_product_attention(q, shared, v)
        torch.testing.assert_close(attend_in_blocks(q, shared, v), expected, rtol=0, atol=1e-13)


def test_no_more_scores_than_said_are_there_at_a_time(monkeypatch) -> None:
    """Few queries of one head when there are many keys; several heads when there are few."""
    seen: list[tuple] = []
    monkeypatch.setattr(layers.torch, "softmax", lambda x, *a, **k: seen.append(tuple(x.shape)) or x)
    attend_in_blocks(torch.zeros(1, 2, 1100, 1), *torch.zeros(2, 1, 2, 4096, 1))
    assert seen == [(1, 512, 4096), (1, 512, 4096), (1, 76, 4096)] * 2
    seen.clear()
    attend_in_blocks(torch.zeros(1, 2, 600, 1), *torch.zeros(2, 1, 2, 16384, 1))
    assert seen == [(1, 512, 16384), (1, 88, 16384)] * 2
    seen.clear()
    attend_in_blocks(torch.zeros(2, 20, 1024, 1), *torch.zeros(2, 2, 20, 77, 1))
    assert seen == [(26, 1024, 77), (14, 1024, 77)]


def test_in_bfloat16_blocks_err_twice_as_much_as_pytorchs_kernel_and_an_image_has_the_same_bits_in_any_batch() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(4, 300, 3, 40).bfloat16().transpose(1, 2) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    out, theirs = attend_in_blocks(q, k, v), F.scaled_dot_product_attention(q, k, v)
    error, their_error = ((y - exact).square().mean().sqrt().item() for y in (out, theirs))
    assert out.dtype == torch.bfloat16 and error < 2.5 * their_error < 0.01
    for size in (1, 2, 3):
        split = zip(q.split(size), k.split(size), v.split(size), strict=True)
        assert torch.equal(torch.cat([attend_in_blocks(*some) for some in split]), out)


@pytest.mark.usefixtures("has_bfloat16")
def test_blocks_are_for_inference_in_bfloat16_on_a_cpu_that_has_it(blocks, monkeypatch) -> None:
    q, k, v = heads_of(1, 256, 2, 8, torch.bfloat16)
    monkeypatch.setattr(layers, "PRODUCTS_FROM", 2 * 256 * 7 * 8)
    with torch.no_grad():
        layers.dot_product_attention(q, k, v)
        assert blocks.pop() == q.shape
        layers.dot_product_attention(*(x.repeat(2, 1, 1, 1)[:, :, :, :7] for x in (q, k, v)))  # less work, by one image
        layers.dot_product_attention(q[:, :, 1:], *(x.repeat(1, 1, 2, 1) for x in (k, v)))  # fewer queries
        layers.dot_product_attention(q.float(), k.float(), v.float())
        layers.dot_product_attention(q, k[:, :, :0], v[:, :, :0])
        layers.dot_product_attention(q.to("meta"), k.to("meta"), v.to("meta"))
        torch.func.vmap(layers.dot_product_attention)(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            layers.dot_product_attention(q, k, v)
        with torch.backends.mkldnn.flags(enabled=False):
            layers.dot_product_attention(q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr("torch.ops.mkldnn._is_mkldnn_bf16_supported", lambda: False)
            layers.dot_product_attention(q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr("torch.cpu._is_amx_tile_supported", lambda: True)
            layers.dot_product_attention(q, k, v)
        with monkeypatch.context() as patch:
            patch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
            layers.dot_product_attention(q, k, v)
    layers.dot_product_attention(q, k, v)  # with gradients
    assert blocks == []


@pytest.mark.usefixtures("has_bfloat16")
def test_what_pytorchs_attention_takes_and_blocks_do_not_is_left_to_it(blocks) -> None:
    """Other widths of values, what is broadcast, other dimensions, other dtypes."""
    q, k, v = heads_of(2, 256, 2, 8, torch.bfloat16)
    with torch.no_grad():
        for inputs in (
            (q, k, torch.cat([v, v], 3)),
            (q, k, v[..., :3]),
            (q, k[:1], v[:1]),
            (q, k[:, :1], v[:, :1]),
            (q[:1], k, v),
            (q[0], k[0], v[0]),
            (q[0, 0], k[0, 0], v[0, 0]),
            (q[None], k[None], v[None]),
        ):
            out = layers.dot_product_attention(*inputs)
            torch.testing.assert_close(out, F.scaled_dot_product_attention(*inputs), rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="dtype"):
            layers.dot_product_attention(q, k, v.float())
    assert blocks == []


@pytest.mark.usefixtures("has_bfloat16")
def test_a_trace_holds_at_other_sizes(blocks, calls) -> None:
    torch.manual_seed(0)
    vae, (q, k, v) = VAE(VAEConfig(block_out_channels=(32, 32, 32, 32))).eval(), heads_of(1, 256, 2, 8, torch.bfloat16)
    with torch.no_grad():
        decode = torch.jit.trace(vae.decoder, torch.randn(1, 4, 8, 8), check_trace=False)
        attend = torch.jit.trace(layers.dot_product_attention, (q, k, v), check_trace=False)
        assert calls == blocks == []
        z, longer = torch.randn(1, 4, 10, 12), torch.cat([q, q], 2)
        torch.testing.assert_close(decode(z), vae.decoder(z), rtol=0, atol=1e-4)
        torch.testing.assert_close(attend(longer, k, v), layers.dot_product_attention(longer, k, v), rtol=0, atol=5e-2)


@pytest.mark.usefixtures("has_bfloat16")
def test_both_networks_attend_in_blocks(blocks) -> None:
    """The U-Net to itself and to the text, the VAE to itself."""
    torch.manual_seed(0)
    shape = UNetConfig(
        block_out_channels=(32, 64), attention_levels=(True, False), context_dim=16, num_attention_heads=2
    )
    unet, vae = UNet(shape).eval(), VAE(VAEConfig(block_out_channels=(32, 32, 32, 64))).eval()
    x, t, context = torch.randn(1, 4, 16, 17), torch.tensor([9]), torch.randn(1, 7, 16)
    for parameter in unet.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with torch.no_grad():
        exact = unet(x, t, context), vae.decode(x)
        assert blocks == []
        unet.bfloat16(), vae.bfloat16()
        ours = unet(x.bfloat16(), t, context.bfloat16()), vae.decode(x.bfloat16())
    # Five transformers at that size, each with one attention to itself and one to the text; one attention of the VAE.
    assert blocks == [(1, 2, 272, 16)] * 10 + [(1, 1, 272, 64)]
    for mine, expected in zip(ours, exact, strict=True):
        assert (mine - expected).square().mean() < 0.04**2 * expected.square().mean()
