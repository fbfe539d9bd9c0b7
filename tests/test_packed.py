"""Packing weights for a CPU changes no bit of an image, and leaves the U-Net as it was whatever happens within."""

import copy
import pickle
import sys
import threading

import pytest
import torch
from tiny import tiny_model
from torch import nn

import sampling.packed
from lora import LoRAConv2d, add, merge, remove, set_scale
from published.lora_files import write_lora
from sampling.packed import PackedConv2d, packed
from stable_diffusion_model import StableDiffusion

HOW = {"steps": 3, "height": 64, "width": 72, "progress": False}


@pytest.fixture(autouse=True)
def _from_the_first_step(monkeypatch):
    monkeypatch.setattr("sampling.packed.FROM_STEPS", 1)


@pytest.fixture
def model() -> StableDiffusion:
    torch.manual_seed(0)
    return tiny_model()


def image(model: StableDiffusion, **options) -> bytes:
    return model.sample("a red fox", **HOW | options)[0].tobytes()


def state(unet: nn.Module) -> dict[str, tuple]:
    """What a parameter is and where its numbers lie; all else that training, saving and LoRA rely on."""
    return {name: (id(p), p.shape, p.stride(), p.requires_grad) for name, p in unet.named_parameters()}


def test_an_image_is_the_same_bit_for_bit_without(model, monkeypatch):
    with_it = image(model)
    monkeypatch.setattr("sampling.packed._dtypes_of_onednn", set)
    assert with_it == image(model)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_unet_is_as_it_was_afterwards_and_within_no_weight_is_held_twice(model, layout):
    unet = model.unet.to(memory_format=layout)
    before, weights = state(unet), copy.deepcopy(unet.state_dict())
    x, context = torch.randn(2, 4, 8, 9), torch.randn(2, 77, unet.config.context_dim)
    with torch.no_grad():
        plain = unet(x, torch.tensor([5, 500]), context)
        with packed(unet, 9):
            again = unet(x, torch.tensor([5, 500]), context)
            layers = [layer for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
            assert layers and all(type(layer) is PackedConv2d and layer.weight.numel() == 0 for layer in layers)
        last = unet(x, torch.tensor([5, 500]), context)
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(last, plain) and state(unet) == before
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert not any(isinstance(layer, PackedConv2d) for layer in unet.modules())


def test_an_error_or_an_interrupt_within_loses_nothing(model):
    before, weights = state(model.unet), copy.deepcopy(model.unet.state_dict())

    def stop(step: int, *_) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        image(model, callback=stop)
    assert state(model.unet) == before
    assert all(torch.equal(weights[name], value) for name, value in model.unet.state_dict().items())


def test_what_one_sampling_left_packed_the_next_one_mends(model, monkeypatch):
    expected, before = image(model), state(model.unet)
    with monkeypatch.context() as interrupted_twice:
        interrupted_twice.setattr("sampling.packed.unpack", lambda unet: None)
        image(model)
    assert any(isinstance(layer, PackedConv2d) for layer in model.unet.modules())
    assert image(model) == expected and state(model.unet) == before


def test_several_threads_may_sample_from_one_model(model):
    expected, before, images = [image(model, seeds=seed) for seed in range(4)], state(model.unet), {}

    def several(seed: int) -> None:
        images[seed] = [image(model, seeds=seed, steps=3) for _ in range(3)]

    threads = [threading.Thread(target=several, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert images == {seed: [expected[seed]] * 3 for seed in range(4)} and state(model.unet) == before


def test_layers_with_low_rank_changes_compute_as_ever(model):
    name = next(name for name, layer in model.unet.named_modules() if name.endswith("conv1"))
    (change,) = add(model.unet, [name], rank=2, alpha=2.0)
    nn.init.normal_(change.up.weight)
    with torch.no_grad(), packed(model.unet, 9):
        assert model.unet.get_submodule(name).weight.numel()
        changed = image(model)
    assert changed == image(model)


def test_changes_that_are_merged_are_packed_with_their_layer(model):
    """So that at scale 0 the same kernels run as without."""
    base = image(model)
    names = [name for name, layer in model.unet.named_modules() if name.endswith("conv1")]
    for change in add(model.unet, names, rank=2, alpha=2.0):
        nn.init.normal_(change.up.weight)
    changed = image(model)
    merge(model.unet)
    with torch.no_grad(), packed(model.unet, 9):
        assert {type(model.unet.get_submodule(name)) for name in names} == {PackedConv2d}
    assert changed != base and {type(model.unet.get_submodule(name)) for name in names} == {LoRAConv2d}
    set_scale(model.unet, "default", 0.0)
    assert image(model) == base


def test_a_callback_may_change_and_save_the_model_between_steps(model, tmp_path, monkeypatch):
    """As if weights had never been packed: from the next step on."""
    names = [name for name, layer in model.unet.named_modules() if name.endswith("conv1")]
    for change in add(model.unet, names, rank=2, alpha=2.0):
        nn.init.normal_(change.up.weight)
    write_lora(tmp_path / "lora.safetensors", model.unet)
    remove(model.unet)
    name = model.load_lora(tmp_path / "lora.safetensors")
    scales = iter([0.5, 0.0, 1.0] * 2)

    def change_it(step: int, *_) -> None:
        model.set_lora_scale(name, next(scales))
        if step == 1:
            model.save_pretrained(tmp_path / "model")

    plain = image(model)
    changed, saved = image(model, callback=change_it), StableDiffusion.from_pretrained(tmp_path / "model", "cpu")
    monkeypatch.setattr("sampling.packed._dtypes_of_onednn", set)
    assert image(model, callback=change_it) == changed != plain == image(model)
    remove(model.unet)
    del model.loras[name]
    assert image(saved) == image(model)  # of the moment when its scale was 0


def test_a_callback_may_load_another_lora_or_another_precision(model, tmp_path):
    before = state(model.unet)
    for change in add(model.unet, ["conv_in"], rank=2, alpha=2.0):
        nn.init.normal_(change.up.weight)
    write_lora(tmp_path / "lora.safetensors", model.unet)
    remove(model.unet)
    image(model, callback=lambda step, *_: model.load_lora(tmp_path / "lora.safetensors") and None)
    assert len(model.loras) == HOW["steps"]
    remove(model.unet)
    image(model, callback=lambda step, *_: model.to("cpu", torch.float64) and None, steps=1)
    assert model.dtype == torch.float64 and not any(isinstance(layer, PackedConv2d) for layer in model.unet.modules())
    assert [value[1] for value in state(model.unet).values()] == [value[1] for value in before.values()]


def packed_layers(unet: nn.Module) -> list[nn.Module]:
    return [layer for layer in unet.modules() if isinstance(layer, PackedConv2d)]


def test_layers_that_compute_otherwise_are_left_alone(model, monkeypatch):
    """Circular padding makes images that can be tiled; other programs put functions in the place of PyTorch's."""
    plain = image(model)
    for layer in model.unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    one = next(layer for layer in model.unet.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    one.padding_mode = "zeros"
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == [one]
    for layer in model.unet.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.padding_mode = "zeros"
    tiled = image(model)
    with monkeypatch.context() as without:
        without.setattr("sampling.packed._dtypes_of_onednn", set)
        assert image(model) == tiled != plain
    one.forward = lambda x: nn.Conv2d.forward(one, x)
    with packed(model.unet, 9):
        assert one not in packed_layers(model.unet) != []
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: 0 * nn.functional.conv2d(x, w, b))
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == []


def test_shared_weights_other_dtypes_autocast_and_compiled_networks_are_left_alone(model):
    with torch.autocast("cpu", torch.bfloat16), packed(model.unet, 9):
        assert packed_layers(model.unet) == []
    convolutions = [layer for layer in model.unet.modules() if isinstance(layer, nn.Conv2d)]
    shared = [
        layer for layer in convolutions if layer.weight.shape == model.unet.mid_block.resnets[0].conv1.weight.shape
    ]
    shared[0].weight = shared[1].weight
    model.unet.conv_out.double()
    with packed(model.unet, 9):
        assert set(convolutions) - set(packed_layers(model.unet)) == {*shared[:2], model.unet.conv_out}
    model.unet.mid_block.compile()
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == []


def test_few_steps_are_not_worth_it(model, monkeypatch):
    monkeypatch.undo()
    with packed(model.unet, 7):
        assert packed_layers(model.unet) == []
    with packed(model.unet, 8):
        assert packed_layers(model.unet) != []


def test_an_interrupt_at_any_line_is_mended_by_the_next_sampling(model):
    """At each line of the module in turn; what it leaves packed gives its state to whoever asks for it, even before."""
    expected, before, weights = image(model), state(model.unet), copy.deepcopy(model.unet.state_dict())
    moments, struck = 0, -1

    def at_line(frame, event, _):
        nonlocal moments
        if frame.f_code.co_filename == sampling.packed.__file__:
            moments += event == "line"
            if moments == struck and event == "line":
                raise KeyboardInterrupt
        return at_line

    def traced() -> None:
        nonlocal moments
        moments = 0
        sys.settrace(at_line)
        try:
            with torch.no_grad(), packed(model.unet, 9):
                model.unet(torch.randn(2, 4, 8, 9), torch.tensor([5, 500]), torch.randn(2, 77, 32))
        finally:
            sys.settrace(None)

    traced()
    total = moments
    for struck in [*range(1, 60), *range(60, total, 23), *range(total - 40, total + 1)]:
        with pytest.raises(KeyboardInterrupt):
            traced()
        if struck % 5 == 0:
            now = model.unet.state_dict()
            assert all(torch.equal(weights[name], now[name]) for name in weights), struck
        with packed(model.unet, 9):
            pass
        assert state(model.unet) == before and packed_layers(model.unet) == [], struck
    assert total > 500 and image(model) == expected


def test_within_a_callback_the_network_is_what_it_is_elsewhere(model):
    """Its state, copies and gradients."""
    weights, plain, seen = copy.deepcopy(model.unet.state_dict()), image(model), []

    def look(step: int, *_) -> None:
        if step == 0:
            seen.append(model.unet.state_dict())
        elif step == 1:
            seen.append(copy.deepcopy(model.unet).state_dict())
            seen.append(pickle.loads(pickle.dumps(model.unet)).state_dict())
        else:
            with torch.enable_grad():
                model.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32)).sum().backward()
            seen.append({name: p.grad for name, p in model.unet.named_parameters() if p.grad is None})
            model.unet.load_state_dict(weights)

    assert image(model, callback=look) == plain
    for found in seen[:3]:
        assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert seen[3] == {} and packed_layers(model.unet) == []


def test_it_can_be_trained_after_it_sampled_in_inference_mode(model):
    with torch.inference_mode():
        image(model)
    model.unet(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, 32)).sum().backward()
    assert all(p.grad is not None for p in model.unet.parameters())


def test_other_dtypes_and_devices_are_left_alone(model):
    for unet in (copy.deepcopy(model.unet).double(), copy.deepcopy(model.unet).to("meta")):
        with packed(unet, 9):
            assert not any(isinstance(layer, PackedConv2d) for layer in unet.modules())
