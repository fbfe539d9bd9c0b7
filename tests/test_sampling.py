"""What `StableDiffusion.sample` promises: diffusers' latents from the same weights and noise, exact masks, a seed's
image whatever its neighbours, and one sentence for whatever cannot be done."""

import inspect
import math
import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tiny import tiny_model

from guidance import Guidance
from images import image_to_pixels, pixels_to_images, read_parameters, save_png, to_rgb
from noise_schedule import noise_level
from published import schedule_dict, unet_dict, vae_dict
from samplers import SAMPLERS
from stable_diffusion_model import StableDiffusion, slerp
from text_encoder import split_weights

SCHEDULERS = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # of diffusers, on NumPy 2
PROMPTS, NEGATIVE, SEEDS = ["a red fox", "blue (bird:1.4)"], "grey water", [3, 8]
SIZE = {"height": 64, "width": 72}  # neither square nor a power of two: 8 x 9 latents


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    torch.manual_seed(0)
    return tiny_model()


@pytest.fixture(scope="module")
def v_model() -> StableDiffusion:
    torch.manual_seed(1)
    return tiny_model("v_prediction")


@pytest.fixture
def calls(model) -> list[int]:
    """Batch sizes with which the U-Net is asked."""
    seen: list[int] = []
    hook = model.unet.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    yield seen
    hook.remove()


def image(seed: int = 0, size: tuple[int, int] = (72, 64), mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def half_mask(size: tuple[int, int] = (72, 64)) -> Image.Image:
    """White on the left half, and a little further than the latents' grid."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2 + 3, size[1]))
    return mask


def sample(model: StableDiffusion, prompts=PROMPTS, **options) -> tuple[torch.Tensor, list[Image.Image]]:
    """(latents after the last step, images)."""
    seen = []
    settings = {"steps": 4, "seeds": SEEDS[: len(prompts)], "progress": False, **SIZE} | options
    made = model.sample(prompts, **settings, callback=lambda step, t, x, x0: seen.append(x))
    return seen[-1], made


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert b.std() > 0.05
    return (a - b).norm() / b.norm() < 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# The same latents as diffusers' pipelines
# ----------------------------------------------------------------------------------------------------------------------


def theirs(kind: type, model: StableDiffusion, sampler: str, **options) -> torch.Tensor:
    """Final latents of one of diffusers' pipelines with our weights and our encodings of the prompts."""
    unet = UNet2DConditionModel(**unet_dict(model.unet.config))
    vae = AutoencoderKL(**vae_dict(model.vae.config))
    unet.load_state_dict(model.unet.state_dict())
    vae.load_state_dict(model.vae.state_dict())
    scheduler = SCHEDULERS[sampler].from_config(model.scheduler_config | schedule_dict(model.schedule))
    arguments = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = kind(vae=vae.eval(), text_encoder=None, tokenizer=None, unet=unet.eval(), scheduler=scheduler, **arguments)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "output_type": "latent"} | options
    return pipe(
        prompt_embeds=model.encode_prompts(PROMPTS),
        negative_prompt_embeds=model.encode_prompts([NEGATIVE] * len(PROMPTS)),
        generator=[torch.Generator("cpu").manual_seed(seed) for seed in SEEDS],
        **settings,
    ).images


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["model", "v_model"])
class TestLatentsAreThoseOfDiffusers:
    def test_text_to_image(self, request, name, sampler):
        model = request.getfixturevalue(name)
        rescale = {"guidance_rescale": 0.7}
        here, _ = sample(model, negative_prompts=NEGATIVE, sampler=sampler, guidance_scale=5.0, **rescale)
        there = theirs(StableDiffusionPipeline, model, sampler, guidance_scale=5.0, **rescale, **SIZE)
        assert close(here, there)

    def test_without_guidance(self, request, name, sampler):
        model = request.getfixturevalue(name)
        here, _ = sample(model, sampler=sampler, guidance_scale=1)
        assert close(here, theirs(StableDiffusionPipeline, model, sampler, guidance_scale=1.0, **SIZE))

    @pytest.mark.parametrize("strength", [0.5, 1.0])
    def test_image_to_image(self, request, name, sampler, strength):
        model, start = request.getfixturevalue(name), [image(0), image(1)]
        here, _ = sample(model, negative_prompts=NEGATIVE, sampler=sampler, init_images=start, strength=strength)
        there = theirs(StableDiffusionImg2ImgPipeline, model, sampler, image=start, strength=strength)
        assert close(here, there)

    @pytest.mark.parametrize("strength", [0.75, 1.0])
    def test_inpainting(self, request, name, sampler, strength):
        model, start, mask = request.getfixturevalue(name), [image(0), image(1)], half_mask()
        here, _ = sample(
            model, negative_prompts=NEGATIVE, sampler=sampler, init_images=start, masks=mask, strength=strength
        )
        there = theirs(
            StableDiffusionInpaintPipeline, model, sampler, image=start, mask_image=[mask, mask], strength=strength,
            # What a 9-channel U-Net would be shown; encoding it would use up noise that the stochastic samplers want.
            masked_image_latents=torch.zeros(2, 4, 8, 9), **SIZE,
        )  # fmt: skip
        assert close(here, there)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance
# ----------------------------------------------------------------------------------------------------------------------


def test_scale_1_is_the_conditional_model_and_asks_for_nothing_else(model, calls):
    here, _ = sample(model, ["a red fox"], guidance_scale=1, steps=3)
    assert calls == [1, 1, 1]
    other, _ = sample(model, ["a red fox"], guidance_scale=1, negative_prompts="anything", steps=3)
    assert torch.equal(here, other)
    # The same by the long way: c + 1 · (c - c), both questions asked.
    exaggerated, _ = sample(model, ["a red fox"], guidance_scale=7.5, negative_prompts="a red fox", steps=3)
    assert close(exaggerated, here)


def test_scale_0_is_unconditional(model, calls):
    here, _ = sample(model, ["a red fox"], guidance_scale=0, steps=3)
    assert calls == [1, 1, 1]
    empty, _ = sample(model, [""], guidance_scale=1, steps=3)
    assert torch.equal(here, empty)
    words, _ = sample(model, ["a red fox"], guidance_scale=1, steps=3)
    assert not close(words, here)


def test_guidance_is_one_batch(model, calls):
    sample(model, ["a red fox"], steps=3)
    assert calls == [2, 2, 2]


def test_a_negative_prompt_counts(model):
    without, _ = sample(model)
    one_for_all, _ = sample(model, negative_prompts="grey")
    one_each, _ = sample(model, negative_prompts=["grey", ""])
    assert not close(one_for_all, without)
    assert torch.equal(one_each[0], one_for_all[0])
    assert torch.equal(one_each[1], without[1])


def test_guidance_between_two_noise_levels(model, calls):
    """Euler's timesteps may lie between two whole ones, and so do their noise levels."""
    alpha_bar = model.schedule.alphas_cumprod
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
    options = {"sampler": "euler", "timestep_spacing": "linspace", "steps": 3}  # t = 999, 499.5, 0
    below, above = 0.9 * sigma[499] + 0.1 * sigma[500], 0.1 * sigma[499] + 0.9 * sigma[500]
    for interval, expected in (
        ((below, above), [1, 2, 1]),
        ((sigma[498], below), [1, 1, 1]),
        ((above, 20), [2, 1, 1]),
        ((0, below), [1, 1, 2]),
    ):
        calls.clear()
        sample(model, ["a red fox"], **options, guidance_interval=interval)
        assert calls == expected
    conditional, _ = sample(model, guidance_scale=1)
    for scale in (7.5, 0):  # outside of the interval any guidance is none
        never, _ = sample(model, guidance_scale=scale, guidance_interval=(1e6, 1e7))
        assert torch.equal(never, conditional)


@pytest.mark.parametrize("ends", [(1, 2), (0.5, 1), (1, 1)])
def test_the_ends_of_the_interval_belong_to_it(ends):
    sigma, x = noise_level(0.3), torch.randn(1, 4, 8, 8)
    low, high = (sigma * end for end in ends)
    guidance, seen = Guidance(interval=(low, high)), []

    def model(x_t: torch.Tensor, t: float, context: torch.Tensor) -> torch.Tensor:
        seen.append(len(x_t))
        return x_t

    contexts = guidance.contexts(*torch.randn(2, 1, 77, 8))
    guidance.predict(model, x, *contexts, 500.0, 0.3)
    assert seen == [2]


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({}, [2]),  # both halves of the guidance batch at once
        ({"guidance_scale": 1}, [1]),
        ({"guidance_scale": 0}, [1]),
        ({"guidance_interval": (0, 1)}, [1, 2]),  # outside and inside
        ({"guidance_interval": (1e6, 1e7)}, [1]),
    ],
)
@pytest.mark.parametrize("steps", [4, 7])
def test_the_text_is_projected_once_and_not_in_every_step(model, options, texts, steps):
    cross = next(module for name, module in model.unet.named_modules() if name.endswith("attn2"))
    seen: list[int] = []
    hook = cross.to_k.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    model.sample(PROMPTS, steps=steps, progress=False, **SIZE, **options)
    hook.remove()
    assert seen == [n for n in texts for _ in PROMPTS]  # each image by itself, on a CPU


def test_it_samples_channels_last_whatever_the_networks_came_in(model):
    def layout(network: torch.nn.Module) -> list[bool]:
        filters = [weight for weight in network.parameters() if weight.ndim == 4 and weight.shape[-1] == 3]
        return [weight.is_contiguous(memory_format=torch.channels_last) for weight in filters]

    parts = tiny_model().parts
    for network in (parts.unet, parts.vae):
        network.to(memory_format=torch.contiguous_format)
        assert not any(layout(network))
    again = StableDiffusion(*parts).to("cpu")
    assert layout(again.unet) and all(layout(again.unet)) and all(layout(again.vae))


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, 7.5])
def test_guidance_goes_from_the_unconditional_prediction_past_the_conditional_one(scale):
    without, words = torch.randn(2, 2, 4, 8, 8)
    torch.testing.assert_close(Guidance(scale).combine(without, words), (1 - scale) * without + scale * words)


def test_rescaled_guidance_restores_the_conditional_spread():
    """Lin et al. 2024: at φ = 1 the guided prediction is as wide as the conditional one, image by image."""
    torch.manual_seed(0)
    without, words = torch.randn(2, 2, 4, 8, 8)
    plain, half, full = (Guidance(9.0, rescale).combine(without, words) for rescale in (0.0, 0.5, 1.0))
    dims = (1, 2, 3)
    assert (plain.std(dims) > 3 * words.std(dims)).all()
    torch.testing.assert_close(full.std(dims), words.std(dims))
    torch.testing.assert_close(half, (plain + full) / 2)
    assert Guidance(9.0, 0.7).combine(torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)).isfinite().all()


# ----------------------------------------------------------------------------------------------------------------------
# Steps, seeds, sizes
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_asked_are_steps_taken(model, calls, sampler):
    for steps in (1, 2, 3, 7, 20, 50):
        calls.clear()
        reported = []
        model.sample(
            ["x"], steps=steps, sampler=sampler, height=8, width=8, progress=False,
            callback=lambda step, t, x, x0, reported=reported: reported.append(step),
        )  # fmt: skip
        assert len(calls) == steps
        assert reported == list(range(steps))


def test_image_to_image_takes_its_share_of_the_steps(model, calls):
    for steps, strength, taken in ((10, 0.8, 8), (10, 0.05, None), (7, 0.5, 3), (3, 1.0, 3)):
        calls.clear()
        if taken is None:
            with pytest.raises(ValueError, match="strength"):
                sample(model, ["x"], steps=steps, strength=strength, init_images=image())
        else:
            sample(model, ["x"], steps=steps, strength=strength, init_images=image())
        assert len(calls) == (taken or 0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_has_the_bits_of_its_seed_whatever_its_neighbours(model, sampler):
    """The guarantee on a CPU; on a GPU, batched matrix kernels may sum in another order."""
    prompts, seeds = ["a red fox", "blue (bird:1.4)", "", "a red fox"], [3, 8, 5, 3]
    starts = [image(k) for k in range(4)]
    for options in ({}, {"init_images": starts, "masks": [half_mask()] * 4, "strength": 0.8}):
        together, made = sample(model, prompts, seeds=seeds, sampler=sampler, **options)
        for k in (0, 1, 2):
            own = {name: [values[k]] if name != "strength" else values for name, values in options.items()}
            alone, one = sample(model, [prompts[k]], seeds=seeds[k], sampler=sampler, **own)
            assert torch.equal(together[k], alone[0])
            assert np.array_equal(array(made[k]), array(one[0]))
        assert torch.equal(together[0], together[3]) == (not options)


def test_seeds(model):
    counted, _ = sample(model, ["x", "x", "x"], seeds=5)
    listed, _ = sample(model, ["x", "x", "x"], seeds=[5, 6, 7])
    assert torch.equal(counted, listed)
    assert not close(counted[0], counted[1])
    numpy_seeds, _ = sample(model, ["x", "x", "x"], seeds=np.arange(5, 8))
    assert torch.equal(counted, numpy_seeds)


def test_sampling_repeats_itself_and_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    first, second = sample(model, sampler="euler_a"), sample(model, sampler="euler_a")
    assert torch.equal(first[0], second[0])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (16, 8), (40, 104), (64, 24)])
def test_any_size_divisible_by_8(model, height, width):
    (made,) = sample(model, ["x"], height=height, width=width)[1]
    assert made.size == (width, height)
    assert made.mode == "RGB"
    (again,) = sample(model, ["x"], height=height, width=width, init_images=made)[1]
    assert again.size == made.size


def test_a_tiled_decoder_changes_only_the_decoding(model):
    large = {"height": 64, "width": 560}  # 70 latents wide, in tiles of 64
    (whole_x, whole), (tiled_x, tiled) = (sample(model, ["x"], vae_tiling=tiling, **large) for tiling in (False, True))
    assert torch.equal(whole_x, tiled_x)
    assert tiled[0].size == (560, 64)
    assert 0 < np.abs(array(whole[0]) - array(tiled[0])).mean() < 20  # group norms see other neighbours in a tile


def test_a_half_precision_model_samples_nearly_the_same(model):
    exact, _ = sample(model)
    rounded, _ = sample(_copy_of(model).to("cpu", torch.bfloat16))
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() / exact.norm() < 0.1


def _copy_of(model: StableDiffusion) -> StableDiffusion:
    torch.manual_seed(0)  # as the fixture
    copy = tiny_model()
    assert torch.equal(copy.unet.conv_in.weight, model.unet.conv_in.weight)
    return copy


# ----------------------------------------------------------------------------------------------------------------------
# Images to start from
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_outside_the_mask_the_original_returns_exactly(model, mode):
    originals, mask = [image(k, mode=mode) for k in (0, 1)], half_mask()
    made = sample(model, init_images=originals, masks=mask, strength=1.0)[1]
    keep = np.asarray(mask) == 0
    for here, original in zip(made, originals, strict=True):
        expected = array(to_rgb(original))
        assert np.array_equal(array(here)[keep], expected[keep])
        assert (array(here)[~keep] != expected[~keep]).mean() > 0.9


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "I;16"])
def test_a_mask_of_any_mode_means_the_same(model, mode):
    mask = half_mask()
    converted = Image.fromarray(np.asarray(mask).astype(np.uint16) * 257) if mode == "I;16" else mask.convert(mode)
    expected, _ = sample(model, init_images=image(), masks=mask)
    assert torch.equal(sample(model, init_images=image(), masks=converted)[0], expected)


def test_masks_of_all_and_nothing(model):
    original = image()
    (nothing,) = sample(model, ["x"], init_images=original, masks=Image.new("L", original.size, 0))[1]
    assert np.array_equal(array(nothing), array(original))
    everything, _ = sample(model, ["x"], init_images=original, masks=Image.new("L", original.size, 255))
    assert torch.equal(everything, sample(model, ["x"], init_images=original)[0])


def test_weaker_strength_stays_closer_to_the_image(model):
    original = image()
    latents = model.encode_images(image_to_pixels(original)[None], torch.Generator().manual_seed(3))
    far = [
        (sample(model, ["x"], init_images=original, strength=s, steps=20)[0] - latents).norm() for s in (0.1, 0.5, 1)
    ]
    assert far == sorted(far)


def test_an_image_turned_by_its_exif_tag_is_measured_upright(model):
    lying = image(size=(64, 72))
    upright = lying.transpose(Image.Transpose.ROTATE_270)
    exif = lying.getexif()
    exif[0x0112] = 6  # turn by 90 degrees when shown
    lying.info["exif"] = exif.tobytes()
    turned, _ = sample(model, ["x"], init_images=lying)
    assert torch.equal(turned, sample(model, ["x"], init_images=upright)[0])


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation and the callback
# ----------------------------------------------------------------------------------------------------------------------


def test_slerp_stays_noise_where_a_line_would_not():
    torch.manual_seed(0)
    a, b = torch.randn(2, 1, 4, 64, 64)
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.02)
    assert torch.lerp(a, b, 0.5).std() == pytest.approx(2**-0.5, abs=0.02)
    torch.testing.assert_close(slerp(a, a, 0.3), a)


def test_given_noise_and_encodings_are_those_of_seeds_and_prompts(model):
    noise = torch.cat([torch.randn((1, 4, 8, 9), generator=torch.Generator().manual_seed(seed)) for seed in SEEDS])
    encoded = torch.cat([model.encode_prompts([prompt]) for prompt in PROMPTS])
    expected, _ = sample(model)
    assert torch.equal(sample(model, noise=noise)[0], expected)
    assert torch.equal(sample(model, encoded)[0], expected)
    between = torch.lerp(encoded[:1], encoded[1:], 0.5)
    mixed, _ = sample(model, between, seeds=[3])
    assert not close(mixed, expected[:1])


def test_the_callback_sees_the_film_and_may_cut_it(model):
    film = []

    def watch(step, t, x_t, x0):
        film.append((step, t, x_t.shape, x0.shape))
        return torch.zeros_like(x_t) if step == 2 else None

    (grey,) = model.sample(["x"], steps=3, sampler="ddim", progress=False, callback=watch, **SIZE)
    assert [step for step, *_ in film] == [0, 1, 2]
    assert [t for _, t, *_ in film] == [667, 334, 1]
    assert {shape for *_, a, b in film for shape in (a, b)} == {(1, 4, 8, 9)}
    expected = pixels_to_images(model.decode_latents(torch.zeros(1, 4, 8, 9)))[0]
    assert np.array_equal(array(grey), array(expected))


def test_progress_is_shown_unless_unwanted(model, capsys):
    model.sample(["x"], steps=2, height=8, width=8)
    assert "sampling with dpm++2m: 100%" in capsys.readouterr().err
    model.sample(["x"], steps=2, height=8, width=8, progress=False)
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------------------------------------
# Words
# ----------------------------------------------------------------------------------------------------------------------


def test_prompts_are_split_into_weighted_pieces():
    assert split_weights("a (red:1.3) fox") == [("a", 1.0), ("red", 1.3), ("fox", 1.0)]
    assert split_weights("(tail: .5)") == [("tail", 0.5)]
    assert split_weights("(two words:0)") == [("two words", 0.0)]
    assert split_weights("a (big) fox at 10:30 (pm)") == [("a (big) fox at 10:30 (pm)", 1.0)]
    assert split_weights(r"smile \(red:1.3\)") == [("smile (red:1.3)", 1.0)]
    assert split_weights("") == [("", 1.0)]


def test_weights_turn_words_up_and_down(model):
    plain, one, more, none, other = model.encode_prompts(
        ["red fox", "(red:1) fox", "(red:1.5) fox", "(red:0) fox", "red fox"]
    )
    assert torch.equal(one, plain)
    assert torch.equal(other, plain)  # a weighted neighbour in the batch changes nothing
    red = slice(1, 4)  # the tokenizer spells

    def share(x: torch.Tensor) -> float:
        return (x[red].norm() / x.norm()).item()

    assert share(none) == 0 < share(plain) < share(more)
    for x in (more, none):
        assert x.norm() == pytest.approx(plain.norm().item(), rel=1e-5)  # attention's logits keep their size


def test_a_long_prompt_is_cut_with_a_warning_that_shows_what_was_dropped(model):
    long = "a" * 75 + " xyz"
    with pytest.warns(UserWarning, match="x *y *z"):
        cut, _ = sample(model, [long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits, _ = sample(model, ["a" * 75])
    assert torch.equal(cut, fits)


# ----------------------------------------------------------------------------------------------------------------------
# What an image says of itself
# ----------------------------------------------------------------------------------------------------------------------


def test_a_png_says_how_it_was_made(model, tmp_path):
    prompt, negative = 'a "fox", red: very\nSteps: none, and\\or ünïcødé 狐狸', "grey, (water:1.2)\nsecond line"
    made = sample(model, [prompt, "b"], negative_prompts=[negative, ""], guidance_scale=6.5, sampler="euler_a")[1]
    save_png(made[0], tmp_path / "new folder" / "fox.png")
    read = read_parameters(tmp_path / "new folder" / "fox.png")
    assert read == {
        "prompt": prompt, "negative_prompt": negative, "Steps": "4", "Sampler": "euler_a", "CFG scale": "6.5",
        "Seed": "3", "Size": "72x64", "Model": "tiny",
    }  # fmt: skip
    assert read_parameters(made[1])["prompt"] == "b"
    assert read_parameters(made[1])["negative_prompt"] == ""
    with Image.open(tmp_path / "new folder" / "fox.png") as stored:
        assert stored.text["parameters"].endswith("CFG scale: 6.5, Seed: 3, Size: 72x64, Model: tiny")
        assert np.array_equal(array(stored), array(made[0]))


def test_a_model_is_called_after_its_run(model, tmp_path):
    model.save_pretrained(tmp_path / "monsters" / "model")
    again = StableDiffusion.from_pretrained(tmp_path / "monsters" / "model", device="cpu")
    assert again.name == "monsters"
    assert torch.equal(sample(again)[0], sample(model)[0])


def test_what_is_not_told_by_the_seed_is_not_said_to_be(model):
    (made,) = sample(model, ["x"], noise=torch.zeros(1, 4, 8, 9), guidance_interval=[0.5, 3], karras=True)[1]
    read = read_parameters(made)
    assert "Seed" not in read
    assert (read["CFG interval"], read["Schedule type"]) == ("[0.5, 3]", "Karras")


def test_what_was_said_is_enough_to_make_it_again(model):
    (made,) = sample(model, ["a fox"], negative_prompts="water", sampler="ddim", eta=0.5, guidance_rescale=0.5)[1]
    read = read_parameters(made)
    width, height = map(int, read["Size"].split("x"))
    (again,) = model.sample(
        read["prompt"], negative_prompts=read["negative_prompt"], steps=int(read["Steps"]), sampler=read["Sampler"],
        guidance_scale=float(read["CFG scale"]), guidance_rescale=float(read["CFG rescale"]), eta=float(read["Eta"]),
        seeds=int(read["Seed"]), height=height, width=width, progress=False,
    )  # fmt: skip
    assert np.array_equal(array(again), array(made))


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be done
# ----------------------------------------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD_REQUESTS = {
    "no prompts": ({"prompts": []}, "prompts is empty"),
    "prompts that are no text": ({"prompts": ["a", None]}, "prompts"),
    "a number as prompt": ({"prompts": 3}, "prompts"),
    "encodings of another width": ({"prompts": torch.zeros(1, 77, 31)}, r"prompts.*\(any, 77, 32\)"),
    "encodings with NaN": ({"prompts": torch.full((1, 77, 32), NAN)}, "prompts"),
    "height": ({"height": 65}, "height.*divisible by 8.*64"),
    "width": ({"width": 4}, "width.*divisible by 8"),
    "no height": ({"height": 0}, "height"),
    "negative width": ({"width": -8}, "width"),
    "half a pixel": ({"width": 64.5}, "width"),
    "sampler": ({"sampler": "plms"}, r"plms.*dpm\+\+2m"),
    "no steps": ({"steps": 0}, "steps is 0.*1 to 1000"),
    "too many steps": ({"steps": 1001}, "steps is 1001"),
    "half a step": ({"steps": 1.5}, "steps"),
    "NaN guidance": ({"guidance_scale": NAN}, "guidance_scale"),
    "infinite guidance": ({"guidance_scale": INF}, "guidance_scale"),
    "guidance in words": ({"guidance_scale": "high"}, "guidance_scale"),
    "NaN rescale": ({"guidance_rescale": NAN}, "guidance_rescale"),
    "too much rescale": ({"guidance_rescale": 1.1}, "guidance_rescale"),
    "interval upside down": ({"guidance_interval": (2, 1)}, "guidance_interval"),
    "NaN in the interval": ({"guidance_interval": (NAN, 1)}, "guidance_interval"),
    "an interval with one end": ({"guidance_interval": 3.0}, "guidance_interval"),
    "more negative prompts than prompts": ({"negative_prompts": ["a", "b"]}, "negative_prompts: 2 given for 1"),
    "no negative prompts": ({"negative_prompts": []}, "negative_prompts is empty"),
    "more seeds than prompts": ({"seeds": [1, 2]}, "seeds: 2 given for 1"),
    "a negative seed": ({"seeds": -1}, "seeds"),
    "a fractional seed": ({"seeds": 0.5}, "seeds"),
    "eta": ({"eta": NAN, "sampler": "ddim"}, "eta"),
    "infinite eta": ({"eta": INF, "sampler": "ddim"}, "eta"),
    "eta for another sampler": ({"eta": 0.5}, "eta.*ddim"),
    "Karras for another sampler": ({"karras": True, "sampler": "ddim"}, "karras"),
    "spacing": ({"timestep_spacing": "dense"}, "timestep_spacing"),
    "no strength": ({"init_images": image(), "strength": 0.0}, "strength"),
    "too much strength": ({"init_images": image(), "strength": 1.01}, "strength"),
    "NaN strength": ({"init_images": image(), "strength": NAN}, "strength"),
    "a start of another size": ({"init_images": image(size=(64, 64))}, r"init_images\[0\] is 64×64.*72×64"),
    "a start that is no image": ({"init_images": ["fox.png"]}, r"init_images\[0\].*str"),
    "more starts than prompts": ({"init_images": [image()] * 2}, "init_images: 2 given for 1"),
    "a mask of another size": ({"init_images": image(), "masks": half_mask((64, 64))}, r"masks\[0\] is 64×64"),
    "no masks": ({"init_images": image(), "masks": []}, "masks"),
    "a mask without an image": ({"masks": half_mask()}, "init_images"),
    "noise of another shape": ({"noise": torch.zeros(1, 4, 8, 8)}, r"noise.*\(1, 4, 8, 9\)"),
    "noise with NaN": ({"noise": torch.full((1, 4, 8, 9), NAN)}, "noise"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused_in_a_sentence_before_any_network_runs(model, monkeypatch, case):
    def run(*_):
        raise AssertionError("a network ran")

    for module in (model.unet, model.vae, model.text_encoder.model):
        monkeypatch.setattr(module, "forward", run)
        if hasattr(module, "encode"):
            monkeypatch.setattr(module, "encode", run)
    options, message = BAD_REQUESTS[case]
    with pytest.raises(ValueError, match=message) as caught:
        model.sample(**({"prompts": ["x"], "steps": 2, "progress": False} | SIZE | options))
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")


def test_overflow_is_reported_not_painted(model):
    def poison(step, t, x_t, x0):
        return torch.full_like(x_t, NAN)

    with pytest.raises(FloatingPointError, match="float32"):
        model.sample(["x"], steps=2, progress=False, callback=poison, **SIZE)


def test_the_signature_is_the_published_one():
    parameters = inspect.signature(StableDiffusion.sample).parameters
    published = {
        "steps": 30, "sampler": "dpm++2m", "guidance_scale": 7.5, "guidance_rescale": 0.0, "seeds": 0, "height": 512,
        "width": 512, "init_images": None, "strength": 0.8, "masks": None, "callback": None, "negative_prompts": None,
    }  # fmt: skip
    assert {name: parameters[name].default for name in published} == published
