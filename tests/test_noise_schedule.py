"""The noise schedule against diffusers' DDPMScheduler, its own inverses, and the end where formulas divide by zero."""

import functools
import itertools

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr

from noise_schedule import NoiseSchedule, epsilon_from_prediction, noised, velocity, x0_from_prediction
from published import noise_schedule, schedule_dict

CURVES = {
    "scaled_linear": {"beta_start": 0.00085, "beta_end": 0.012},
    "linear": {"beta_start": 1e-4, "beta_end": 0.02},
    "squaredcos_cap_v2": {"beta_start": 1e-4, "beta_end": 0.02},
}
T = torch.tensor([0, 1, 17, 250, 500, 777, 998, 999])


def pair(schedule: str, prediction_type: str = "epsilon", zero: bool = False, n: int = 1000):
    """The same schedule twice: ours and diffusers'."""
    same = {"prediction_type": prediction_type, **CURVES[schedule]}
    ours = NoiseSchedule(n, schedule=schedule, zero_terminal_snr=zero, **same)
    theirs = diffusers.DDPMScheduler(n, beta_schedule=schedule, rescale_betas_zero_snr=zero, **same)
    return ours, theirs


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(len(T), 4, 5, 3), torch.randn(len(T), 4, 5, 3)


@pytest.mark.parametrize("n", [1000, 10])
@pytest.mark.parametrize("schedule", CURVES)
def test_tables_are_those_of_diffusers(schedule, n):
    ours, theirs = pair(schedule, n=n)
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == torch.float32
    assert torch.equal(ours.betas, theirs.betas)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)


@pytest.mark.parametrize("schedule", CURVES)
def test_zero_terminal_snr_tables_are_those_of_diffusers(schedule):
    ours, theirs = pair(schedule, "v_prediction", zero=True)
    torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    assert ours.alphas_cumprod[-1] == 0  # nothing of the image is left, exactly
    untouched, _ = pair(schedule)
    torch.testing.assert_close(ours.alphas_cumprod[0], untouched.alphas_cumprod[0])  # while the first level stays


def test_known_constants_of_stable_diffusion():
    schedule = NoiseSchedule()
    assert schedule.num_timesteps == 1000 and schedule.prediction_type == "epsilon"
    sigmas = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt()
    assert schedule.alphas_cumprod[0].item() == pytest.approx(0.99915, abs=1e-6)
    assert schedule.alphas_cumprod[-1].item() == pytest.approx(0.0046601, abs=1e-6)
    assert sigmas[0].item() == pytest.approx(0.0292, abs=1e-4)
    assert sigmas[-1].item() == pytest.approx(14.6146, abs=1e-3)
    assert (schedule.alphas_cumprod.diff() < 0).all()


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("schedule", CURVES)
def test_noise_and_velocity_are_those_of_diffusers(schedule, zero):
    ours, theirs = pair(schedule, "v_prediction", zero)
    x0, noise = images()
    torch.testing.assert_close(ours.add_noise(x0, noise, T), theirs.add_noise(x0, noise, T), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.target(x0, noise, T), theirs.get_velocity(x0, noise, T), rtol=1e-4, atol=1e-5)
    as_epsilon, _ = pair(schedule)
    assert torch.equal(as_epsilon.target(x0, noise, T), noise)


@pytest.mark.parametrize("schedule", CURVES)
def test_snr_is_that_of_diffusers(schedule):
    ours, theirs = pair(schedule)
    torch.testing.assert_close(ours.snr(T), compute_snr(theirs, T), rtol=1e-4, atol=0)
    assert (ours.snr(torch.arange(1000)).diff() < 0).all()


def test_snr_is_zero_at_the_end_of_a_zero_terminal_schedule():
    schedule, _ = pair("scaled_linear", "v_prediction", zero=True)
    assert schedule.snr(torch.tensor([999])).item() == 0


KINDS = [("epsilon", False), ("v_prediction", False), ("v_prediction", True)]


@pytest.mark.parametrize(("prediction_type", "zero"), KINDS)
def test_predictions_turn_back_into_what_made_them(prediction_type, zero):
    """The perfect prediction at any t gives x_0 and ε back; at zero SNR, where x_t has lost x_0, v still does."""
    schedule, _ = pair("scaled_linear", prediction_type, zero)
    x0, noise = images()
    x0, noise = x0.double(), noise.double()
    x_t = schedule.add_noise(x0, noise, T)
    target = schedule.target(x0, noise, T)
    torch.testing.assert_close(schedule.to_x0(target, x_t, T), x0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule.to_epsilon(target, x_t, T), noise, rtol=1e-5, atol=1e-5)
    assert torch.equal(schedule.add_noise(x0, noise, torch.full((len(T),), 999)), noise) == zero


@pytest.mark.parametrize(("prediction_type", "zero"), KINDS)
def test_training_and_samplers_compute_the_same(prediction_type, zero):
    """The equations at a float ᾱ, as samplers call them, and at timesteps, as training does."""
    schedule, _ = pair("scaled_linear", prediction_type, zero)
    x0, noise = images()
    x_t, target = schedule.add_noise(x0, noise, T), schedule.target(x0, noise, T)
    for i, t in enumerate(T):
        alpha_bar, one = schedule.alphas_cumprod[t].item(), slice(i, i + 1)
        close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
        close(noised(x0[one], noise[one], alpha_bar), x_t[one])
        wanted = noise[one] if prediction_type == "epsilon" else velocity(x0[one], noise[one], alpha_bar)
        close(target[one], wanted)
        predicted = target[one], x_t[one], alpha_bar, prediction_type
        close(x0_from_prediction(*predicted), schedule.to_x0(target, x_t, T)[one])
        close(epsilon_from_prediction(*predicted), schedule.to_epsilon(target, x_t, T)[one])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_results_have_the_type_of_what_was_given(dtype):
    schedule, _ = pair("scaled_linear", "v_prediction")
    x0, noise = (v.to(dtype) for v in images())
    x_t, target = schedule.add_noise(x0, noise, T), schedule.target(x0, noise, T)
    found = schedule.to_x0(target, x_t, T), schedule.to_epsilon(target, x_t, T)
    assert {tensor.dtype for tensor in (x_t, target, *found)} == {dtype}
    torch.testing.assert_close(found[0].double(), x0.double(), rtol=0, atol=0.05)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5, 6)])
def test_each_image_has_its_own_timestep(shape):
    schedule, t = NoiseSchedule(), torch.tensor([5, 500, 995])
    x0, noise = torch.randn(shape), torch.randn(shape)
    together = schedule.add_noise(x0, noise, t)
    for i in range(3):
        alone = slice(i, i + 1)
        torch.testing.assert_close(together[alone], schedule.add_noise(x0[alone], noise[alone], t[alone]))


def test_noised_data_keeps_unit_variance():
    """√ᾱ² + √(1-ᾱ)² = 1: what the U-Net sees has unit variance at every t, for latents that have."""
    schedule, n = NoiseSchedule(), 40_000
    for t in (0, 300, 700, 999):
        x_t = schedule.add_noise(torch.randn(1, n), torch.randn(1, n), torch.tensor([t]))
        assert x_t.var().item() == pytest.approx(1, abs=0.04)


@pytest.mark.parametrize("gamma", [1.0, 5.0, 20.0])
def test_min_snr_weights(gamma):
    """Hang et al. 2023: min(SNR, γ) in x_0-space, so / SNR for an ε-loss and / (SNR + 1) for a v-loss."""
    t = torch.arange(1000)
    for prediction_type, extra in (("epsilon", 0), ("v_prediction", 1)):
        ours, theirs = pair("scaled_linear", prediction_type)
        snr = compute_snr(theirs, t)
        expected = torch.minimum(snr, torch.tensor(gamma)) / (snr + extra)
        torch.testing.assert_close(ours.loss_weight(t, gamma), expected, rtol=1e-4, atol=0)
    assert torch.equal(ours.loss_weight(t, None), torch.ones(1000))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_min_snr_weighs_every_target_like_the_same_loss_on_x0(prediction_type):
    """weight · |error of the prediction|² = min(SNR, γ) · |error of x_0|², whatever the model predicts."""
    schedule, _ = pair("scaled_linear", prediction_type)
    x0, noise = (v.double() for v in images())
    x_t, target = schedule.add_noise(x0, noise, T), schedule.target(x0, noise, T)
    prediction = target + 0.1 * torch.randn_like(target)
    in_prediction = (prediction - target).pow(2).mean((1, 2, 3))
    in_x0 = (schedule.to_x0(prediction, x_t, T) - x0).pow(2).mean((1, 2, 3))
    weighted = schedule.loss_weight(T, 5.0) * in_prediction
    torch.testing.assert_close(weighted, schedule.snr(T).clamp(max=5.0) * in_x0, rtol=1e-4, atol=1e-9)


def test_no_min_snr_where_nothing_of_the_image_is_left():
    """It would weigh the last timestep 0, so a schedule that has one weighs all 1."""
    schedule, _ = pair("scaled_linear", "v_prediction", zero=True)
    assert torch.equal(schedule.loss_weight(torch.arange(1000), 5.0), torch.ones(1000))
    assert torch.isfinite(schedule.snr(torch.arange(1000))).all()


def test_config_survives_the_round_trip_and_opens_in_diffusers():
    for curve, (prediction_type, zero) in itertools.product(CURVES, KINDS):
        schedule, _ = pair(curve, prediction_type, zero)
        config = schedule_dict(schedule)
        assert noise_schedule(config) == schedule
        theirs = diffusers.DDPMScheduler.from_config(config)
        torch.testing.assert_close(theirs.alphas_cumprod, schedule.alphas_cumprod, rtol=1e-4, atol=1e-7)
        assert theirs.config.prediction_type == prediction_type


def test_a_silent_config_means_what_diffusers_takes_it_for():
    schedule, theirs = noise_schedule({}), diffusers.DDPMScheduler()
    assert torch.equal(schedule.alphas_cumprod, theirs.alphas_cumprod)
    assert schedule.prediction_type == theirs.config.prediction_type


def test_bad_options_are_refused_by_name():
    for message, call in [
        ("prediction_type", lambda: NoiseSchedule(prediction_type="sample")),
        ("schedule", lambda: NoiseSchedule(schedule="sigmoid")),
        ("zero_terminal_snr", lambda: NoiseSchedule(zero_terminal_snr=True)),
        ("trained_betas", lambda: noise_schedule({"trained_betas": [0.1]})),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_tables_move_to_the_device():
    schedule = NoiseSchedule().to("meta")  # the one device beside the CPU that every machine has
    assert schedule.alphas_cumprod.device.type == schedule.betas.device.type == "meta"


def test_timesteps_are_drawn_evenly_and_equally_often() -> None:
    """A batch has one in each n-th of the range; over many batches every timestep comes as often, at every place."""
    schedule, generator = NoiseSchedule(num_timesteps=20), torch.Generator().manual_seed(0)
    drawn = torch.stack([schedule.draw_timesteps(4, generator) for _ in range(4000)])  # (batches, 4)
    for k in range(4):
        counts = torch.bincount(drawn[:, k], minlength=20)
        expected = torch.zeros(20)
        expected[5 * k : 5 * k + 5] = 800
        assert (counts - expected).abs().max() < 120
    assert (drawn.diff(dim=1) == 5).all()
    single = torch.cat([schedule.draw_timesteps(1, generator) for _ in range(20_000)])
    assert (torch.bincount(single, minlength=20) - 1000).abs().max() < 150
    assert schedule.draw_timesteps(2000, generator).unique().tolist() == list(range(20))
