"""Packing weights for a CPU changes no bit of an image, and leaves the U-Net as it was whatever happens within."""

import copy
import threading

import pytest
import torch
from tiny import tiny_model
from torch import nn

from lora import LoRAConv2d, add, merge, remove, set_scale
from published.lora_files import write_lora
from sampling.packed import PackedConv2d, packed
from stable_diffusion_model import StableDiffusion

HOW = {"steps": 3, "height": 64, "width": 72, "progress": False}


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
        with packed(unet):
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
    with torch.no_grad(), packed(model.unet):
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
    with torch.no_grad(), packed(model.unet):
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


def test_other_dtypes_and_devices_are_left_alone(model):
    for unet in (copy.deepcopy(model.unet).double(), copy.deepcopy(model.unet).to("meta")):
        with packed(unet):
            assert not any(isinstance(layer, PackedConv2d) for layer in unet.modules())
