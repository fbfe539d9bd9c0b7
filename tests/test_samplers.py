"""Samplers against diffusers' schedulers, against problems whose answer is known, and against their own promises."""

import contextlib
import dataclasses
import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import samplers
from noise_schedule import NoiseSchedule
from published import noise_schedule, schedule_dict
from samplers import KARRAS_SAMPLERS, SAMPLERS, SPACINGS, TimestepGrid, grid_options, inpainting, timestep_grid

DIFFUSERS = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_a": diffusers.EulerAncestralDiscreteScheduler,
    "dpm++2m": diffusers.DPMSolverMultistepScheduler,
}
COUNTS = (1, 2, 7, 20, 50)
SHAPE = (2, 4, 8, 8)
NAMES = list(SAMPLERS)


def model(x: Tensor, t: float | Tensor) -> Tensor:
    """A fixed nonlinear stand-in for the U-Net that mixes neighbours and channels and heeds the timestep."""
    t = float(t) / 1000
    mixed = 0.6 * x + 0.3 * x.roll(1, -1) - 0.2 * x.roll(1, -2) + 0.25 * x.roll(1, 1)
    return torch.tanh(mixed * (1.2 - 0.5 * t)) + 0.3 * math.sin(9 * t) + 0.1 * x


def step_noise(step: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(1000 + step))


def unit(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert torch.isfinite(theirs).all()
    return ((ours - theirs).norm() / theirs.norm()).item()


def scheduler_of(name: str, schedule: NoiseSchedule, **options) -> diffusers.SchedulerMixin:
    """Diffusers' counterpart with Stable Diffusion 1.x's options, unless `options` say otherwise."""
    own = {"ddpm": {"clip_sample": False}, "ddim": {"clip_sample": False, "set_alpha_to_one": False}}.get(name, {})
    return DIFFUSERS[name](**{**schedule_dict(schedule), "steps_offset": 1, **own, **options})


def their_loop(scheduler, steps: int, noise: Tensor, *, strength=None, original=None, mask=None, eta=0.0, seen=None):
    """The denoising loop of diffusers' pipelines: text-to-image, img2img (`original`), inpainting (and `mask`)."""
    scheduler.set_timesteps(steps)
    skip = 0 if strength is None else steps - min(int(steps * strength), steps)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(skip)
    timesteps = scheduler.timesteps[skip:]
    if original is None or (mask is not None and strength == 1):
        x = noise * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(original, noise, timesteps[:1])
    for i, t in enumerate(timesteps):
        their_step[0] = i
        if seen is not None:
            seen.append(float(t))
        prediction = model(scheduler.scale_model_input(x, t), t)
        options = {}
        if isinstance(scheduler, diffusers.DDIMScheduler) and eta > 0:
            options = {"eta": eta, "variance_noise": step_noise(i)}
        x = scheduler.step(prediction, t, x, **options).prev_sample
        if mask is not None:
            kept = original
            if i < len(timesteps) - 1:
                kept = scheduler.add_noise(original, noise, timesteps[i + 1 : i + 2])
            x = (1 - mask) * kept + mask * x
    return x


@pytest.fixture(autouse=True)
def _same_noise(monkeypatch):
    """Hands diffusers' stochastic schedulers the noise that our samplers get, step for step (see `their_loop`)."""
    for module in ("scheduling_ddpm", "scheduling_euler_ancestral_discrete"):
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: step_noise(their_step[0]))


their_step = [0]


class DoubleTorch:
    """Stands in for `torch` inside a scheduler's module, where samples and sigmas shall be float64."""

    float32 = torch.float64

    @staticmethod
    def from_numpy(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).double()

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextlib.contextmanager
def in_double():
    """Lets diffusers' Euler schedulers step in float64: starting at σ = 4096, their float32 is off by up to 1e-3."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("scheduling_euler_discrete", "scheduling_euler_ancestral_discrete"):
            patch.setattr(f"diffusers.schedulers.{module}.torch", DoubleTorch())
        yield


def compare(name: str, schedule: NoiseSchedule, steps: int, *, eta=0.0, large_sigmas=False, **options) -> float:
    """Relative difference of two text-to-image loops: ours on a grid with these options, diffusers' with the same."""
    noise, seen, asked = unit(0), [], []
    scheduler = scheduler_of(name, schedule, **options)
    with in_double() if large_sigmas else contextlib.nullcontext():
        expected = their_loop(scheduler, steps, noise, eta=eta, seen=seen)

    def predict(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return model(x, t)

    grid = timestep_grid(name, schedule, steps, **options)
    result = SAMPLERS[name](predict, grid.start(noise), schedule, grid, noise=step_noise, eta=eta)
    assert asked == list(grid.timesteps)
    assert asked == pytest.approx(seen, abs=1e-3)  # whole ones exactly; Karras sigmas make fractions
    return difference(result, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Parity with diffusers
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers(name, spacing, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    for steps in COUNTS:
        assert compare(name, schedule, steps, timestep_spacing=spacing) < 1e-4, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", KARRAS_SAMPLERS)
def test_equals_diffusers_with_karras_sigmas(name, spacing, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    for steps in COUNTS:
        options = {"timestep_spacing": spacing, "use_karras_sigmas": True}
        assert compare(name, schedule, steps, **options) < 1e-4, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [False, True])
def test_ddim_equals_diffusers_with_eta(set_alpha_to_one, eta, prediction_type):
    schedule = NoiseSchedule(prediction_type=prediction_type)
    for steps, spacing in itertools.product(COUNTS, SPACINGS):
        options = {"timestep_spacing": spacing, "set_alpha_to_one": set_alpha_to_one}
        assert compare("ddim", schedule, steps, eta=eta, **options) < 1e-4, (steps, spacing)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers_from_pure_noise(name, spacing):
    """Zero terminal SNR: ᾱ is 0 at the first timestep of "trailing", where only v says anything about x_0."""
    schedule = NoiseSchedule(prediction_type="v_prediction", zero_terminal_snr=True)
    for steps in COUNTS:
        assert compare(name, schedule, steps, large_sigmas=True, timestep_spacing=spacing) < 1e-4, steps
    if name in KARRAS_SAMPLERS:
        options = {"timestep_spacing": spacing, "use_karras_sigmas": True}
        assert compare(name, schedule, 20, large_sigmas=True, **options) < 1e-4


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("name", NAMES)
def test_equals_diffusers_on_other_schedules(name, beta_schedule):
    schedule = NoiseSchedule(beta_start=1e-4, beta_end=0.02, schedule=beta_schedule, prediction_type="v_prediction")
    for karras in [False, True] if name in KARRAS_SAMPLERS else [False]:
        for steps, spacing in itertools.product((2, 20), SPACINGS):
            options = {"timestep_spacing": spacing} | ({"use_karras_sigmas": True} if karras else {})
            assert compare(name, schedule, steps, large_sigmas=True, **options) < 1e-4, (steps, spacing, karras)


@pytest.mark.parametrize("name", KARRAS_SAMPLERS)
def test_equals_diffusers_ending_at_sigma_min(name):
    schedule = NoiseSchedule()
    for steps, spacing, karras in itertools.product((2, 7, 20), SPACINGS, (False, True)):
        options = {"timestep_spacing": spacing, "use_karras_sigmas": karras, "final_sigmas_type": "sigma_min"}
        assert compare(name, schedule, steps, **options) < 1e-4, (steps, spacing, karras)
    for final in ({"lower_order_final": False}, {"euler_at_final": True}) if name == "dpm++2m" else ():
        options = {"timestep_spacing": "leading", "final_sigmas_type": "sigma_min", **final}
        assert compare(name, schedule, 7, **options) < 1e-4, final
        assert compare(name, schedule, 20, **options) < 1e-4, final


@pytest.mark.parametrize("name", NAMES)
def test_spacing_left_open_is_the_one_of_diffusers(name):
    assert compare(name, NoiseSchedule(), 20) < 1e-4


@pytest.mark.parametrize("strength", [0.3, 0.58, 0.8, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_img2img_equals_diffusers(name, spacing, strength):
    schedule, noise, original = NoiseSchedule(), unit(1), 0.8 * unit(2)
    for steps in (7, 20, 50):
        scheduler = scheduler_of(name, schedule, timestep_spacing=spacing)
        expected = their_loop(scheduler, steps, noise, strength=strength, original=original)
        grid = timestep_grid(name, schedule, steps, timestep_spacing=spacing).from_strength(strength)
        assert len(grid) == min(int(steps * strength), steps)
        result = SAMPLERS[name](model, grid.noised(original, noise), schedule, grid, noise=step_noise)
        assert difference(result, expected) < 1e-4, steps


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_inpainting_equals_diffusers(name, spacing, strength, prediction_type):
    schedule, noise, original = NoiseSchedule(prediction_type=prediction_type), unit(1), 0.8 * unit(2)
    mask = torch.zeros(1, 1, *SHAPE[2:])
    mask[..., 2:6, 3:] = 1
    mask[..., 6, 3:] = 0.5  # a soft edge
    for steps in (2, 20):
        scheduler = scheduler_of(name, schedule, timestep_spacing=spacing)
        expected = their_loop(scheduler, steps, noise, strength=strength, original=original, mask=mask)
        grid = timestep_grid(name, schedule, steps, timestep_spacing=spacing).from_strength(strength)
        x = grid.start(noise) if strength == 1 else grid.noised(original, noise)
        blend = inpainting(grid, original, noise, mask)
        result = SAMPLERS[name](model, x, schedule, grid, noise=step_noise, callback=blend)
        assert difference(result, expected) < 1e-4, steps
        outside = (mask == 0).expand(SHAPE)
        assert torch.equal(result[outside], original[outside])  # exactly, not nearly


def test_known_timesteps():
    """The lists that diffusers' users know by heart, so that both sides cannot drift together."""
    schedule = NoiseSchedule()

    def first_and_last(name: str, steps: int, spacing: str) -> list[float]:
        timesteps = timestep_grid(name, schedule, steps, timestep_spacing=spacing).timesteps
        return [*timesteps[:2], *timesteps[-2:]]

    assert first_and_last("ddim", 50, "leading") == [981, 961, 21, 1]
    assert first_and_last("ddim", 50, "trailing") == [999, 979, 39, 19]
    assert first_and_last("ddim", 10, "linspace") == [999, 888, 111, 0]
    assert first_and_last("dpm++2m", 20, "linspace") == [999, 949, 100, 50]
    assert first_and_last("dpm++2m", 20, "leading") == [941, 894, 95, 48]
    assert timestep_grid("ddpm", schedule, 1000).timesteps == tuple(range(999, -1, -1))
    grid = timestep_grid("euler", schedule, 10)
    assert math.sqrt(1 / grid.levels[0] - 1) == pytest.approx(14.6146, abs=1e-3)  # Stable Diffusion's σ_max
    assert grid.start_scale == pytest.approx(14.6146 / math.hypot(14.6146, 1), abs=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Steps asked = steps taken, in range, for every count
# ----------------------------------------------------------------------------------------------------------------------

VARIANTS = [
    (name, spacing, karras)
    for name in NAMES
    for spacing in SPACINGS
    for karras in ([False, True] if name in KARRAS_SAMPLERS else [False])
]


@pytest.mark.parametrize(("name", "spacing", "karras"), VARIANTS)
def test_every_count_of_steps(name, spacing, karras):
    """Every count from 1 to T makes so many model calls, at valid timesteps, none twice (Karras' may be, rounded)."""
    schedule = NoiseSchedule()
    scheduler = scheduler_of(name, schedule, timestep_spacing=spacing)
    for steps in range(1, 1001):
        grid = timestep_grid(name, schedule, steps, timestep_spacing=spacing, use_karras_sigmas=karras)
        timesteps = np.array(grid.timesteps)
        assert len(grid) == len(grid.levels) == len(grid.next_levels) == steps
        assert timesteps.min() >= 0 and timesteps.max() <= 999
        if karras:
            assert (np.diff(timesteps) <= 0).all()
        elif (name, spacing, steps) != ("dpm++2m", "linspace", 1000):  # 1000 of 1001 whole numbers from 0 to 999
            assert (np.diff(timesteps) < 0).all()
        a, a_next = np.array(grid.levels), np.array(grid.next_levels)
        assert (a > 0).all() and (a < 1).all() and (a_next >= a).all() and (a_next <= 1).all()
        if not karras:  # with Karras sigmas theirs takes minutes; the loops above compare those
            scheduler.set_timesteps(steps)
            theirs = scheduler.timesteps.numpy()
            if spacing == "leading" and steps >= (999 if name == "dpm++2m" else 1000):
                # A timestep that the model does not know, or 1 a thousand times: ours are shifted down instead.
                assert theirs[0] == 1000 or (theirs == 1).all()
            else:
                assert np.array_equal(theirs[:steps], timesteps.astype(theirs.dtype)), steps
                # At 61 steps and 61 other counts theirs rounds its way to one more, at a timestep -1.
                assert list(theirs[steps:]) in ([], [-1] if spacing == "trailing" else [])


@pytest.mark.parametrize(("name", "spacing", "karras"), VARIANTS)
def test_steps_asked_are_steps_taken(name, spacing, karras):
    schedule = NoiseSchedule(prediction_type="v_prediction")
    x = torch.linspace(-1, 1, 4)
    for steps in (1, 2, 3, 7, 13, 30, 31, 99, 333, 499, 501, 600, 667, 998, 999, 1000):
        asked, seen = [], []

        def predict(x, t, asked=asked):
            asked.append(t)
            return torch.tanh(x)

        def callback(step, t, x, x0, seen=seen):
            seen.append((step, t))

        grid = timestep_grid(name, schedule, steps, timestep_spacing=spacing, use_karras_sigmas=karras)
        result = SAMPLERS[name](predict, x, schedule, grid, noise=lambda _: 0.1 * x, callback=callback)
        assert len(asked) == steps and torch.isfinite(result).all(), steps
        assert seen == list(enumerate(asked))


def test_short_chains():
    """A model of 10 timesteps instead of 1000: all counts, all samplers, and T steps of DDPM are the whole chain."""
    schedule = NoiseSchedule(num_timesteps=10, beta_start=0.01, beta_end=0.5)
    for (name, spacing, karras), steps in itertools.product(VARIANTS, range(1, 11)):
        grid = timestep_grid(name, schedule, steps, timestep_spacing=spacing, use_karras_sigmas=karras)
        assert len(grid) == steps and 0 <= min(grid.timesteps) <= max(grid.timesteps) <= 9
    assert timestep_grid("ddpm", schedule, 10, timestep_spacing="trailing").timesteps == tuple(range(9, -1, -1))


# ----------------------------------------------------------------------------------------------------------------------
# A problem whose answer is known: x_0 ~ N(mean, std²), for which the perfect model and the ODE's solution are formulas
# ----------------------------------------------------------------------------------------------------------------------

EXACT = NoiseSchedule()
SIGMAS = ((1 - EXACT.alphas_cumprod.double()) / EXACT.alphas_cumprod.double()).sqrt().numpy()


class Gaussian:
    """Data N(mean, std²). Every sampler is affine in x on it, so two starts tell its whole map, without statistics."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def spread(self, a: float) -> float:
        return math.sqrt(a * self.std**2 + 1 - a)

    def epsilon(self, x: Tensor, t: float) -> Tensor:
        """E[ε | x_t], the best any model can say; between two timesteps ᾱ follows σ linearly, as Euler's grid does."""
        a = 1 / (1 + np.interp(t, np.arange(len(SIGMAS)), SIGMAS) ** 2)
        return math.sqrt(1 - a) * (x - math.sqrt(a) * self.mean) / self.spread(a) ** 2

    def ode_error(self, name: str, steps: int, **options) -> float:
        """Root mean square distance from where the ODE ends, over starts x_T ~ N(0, 1)."""
        grid = timestep_grid(name, EXACT, steps, **options)
        a, end = grid.levels[0], grid.next_levels[-1]
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)
        result = SAMPLERS[name](self.epsilon, x, EXACT, grid)
        quantile = (x - math.sqrt(a) * self.mean) / self.spread(a)  # which the ODE leaves alone
        error = result - (math.sqrt(end) * self.mean + self.spread(end) * quantile)
        return math.hypot(error[0], error[1] - error[0])

    def moments(self, name: str, steps: int, **options) -> tuple[float, float]:
        """Exact mean and standard deviation of what a stochastic sampler makes of the exact x_T."""
        eta = options.pop("eta", 0.0)
        grid = timestep_grid(name, EXACT, steps, **options)
        a = grid.levels[0]
        # Element 0 starts at the mean and never meets noise; element 1 starts one deviation off; element 2 + i meets a
        # unit of noise in step i only. The variance is the sum of the squares of what they end in.
        x = torch.full((steps + 2,), math.sqrt(a) * self.mean, dtype=torch.float64)
        x[1] += self.spread(a)
        pulses = torch.eye(steps + 2, dtype=torch.float64)[2:]
        end = SAMPLERS[name](self.epsilon, x, EXACT, grid, noise=lambda step: pulses[step], eta=eta)
        return end[0].item(), (end[1:] - end[0]).norm().item()


WIDE, NARROW = Gaussian(0.5, 0.8), Gaussian(1.5, 0.4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ddim", {"timestep_spacing": "leading"}),  # not "linspace": its stride T // n is not its spacing
        ("ddim", {"timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "linspace"}),
        ("euler", {"timestep_spacing": "trailing"}),
        ("euler", {"timestep_spacing": "linspace", "use_karras_sigmas": True}),
        ("dpm++2m", {"timestep_spacing": "linspace"}),
        ("dpm++2m", {"timestep_spacing": "trailing"}),
    ],
)
@pytest.mark.parametrize("data", [WIDE, NARROW], ids=["wide", "narrow"])
def test_ode_samplers_converge_to_the_exact_solution(data, name, options):
    errors = [data.ode_error(name, steps, **options) for steps in (10, 50, 250, 1000)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 5e-3, errors


def test_dpm_solver_is_of_second_order():
    """Up to σ_min, where no first-order jump to zero noise hides it: twice the steps, a quarter of the error."""
    options = {"timestep_spacing": "linspace", "final_sigmas_type": "sigma_min"}
    coarse, fine = (WIDE.ode_error("dpm++2m", steps, **options) for steps in (100, 200))
    assert 3 < coarse / fine < 5
    coarse, fine = (WIDE.ode_error("ddim", steps, timestep_spacing="leading") for steps in (100, 200))
    assert 1.7 < coarse / fine < 2.3


def test_dpm_solver_is_closer_than_ddim_with_20_steps():
    """Measured: DDIM 0.048 to 0.060, DPM-Solver++(2M) 0.025 to 0.026, with Karras sigmas 0.010.

    Narrow data leaves plain spacing no lead, since the last step, from t = 50 to no noise at all, is of first order;
    Karras sigmas make that step small: DDIM 0.053, DPM-Solver++(2M) 0.050, with Karras sigmas 0.005.
    """
    for spacing in SPACINGS:
        first, second = (WIDE.ode_error(name, 20, timestep_spacing=spacing) for name in ("ddim", "dpm++2m"))
        assert 0.04 < first < 0.07 and second < 0.03, (spacing, first, second)
    assert WIDE.ode_error("dpm++2m", 20, use_karras_sigmas=True) < 0.011
    assert NARROW.ode_error("ddim", 20) > 0.05
    assert NARROW.ode_error("dpm++2m", 20, use_karras_sigmas=True) < 0.006


@pytest.mark.parametrize(
    ("name", "options"),
    [("ddpm", {}), ("ddpm", {"timestep_spacing": "trailing"}), ("ddim", {"eta": 1.0}), ("euler_a", {})],
)
@pytest.mark.parametrize("data", [WIDE, NARROW], ids=["wide", "narrow"])
def test_stochastic_samplers_converge_to_the_exact_distribution(data, name, options):
    errors = []
    for steps in (10, 50, 250, 1000):
        mean, std = data.moments(name, steps, **options)
        errors.append(math.hypot(mean - data.mean, std - data.std))
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors)), errors
    assert errors[-1] < 6e-3, errors


# ----------------------------------------------------------------------------------------------------------------------
# Promises
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_callback_sees_every_step_and_may_replace_x(name):
    """The x_t it sees is variance preserving: the one that the model is asked about next, and at last the result."""
    schedule, noise = NoiseSchedule(), unit(0)
    grid = timestep_grid(name, schedule, 5, timestep_spacing="trailing")
    asked, seen = [], []

    def predict(x: Tensor, t: float) -> Tensor:
        asked.append((t, x))
        return model(x, t)

    def watch(step: int, t: float, x: Tensor, x0: Tensor) -> None:
        seen.append((step, t, x, x0))

    result = SAMPLERS[name](predict, grid.start(noise), schedule, grid, noise=step_noise, callback=watch)
    assert [(step, t) for step, t, _, _ in seen] == list(enumerate(grid.timesteps))
    for (_, _, x, _), (_, x_asked) in zip(seen, asked[1:], strict=False):
        assert torch.equal(x, x_asked)
    assert difference(seen[-1][2], result) < 1e-6
    for (_, _, _, x0), (t, x), a in zip(seen, asked, grid.levels, strict=True):  # the x_0 of what was asked
        assert difference(x0, (x - math.sqrt(1 - a) * model(x, t)) / math.sqrt(a)) < 1e-6

    replaced = SAMPLERS[name](
        model, noise, schedule, grid, noise=step_noise,
        callback=lambda step, t, x, x0: torch.full_like(x, 0.25) if step == 4 else None,
    )  # fmt: skip
    assert torch.equal(replaced, torch.full(SHAPE, 0.25))


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_asked_for_only_where_it_is_added(name):
    schedule, asked = NoiseSchedule(), []
    grid = timestep_grid(name, schedule, 6)

    def noise(step: int) -> Tensor:
        asked.append(step)
        return step_noise(step)

    SAMPLERS[name](model, unit(0), schedule, grid, noise=noise)
    assert asked == ([0, 1, 2, 3, 4] if name in samplers.STOCHASTIC_SAMPLERS else [])


def test_ddim_with_all_its_noise_is_ddpm():
    """η = 1 makes Song's Eq. 12 Ho's Eq. 7, where both take the same strides."""
    schedule, options = NoiseSchedule(prediction_type="v_prediction"), {"timestep_spacing": "leading"}
    one = timestep_grid("ddpm", schedule, 50, **options)
    other = timestep_grid("ddim", schedule, 50, set_alpha_to_one=True, **options)
    a = SAMPLERS["ddpm"](model, unit(0), schedule, one, noise=step_noise)
    b = SAMPLERS["ddim"](model, unit(0), schedule, other, noise=step_noise, eta=1.0)
    assert difference(a, b) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_loops_never_wait_for_the_device(name):
    """Meta tensors have no values: any look at one, which on a GPU would be a wait, is an error."""
    schedule = NoiseSchedule()
    grid = timestep_grid(name, schedule, 10)
    x, mask = torch.empty(SHAPE, device="meta"), torch.empty(1, 1, 8, 8, device="meta")
    eta = 1.0 if name == "ddim" else 0.0
    result = SAMPLERS[name](
        lambda x, t: x.tanh() * t, grid.noised(x, x), schedule, grid, noise=lambda _: x, eta=eta,
        callback=inpainting(grid, x, x, mask),
    )  # fmt: skip
    assert result.shape == SHAPE and result.device.type == "meta"


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_models_serve_float32_latents(name):
    schedule = NoiseSchedule()
    grid = timestep_grid(name, schedule, 10)
    result = SAMPLERS[name](lambda x, t: model(x, t).bfloat16(), unit(0), schedule, grid, noise=step_noise)
    expected = SAMPLERS[name](lambda x, t: model(x, t).bfloat16().float(), unit(0), schedule, grid, noise=step_noise)
    assert torch.equal(result, expected)  # only the prediction is rounded, nothing that is made of it


def test_inpainting_shows_the_blend_to_the_next_callback():
    schedule, noise, original, seen = NoiseSchedule(), unit(1), unit(2), []
    grid = timestep_grid("dpm++2m", schedule, 4)

    def watch(step: int, t: float, x: Tensor, x0: Tensor) -> None:
        seen.append(x)

    blend = inpainting(grid, original, noise, torch.zeros(1), watch)
    result = SAMPLERS["dpm++2m"](model, noise, schedule, grid, callback=blend)
    assert torch.equal(result, original)
    assert [difference(x, grid.noised(original, noise, i + 1)) for i, x in enumerate(seen)] == [0, 0, 0, 0]


def test_bad_input_is_refused_in_one_sentence():
    schedule = NoiseSchedule()
    grid = timestep_grid("ddim", schedule, 20)
    x = unit(0)
    refused = [
        ("Unknown sampler 'plms'", lambda: timestep_grid("plms", schedule, 20)),
        ("Unknown timestep_spacing 'even'", lambda: timestep_grid("ddim", schedule, 20, timestep_spacing="even")),
        ("steps is 0", lambda: timestep_grid("ddim", schedule, 0)),
        ("steps is 1001", lambda: timestep_grid("ddim", schedule, 1001)),
        ("steps is 2.5", lambda: timestep_grid("ddim", schedule, 2.5)),
        ("steps is True", lambda: timestep_grid("ddim", schedule, True)),
        ("steps_offset is -1", lambda: timestep_grid("ddim", schedule, 20, steps_offset=-1)),
        ("Unknown final_sigmas_type 'one'", lambda: timestep_grid("euler", schedule, 20, final_sigmas_type="one")),
        ("use_karras_sigmas applies", lambda: timestep_grid("ddim", schedule, 20, use_karras_sigmas=True)),
        ("final_sigmas_type applies", lambda: timestep_grid("euler_a", schedule, 20, final_sigmas_type="sigma_min")),
        ("strength is 0", lambda: grid.from_strength(0)),
        ("strength is 1.5", lambda: grid.from_strength(1.5)),
        ("strength is nan", lambda: grid.from_strength(math.nan)),
        ("strength 0.01 of 20 steps", lambda: grid.from_strength(0.01)),
        ("The grid was made for ddim", lambda: samplers.euler(model, x, schedule, grid)),
        ("eta is 2", lambda: samplers.ddim(model, x, schedule, grid, noise=step_noise, eta=2)),
        ("eta is nan", lambda: samplers.ddim(model, x, schedule, grid, noise=step_noise, eta=math.nan)),
        ("ddim adds noise", lambda: samplers.ddim(model, x, schedule, grid, eta=0.5)),
        (
            "ddpm adds noise",
            lambda: samplers.ddpm(model, x, schedule, timestep_grid("ddpm", schedule, 5)),
        ),
        (
            "eta applies to ddim only",
            lambda: samplers.euler(model, x, schedule, timestep_grid("euler", schedule, 5), eta=0.5),
        ),
        ("Unknown sampler 'plms'", lambda: grid_options("plms", {})),
        ("dpm\\+\\+2m does not implement solver_order = 3", lambda: grid_options("dpm++2m", {"solver_order": 3})),
        ("does not implement variance_type", lambda: grid_options("ddpm", {"variance_type": "fixed_large"})),
        ("does not implement thresholding", lambda: grid_options("ddim", {"thresholding": True})),
        ("does not implement timestep_type", lambda: grid_options("euler", {"timestep_type": "continuous"})),
        ("does not implement lambda_min_clipped", lambda: grid_options("dpm++2m", {"lambda_min_clipped": -5.1})),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


# What published folders say (Stable Diffusion 1.5: PNDM; 2.1: DDIM; XL: Euler), as far as it concerns sampling.
PUBLISHED = {
    "sd15": {"skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False},
    "sd21": {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False, "prediction_type": "v_prediction"},
    "sdxl": {
        "steps_offset": 1, "timestep_spacing": "leading", "interpolation_type": "linear", "use_karras_sigmas": False,
        "set_alpha_to_one": False, "clip_sample": False, "sample_max_value": 1.0,
    },
    "trailing": {"steps_offset": 1, "timestep_spacing": "trailing", "clip_sample": False, "use_karras_sigmas": True},
}  # fmt: skip


@pytest.mark.parametrize("folder", PUBLISHED)
@pytest.mark.parametrize("name", NAMES)
def test_a_folders_options_mean_what_they_mean_to_diffusers(name, folder):
    config = {**PUBLISHED[folder], **{"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012}}
    config |= {"beta_schedule": "scaled_linear", "_class_name": "PNDMScheduler"}
    schedule = noise_schedule(config)
    theirs = their_loop(DIFFUSERS[name].from_config(dict(config)), 20, unit(0))
    grid = timestep_grid(name, schedule, 20, **grid_options(name, config))
    ours = SAMPLERS[name](model, grid.start(unit(0)), schedule, grid, noise=step_noise)
    assert difference(ours, theirs) < 1e-4


def test_grids_are_frozen():
    grid = timestep_grid("ddim", NoiseSchedule(), 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        grid.timesteps = ()
    assert isinstance(grid, TimestepGrid) and [t for t, _, _ in grid] == [801, 601, 401, 201, 1]
