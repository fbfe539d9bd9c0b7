"""Packing weights for a CPU changes no bit of an image, and leaves the U-Net as it was whatever happens within."""

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import sampling.packed
from lora import LoRAConv3x3, LoRALinear, add, merge, remove, set_scale
from published.lora_files import write_lora
from sampling.packed import Packed, PackedConv2d, PackedConv3x3, PackedLinear, pack, packed, unpack
from stable_diffusion_model import StableDiffusion

EXACTLY = {"rtol": 0, "atol": 0}
HOW = {"steps": 3, "height": 64, "width": 72, "progress": False}


@pytest.fixture(autouse=True)
def _from_the_first_step(monkeypatch):
    monkeypatch.setattr("sampling.packed.FROM_CALLS", 1)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def model(request) -> StableDiffusion:
    """In float32 its linear layers are too small to be packed, in bfloat16 all of them are."""
    if request.param not in sampling.packed.dtypes_of_onednn():
        pytest.skip("this CPU has no kernels for bfloat16")
    torch.manual_seed(0)
    return tiny_model().to("cpu", request.param)


def image(model: StableDiffusion, **options) -> bytes:
    return model.sample("a red fox", **HOW | options)[0].tobytes()


def state(unet: nn.Module) -> dict[str, tuple]:
    """What a parameter is and where its numbers lie; all else that training, saving and LoRA rely on."""
    return {name: (id(p), p.shape, p.stride(), p.requires_grad) for name, p in unet.named_parameters()}


def test_an_image_is_the_same_bit_for_bit_without(model, monkeypatch):
    with_it = image(model)
    monkeypatch.setattr("sampling.packed.dtypes_of_onednn", set)
    assert with_it == image(model)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_unet_is_as_it_was_afterwards_and_within_no_weight_is_held_twice(model, layout, monkeypatch):
    unet = model.unet.to(memory_format=layout)
    before, weights = state(unet), copy.deepcopy(unet.state_dict())
    monkeypatch.setattr("sampling.packed.LINEAR_FROM", 1)
    x, context = (torch.randn(2, *shape).to(model.dtype) for shape in ((4, 8, 9), (77, unet.config.context_dim)))
    with torch.no_grad():
        plain = unet(x, torch.tensor([5, 500]), context)
        with packed(unet, 9):
            again = unet(x, torch.tensor([5, 500]), context)
            layers = [layer for layer in unet.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
            assert {type(layer) for layer in layers} == {PackedConv2d, PackedConv3x3, PackedLinear}
            assert all(layer.weight.numel() == 0 for layer in layers)
        last = unet(x, torch.tensor([5, 500]), context)
    torch.testing.assert_close(again, plain, **({"rtol": 1e-5, "atol": 1e-6} if x.dtype == torch.float32 else EXACTLY))
    assert torch.equal(last, plain) and state(unet) == before
    assert all(torch.equal(weights[name], value) for name, value in unet.state_dict().items())
    assert not any(isinstance(layer, Packed) for layer in unet.modules())


def call(model: StableDiffusion, **kwargs) -> torch.Tensor:
    """The U-Net's output for a guidance batch, always the same."""
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(2, *shape, generator=generator).to(model.dtype) for shape in ((4, 8, 9), (77, 32)))
    return model.unet(x, torch.tensor([5, 500]), context, **kwargs)


def in_another_thread(work) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_an_error_or_an_interrupt_within_loses_nothing(model):
    before, weights = state(model.unet), copy.deepcopy(model.unet.state_dict())
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), packed(model.unet, 9):
        call(model)
        assert model.unet.conv_in.weight.numel() == 0
        raise KeyboardInterrupt
    assert state(model.unet) == before
    assert all(torch.equal(weights[name], value) for name, value in model.unet.state_dict().items())


@torch.no_grad()
def test_other_threads_compute_with_the_weights_as_they_were(model, monkeypatch):
    """Bit for bit what they compute alone, and in the precision that they ask for."""
    monkeypatch.setattr("sampling.packed.LINEAR_FROM", 1)
    monkeypatch.setattr(PackedLinear, "ordered", lambda self, weight, x: (2 * weight).to_mkldnn())

    @torch.no_grad()
    def alone() -> torch.Tensor:
        return call(model)

    @torch.no_grad()
    def mixed() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return call(model)

    plain, low = alone(), mixed()
    with packed(model.unet, 9):
        assert not torch.equal(call(model), plain)  # its linear layers are doubled
        for layer in packed_layers(model.unet):
            if isinstance(layer, PackedLinear) and layer.packed is not None:
                layer.packed = (layer.packed.to_dense() / 2).to_mkldnn()
        assert torch.equal(in_another_thread(alone), plain) and torch.equal(in_another_thread(mixed), low)
        assert torch.equal(mixed(), low)  # nor does this thread, where it asks for another precision
        assert packed_layers(model.unet) != []


def test_nothing_is_packed_under_the_hands_of_another_sampling(model):
    """It may be computing with a weight that would be emptied."""
    with packed(model.unet, 9):
        model.unet.state_dict()

        def another() -> None:
            with packed(model.unet, 9):
                assert packed_layers(model.unet) == []

        in_another_thread(another)
        with packed(model.unet, 9):
            assert packed_layers(model.unet) == []
    with packed(model.unet, 9):
        assert packed_layers(model.unet) != []


def test_what_one_sampling_left_packed_the_next_one_mends(model, monkeypatch):
    expected, before = image(model), state(model.unet)
    with monkeypatch.context() as interrupted_twice:
        interrupted_twice.setattr("sampling.packed.unpack", lambda unet: None)
        image(model)
    assert any(isinstance(layer, Packed) for layer in model.unet.modules())
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


@torch.no_grad()
def test_the_last_of_several_samplings_unpacks(model):
    with packed(model.unet, 9):
        with packed(model.unet, 9):
            call(model)
        assert packed_layers(model.unet) != [] and model.unet.conv_in.weight.numel() == 0
        call(model)
        assert packed_layers(model.unet) != []
    assert packed_layers(model.unet) == []


def test_layers_with_low_rank_changes_compute_as_ever(model, monkeypatch):
    plain = image(model)
    name = next(name for name, layer in model.unet.named_modules() if name.endswith("conv1"))
    (change,) = add(model.unet, [name], rank=2, alpha=2.0)
    nn.init.normal_(change.to(model.dtype).up.weight)
    with packed(model.unet, 9):
        assert type(model.unet.get_submodule(name)) is LoRAConv3x3
    changed = image(model)
    monkeypatch.setattr("sampling.packed.dtypes_of_onednn", set)
    assert changed == image(model) != plain


def test_changes_that_are_merged_are_packed_with_their_layer(model, monkeypatch):
    """So that at scale 0 the same kernels run as without."""
    monkeypatch.setattr("sampling.packed.LINEAR_FROM", 1)
    base = image(model)
    names = [name for name, layer in model.unet.named_modules() if name.endswith(("conv1", "to_q"))]
    for change in add(model.unet, names, rank=2, alpha=2.0):
        nn.init.normal_(change.to(model.dtype).up.weight)
    changed = image(model)
    merge(model.unet)
    with torch.no_grad(), packed(model.unet, 9):
        assert {type(model.unet.get_submodule(name)) for name in names} == {PackedConv3x3, PackedLinear}
    assert changed != base and {type(model.unet.get_submodule(name)) for name in names} == {LoRAConv3x3, LoRALinear}
    set_scale(model.unet, "default", 0.0)
    assert image(model) == base


@pytest.fixture
def lora_file(model, tmp_path) -> Path:
    names = [name for name, layer in model.unet.named_modules() if name.endswith(("conv1", "to_q", "to_k"))]
    for change in add(model.unet, names, rank=2, alpha=2.0):
        nn.init.normal_(change.to(model.dtype).up.weight)
    write_lora(tmp_path / "lora.safetensors", model.unet)
    remove(model.unet)
    return tmp_path / "lora.safetensors"


def test_a_callback_may_change_and_save_the_model_between_steps(model, lora_file, tmp_path, monkeypatch):
    """What it changes counts from the next step on, in all layers: nothing is prepared for all steps then."""
    name = model.load_lora(lora_file)
    scales = iter([0.0, 0.5] * 2)
    model.set_lora_scale(name, 0.5)

    def change_it(step: int, *_) -> None:
        assert packed_layers(model.unet) == []
        if step == 0:
            model.save_pretrained(tmp_path / "model")
        model.set_lora_scale(name, next(scales))

    changed = image(model, callback=change_it, steps=2)
    saved = StableDiffusion.from_pretrained(tmp_path / "model", "cpu", model.dtype)
    seen = []
    first = image(saved, steps=2, callback=lambda step, t, x, x0: seen.append(x))
    model.set_lora_scale(name, 0.0)
    second = image(model, steps=2, callback=lambda step, t, x, x0: seen[0] if step == 0 else None)
    assert changed == second != first


def test_a_callback_may_change_the_precision_or_the_network(model, lora_file):
    before, plain = state(model.unet), image(model)
    image(model, callback=lambda step, *_: model.load_lora(lora_file) and None)
    assert len(model.loras) == HOW["steps"]
    remove(model.unet)
    low, high = (copy.deepcopy(model.unet).to(dtype) for dtype in (torch.bfloat16, torch.float32))
    assert image(model, callback=lambda step, *_: setattr(model, "unet", (low, high)[step % 2])) != plain
    model.unet = high
    image(model, callback=lambda step, *_: model.to("cpu", torch.float64) and None)
    assert model.dtype == torch.float64 and packed_layers(model.unet) == []
    assert [value[1] for value in state(model.unet).values()] == [value[1] for value in before.values()]


def test_what_changes_the_model_itself_unpacks_it(model, lora_file, tmp_path):
    name = model.load_lora(lora_file)
    with torch.no_grad():
        for change in (lambda: model.set_lora_scale(name, 0.5), lambda: model.save_pretrained(tmp_path / "model")):
            with packed(model.unet, 9):
                call(model)
                change()
                assert packed_layers(model.unet) == []
                assert torch.equal(call(model), call(model))
    assert (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size > 10**5


def trained(unet: nn.Module) -> None:
    x, context = (torch.randn(1, *shape).to(unet.conv_in.weight.dtype) for shape in ((4, 8, 8), (77, 32)))
    unet(x, torch.tensor([5]), context).sum().backward()


def packed_layers(unet: nn.Module) -> list[nn.Module]:
    return [layer for layer in unet.modules() if isinstance(layer, Packed)]


def packed_convolutions(unet: nn.Module) -> list[nn.Module]:
    return [layer for layer in packed_layers(unet) if isinstance(layer, nn.Conv2d)]


def test_layers_that_compute_otherwise_are_left_alone(model, monkeypatch):
    """Circular padding makes images that can be tiled; other programs put functions in the place of PyTorch's."""
    plain = image(model)
    for layer in model.unet.modules():
        if isinstance(layer, nn.Conv2d):
            layer.padding_mode, layer._reversed_padding_repeated_twice = "circular", [1, 1, 1, 1]
    one = next(layer for layer in model.unet.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1))
    one.padding_mode = "zeros"
    with packed(model.unet, 9):
        assert packed_convolutions(model.unet) == [one]
    for layer in model.unet.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.padding_mode = "zeros"
    tiled = image(model)
    with monkeypatch.context() as without:
        without.setattr("sampling.packed.dtypes_of_onednn", set)
        assert image(model) == tiled != plain
    one.forward = lambda x: nn.Conv2d.forward(one, x)
    other = next(layer for layer in reversed(list(model.unet.modules())) if isinstance(layer, nn.Conv2d))
    other._conv_forward = lambda *args: nn.Conv2d._conv_forward(other, *args)
    with packed(model.unet, 9):
        assert not {one, other} & set(packed_convolutions(model.unet)) and packed_convolutions(model.unet)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", lambda self, x, w, b: 0 * nn.functional.conv2d(x, w, b))
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == []
    monkeypatch.undo()
    for owner, name in ((nn.Conv2d, "forward"), (nn.functional, "conv2d"), (nn.functional, "linear")):
        with monkeypatch.context() as patch, packed(model.unet, 9):
            unpack(model.unet)
            patch.setattr(owner, name, lambda *args: None)
            pack(model.unet)
            assert packed_layers(model.unet) == []
    with FlopCounterMode(display=False), packed(model.unet, 9):
        assert packed_layers(model.unet) == []
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 0 * nn.functional.linear(x, self.weight, self.bias))
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == []


def test_without_onednn_all_is_left_alone(model):
    with torch.backends.mkldnn.flags(enabled=False), packed(model.unet, 9):
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
        assert set(convolutions) - set(packed_convolutions(model.unet)) == {*shared[:2], model.unet.conv_out}
    model.unet.mid_block.compile()
    with packed(model.unet, 9):
        assert packed_layers(model.unet) == []


def test_small_linear_layers_are_left_to_mkl_in_float32(model, monkeypatch):
    unet = model.to("cpu", torch.float32).unet
    with packed(unet, 9):
        assert packed_layers(unet) == packed_convolutions(unet)
    sizes = {layer: layer.weight.numel() for layer in unet.modules() if isinstance(layer, nn.Linear)}
    monkeypatch.setattr("sampling.packed.LINEAR_FROM", max(sizes.values()))
    with packed(unet, 9):
        large = {layer for layer, size in sizes.items() if size == max(sizes.values())}
        assert {*packed_layers(unet)} - {*packed_convolutions(unet)} == large


def test_weights_that_others_see_stay_where_they_are(model):
    """In shared memory, in a vector of all of them, in another network."""
    unet = model.unet
    unet.conv_in.share_memory()
    flat = torch.cat([unet.conv_out.weight.data.flatten(), torch.zeros(1, dtype=model.dtype)])
    unet.conv_out.weight.data = flat[:-1].view_as(unet.conv_out.weight)
    with packed(unet, 9):
        assert {unet.conv_in, unet.conv_out}.isdisjoint(packed_layers(unet)) and packed_layers(unet) != []


def test_few_steps_are_not_worth_it(model, monkeypatch):
    monkeypatch.undo()
    with packed(model.unet, 7):
        assert packed_layers(model.unet) == []
    with packed(model.unet, 8):
        assert packed_layers(model.unet) != []


def test_memory_is_given_back_where_something_was_packed(model, monkeypatch):
    """Else a sampling of the `pokemon` model in float32 peaked 12 % higher, when its VAE decodes."""
    given_back = []
    monkeypatch.setattr("sampling.packed.give_memory_back", lambda: given_back.append(packed_layers(model.unet)))
    image(model)
    assert given_back == [[]]
    monkeypatch.setattr("sampling.packed.FROM_CALLS", 9)
    image(model)
    assert given_back == [[]]
    monkeypatch.undo()
    sampling.packed.give_memory_back()


@torch.no_grad()
def test_memory_is_given_back_while_weights_are_ordered(model, monkeypatch):
    """Else what emptied weights took stood beside the ordered ones: 8 % more memory for the `pokemon` U-Net."""
    given_back, here = [], threading.local()
    monkeypatch.setattr(sampling.packed, "THIS_THREAD", here)
    monkeypatch.setattr("sampling.packed.give_memory_back", lambda: given_back.append(here.emptied))
    with packed(model.unet, 8):
        quarter = sum(layer.weight.nbytes for layer in packed_layers(model.unet)) // 4
        monkeypatch.setattr("sampling.packed.GIVE_BACK_EVERY", quarter)
        call(model), call(model)
        assert 2 <= len(given_back) <= 4 and min(given_back) >= quarter > here.emptied


def test_an_interrupt_at_any_line_is_mended_by_the_next_sampling(model):
    """At each line of the module in turn; what it leaves packed gives its state to whoever asks for it, even before."""
    expected, before, weights = image(model), state(model.unet), copy.deepcopy(model.unet.state_dict())
    x, context = (torch.randn(2, *shape).to(model.dtype) for shape in ((4, 8, 9), (77, 32)))
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
                model.unet(x, torch.tensor([5, 500]), context)
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


def test_whoever_asks_a_packed_network_gets_it_as_it_was(model):
    """Its state, copies and gradients."""
    weights = copy.deepcopy(model.unet.state_dict())
    with torch.no_grad():
        plain = call(model)

    def packed_once(ask) -> object:
        with torch.no_grad(), packed(model.unet, 9):
            torch.testing.assert_close(call(model), plain, rtol=1e-5, atol=1e-6)
            assert model.unet.conv_in.weight.numel() == 0
            found = ask()
            assert torch.equal(call(model), plain) and packed_layers(model.unet) == []
            return found

    @torch.enable_grad()
    def gradients() -> None:
        trained(model.unet)
        assert all(p.grad is not None for p in model.unet.parameters())

    found = [
        packed_once(model.unet.state_dict),
        packed_once(lambda: copy.deepcopy(model.unet).state_dict()),
        packed_once(lambda: pickle.loads(pickle.dumps(model.unet)).state_dict()),
        packed_once(lambda: gradients() or model.unet.state_dict()),
        packed_once(lambda: model.unet.load_state_dict(weights) and model.unet.state_dict()),
        packed_once(lambda: model.unet.to(model.dtype).state_dict()),
    ]
    for one in found:
        assert one.keys() == weights.keys() and all(torch.equal(one[name], weights[name]) for name in weights)


def test_it_can_be_trained_after_it_sampled_in_inference_mode(model):
    with torch.inference_mode():
        image(model)
    trained(model.unet)
    assert all(p.grad is not None for p in model.unet.parameters())


def test_an_input_of_another_dtype_is_refused_as_ever(model):
    for layer in (model.unet.conv_in, model.unet.mid_block.attentions[0].transformer_blocks[0].ff.net[2]):
        x = torch.randn(1, 4, 8, 8) if isinstance(layer, nn.Conv2d) else torch.randn(1, 9, layer.in_features)
        with torch.no_grad(), packed(model.unet, 9), pytest.raises(RuntimeError, match=r"dtype|type"):
            layer(x.double())


def test_other_dtypes_and_devices_are_left_alone(model):
    for unet in (copy.deepcopy(model.unet).double(), copy.deepcopy(model.unet).to("meta")):
        with packed(unet, 9):
            assert not any(isinstance(layer, Packed) for layer in unet.modules())


def test_what_is_packed_depends_on_the_steps_and_not_on_the_number_of_images(model, monkeypatch):
    """Else, in float32, an image of a batch would not have the bits that its seed gives alone."""
    monkeypatch.setattr("sampling.packed.FROM_CALLS", 3)
    asked = []
    monkeypatch.setattr("sampling.packed.pack", lambda unet: asked.append(unet))
    for images, steps in ((1, 2), (3, 2), (1, 3), (3, 3)):
        model.sample(["a red fox"] * images, **HOW | {"steps": steps})
        assert len(asked) == (steps == 3), (images, steps)
        asked.clear()


def test_a_network_with_compiled_parts_is_left_alone(model):
    unet = model.unet
    inner = unet.mid_block.resnets[0]
    for owner, name, value in (
        (unet.mid_block, "forward", torch.compile(unet.mid_block.forward, backend="eager")),
        (unet.mid_block.resnets, "0", torch.compile(inner, backend="eager")),
    ):
        setattr(owner, name, value)
        with packed(unet, 9):
            assert packed_layers(unet) == []
        if name == "forward":
            del owner.forward
        else:
            owner[0] = inner
    with packed(unet, 9):
        assert packed_layers(unet) != []


def test_who_samples_within_a_sampling_leaves_it_as_it_was(model, monkeypatch):
    monkeypatch.setattr("sampling.packed.FROM_CALLS", 8)
    this = sampling.packed.THIS_THREAD
    monkeypatch.setattr(this, "packed", False, raising=False)  # a test before may have packed for good
    with packed(model.unet, 9):
        with packed(model.unet, 1):
            assert not this.packed
        assert this.packed
    assert not this.packed


def test_weights_ordered_in_inference_mode_are_ordinary_tensors(model):
    with torch.inference_mode(), packed(model.unet, 9):
        call(model)
        assert not any(layer.packed.is_inference() for layer in packed_layers(model.unet))
    assert not any(p.is_inference() for p in model.unet.parameters())
