"""Samplers: from noise to latents with one U-Net call a step (DDPM, DDIM, Euler, Euler-a, DPM-Solver++(2M)).

A sampler is a plain function `sampler(predict, x, schedule, grid, *, noise, callback, eta) -> x_0`. Its steps are laid
out in a `TimestepGrid`: numbers only, made beforehand by `timestep_grid`, so the loops below never wait for the device.

Every x_t that is handed in, out, or to a callback is variance preserving, x_t = √ᾱ x_0 + √(1-ᾱ) ε: that is what the
U-Net sees, so one callback (a film, an inpainting blend) suits all samplers. Euler's own space x_0 + σ ε is used inside
its loop only.

    here            Ho 2020, Song 2021      Karras 2022                 Lu 2022 (DPM-Solver++)
    a, a_next       ᾱ_t, ᾱ_{t-1} (1)        1 / (1 + σ²)                α_s², α_t²
    sigma           -                       σ = √((1-ᾱ)/ᾱ)              exp(-λ)
    x               x_t                     x / √(1 + σ²)               x_s
    x0              predicted x_0           D(x; σ)                     x_θ(x_s, s)
    epsilon         ε_θ(x_t, t)             (x - D(x; σ)) / σ           ε_θ(x_s, s)

(1) Song's paper writes α for what Ho's calls ᾱ. `a_next` is the level a step goes to, usually many timesteps on.

The grids equal those of diffusers' schedulers, although each of these spaces, starts and ends in its own way: the same
weights, seed, sampler and steps shall give the same image there. They differ only where diffusers would leave the range
[0, T) or take another number of steps than requested.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from noise_schedule import NoiseSchedule, epsilon_from_prediction, noise_level, noised, x0_from_prediction

Predict = Callable[[Tensor, float], Tensor]  # (x_t, t) -> the guided prediction, ε or v as the schedule says
Noise = Callable[[int], Tensor]  # step -> unit noise like x; a callable, so that each image may have its own generator
Callback = Callable[[int, float, Tensor, Tensor], Tensor | None]  # (step, t, x_t, x_0), see `_report`

# ----------------------------------------------------------------------------------------------------------------------
# The grid: at which timesteps the model is called, and from which noise level to which each step goes
# ----------------------------------------------------------------------------------------------------------------------

SPACINGS = ("linspace", "leading", "trailing")  # Table 2 of Lin et al. 2023
DEFAULT_SPACING = {  # diffusers'
    "ddpm": "leading", "ddim": "leading", "euler": "linspace", "euler_a": "linspace", "dpm++2m": "linspace",
}  # fmt: skip
KARRAS_SAMPLERS = ("euler", "dpm++2m")  # those for which diffusers knows Karras sigmas, and an end at sigma_min
ALMOST_ZERO_SNR = 2**-24  # stands in for ᾱ_T = 0 where a sampler divides by it: then σ_max is 4096, not infinite


@dataclasses.dataclass(frozen=True)
class TimestepGrid:
    """A sampler's steps: step i calls the model at `timesteps[i]` and goes from ᾱ `levels[i]` to `next_levels[i]`."""

    sampler: str
    timesteps: tuple[float, ...]  # falling, in [0, T); ints, but Euler's may lie between two of them
    levels: tuple[float, ...]  # ᾱ at those timesteps, in [0, 1)
    next_levels: tuple[float, ...]  # in (0, 1]; not always `levels[i + 1]`, DDIM's stride may differ from its spacing
    start_scale: float = 1.0  # what unit noise is multiplied by to start, in (0, 1]
    first_order_last: bool = True  # DPM-Solver++ only: is the last step DDIM's?

    def __len__(self) -> int:
        return len(self.timesteps)

    def __iter__(self) -> Iterator[tuple[float, float, float]]:
        return zip(self.timesteps, self.levels, self.next_levels, strict=True)

    def start(self, noise: Tensor) -> Tensor:
        """Return the x_t from which text-to-image starts, for unit `noise` of any shape."""
        return noise * self.start_scale

    def noised(self, x0: Tensor, noise: Tensor, step: int = 0) -> Tensor:
        """Return `x0` as noisy as x_t is when `step` starts, and for step = n clean; both of one shape."""
        return noised(x0, noise, self.levels[step] if step < len(self) else 1.0)

    def from_strength(self, strength: float) -> "TimestepGrid":
        """Return the last int(n · strength) steps, for img2img from `noised(x0, noise)`.

        Strength lies in (0, 1]; ValueError if not, or if it leaves no step.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength is {strength}, but must be above 0 and at most 1.")
        keep = int(len(self) * strength)
        if keep == 0:
            raise ValueError(f"strength {strength} of {len(self)} steps leaves no step: raise strength or steps.")
        tail = slice(len(self) - keep, None)
        return dataclasses.replace(
            self, timesteps=self.timesteps[tail], levels=self.levels[tail], next_levels=self.next_levels[tail]
        )


def timestep_grid(
    sampler: str,
    schedule: NoiseSchedule,
    steps: int,
    *,
    timestep_spacing: str | None = None,
    steps_offset: int = 1,
    use_karras_sigmas: bool = False,
    set_alpha_to_one: bool = False,
    final_sigmas_type: str = "zero",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
) -> TimestepGrid:
    """Lay out exactly `steps` steps of `sampler` over `schedule`, one model call each (1 <= steps <= T).

    The options have diffusers' names and, unless said otherwise, the values of Stable Diffusion 1.x:

    - `timestep_spacing`: "linspace", "leading", "trailing" (Lin et al. 2023, Table 2), None = the sampler's default
    - `steps_offset`: how far "leading" is shifted up
    - `use_karras_sigmas` (euler, dpm++2m): noise levels by `karras_sigmas` instead
    - `set_alpha_to_one` (ddim): end at ᾱ = 1, not at ᾱ_0, the cleanest level that the model was trained on
    - `final_sigmas_type` (euler, dpm++2m): end at "zero" noise or at "sigma_min", that of ᾱ_0
    - `lower_order_final`, `euler_at_final` (dpm++2m): is a last step to "sigma_min" of first order?

    Raises ValueError for an unknown sampler or value, and for an option that does not apply to the sampler.
    """
    T = schedule.num_timesteps
    if sampler not in SAMPLERS:
        raise ValueError(f"Unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    spacing = DEFAULT_SPACING[sampler] if timestep_spacing is None else timestep_spacing
    if spacing not in SPACINGS:
        raise ValueError(f"Unknown timestep_spacing {spacing!r}: choose one of {', '.join(SPACINGS)}.")
    if isinstance(steps, bool) or not isinstance(steps, (int, np.integer)) or not 1 <= steps <= T:
        raise ValueError(f"steps is {steps}, but must be a whole number from 1 to {T}, the timesteps of the model.")
    if not 0 <= steps_offset < T:
        raise ValueError(f"steps_offset is {steps_offset}, but must be from 0 to {T - 1}.")
    if final_sigmas_type not in ("zero", "sigma_min"):
        raise ValueError(f"Unknown final_sigmas_type {final_sigmas_type!r}: choose zero or sigma_min.")
    if sampler not in KARRAS_SAMPLERS and (use_karras_sigmas or final_sigmas_type != "zero"):
        option = "use_karras_sigmas" if use_karras_sigmas else "final_sigmas_type"
        raise ValueError(f"{option} applies to {' and '.join(KARRAS_SAMPLERS)} only: leave it out for {sampler}.")

    # DPM-Solver++ spaces n + 1 timesteps and leaves out the last, the one at or near t = 0 (but not of "trailing").
    one_more = sampler == "dpm++2m" and spacing != "trailing"
    timesteps = _spaced(T, steps + one_more, spacing, steps_offset)[:steps]  # "trailing" may round its way to one more
    timesteps = timesteps - max(timesteps[0] - (T - 1), 0)  # near T steps, the offset leaves no room for all of them
    if sampler in ("ddpm", "ddim"):
        return _chain_grid(sampler, schedule, timesteps.round(), set_alpha_to_one)

    # From here on noise levels are σ, taken from a table over t = 0..T-1 (in float32, as the originals do).
    alphas_cumprod = schedule.alphas_cumprod.cpu().clone()
    if schedule.zero_terminal_snr:
        alphas_cumprod[-1] = ALMOST_ZERO_SNR
    table = noise_level(alphas_cumprod).numpy()  # (T,), rising

    if sampler == "dpm++2m":
        timesteps = timesteps.round()
        sigmas = np.interp(timesteps, np.arange(T), table)
        if use_karras_sigmas:
            sigmas = karras_sigmas(table[0], table[-1], steps)
            timesteps = _sigma_to_t(sigmas, table)
            # The model is called at whole timesteps. Diffusers rounds them, but truncates those of a cosine schedule.
            timesteps = timesteps if schedule.schedule == "squaredcos_cap_v2" else timesteps.round()
        timesteps = timesteps.astype(np.int64)
    else:
        timesteps = timesteps.astype(np.float32)
        sigmas = np.interp(timesteps, np.arange(T), table)
        if use_karras_sigmas:
            sigmas = karras_sigmas(sigmas[-1], sigmas[0], steps)
            timesteps = _sigma_to_t(sigmas, table).astype(np.float32)

    final = float(table[0]) if final_sigmas_type == "sigma_min" else 0.0
    levels = [1 / (1 + sigma**2) for sigma in [*sigmas.tolist(), final]]
    starts_at_sigma_max = sampler in ("euler", "euler_a") and spacing != "leading"
    return TimestepGrid(
        sampler=sampler,
        timesteps=tuple(timesteps.tolist()),
        levels=tuple(levels[:-1]),
        next_levels=tuple(levels[1:]),
        # In Euler's space x_T is σ_max · noise; with "leading" √(σ_max² + 1) · noise, the image's variance included.
        start_scale=math.sqrt(1 - levels[0]) if starts_at_sigma_max else 1.0,
        first_order_last=final == 0 or euler_at_final or (lower_order_final and steps < 15),
    )


def _chain_grid(sampler: str, schedule: NoiseSchedule, timesteps: np.ndarray, set_alpha_to_one: bool) -> TimestepGrid:
    """Return the grid of a sampler on the Markov chain itself: whole timesteps, levels straight from the table of ᾱ."""
    T, table = schedule.num_timesteps, schedule.alphas_cumprod.tolist()
    timesteps = timesteps.astype(np.int64).tolist()
    if sampler == "ddpm":
        next_levels = [table[t] for t in timesteps[1:]] + [1.0]
    else:
        # DDIM strides by T // n whatever the spacing; below t = 0 it ends at ᾱ_0, the cleanest level of training.
        strided, end = [t - T // len(timesteps) for t in timesteps], 1.0 if set_alpha_to_one else table[0]
        next_levels = [table[t] if t >= 0 else end for t in strided]
    return TimestepGrid(sampler, tuple(timesteps), tuple(table[t] for t in timesteps), tuple(next_levels))


def _spaced(T: int, n: int, spacing: str, steps_offset: int) -> np.ndarray:
    """Return n falling timesteps as floats, whole ones but for "linspace", and now and then a spare one at the end."""
    if spacing == "linspace":
        return np.linspace(0, T - 1, n)[::-1]
    if spacing == "trailing":
        return np.arange(T, 0, -T / n).round() - 1
    stride = max(T // n, 1)  # whole, so a count that does not divide T starts early: 600 steps of 1000 at t = 600
    return (np.arange(n) * stride)[::-1] + float(steps_offset)


def karras_sigmas(sigma_min: float, sigma_max: float, n: int, rho: float = 7.0) -> np.ndarray:
    """Return n falling noise levels, dense where they are small (Karras et al. 2022, Eq. 5)."""
    low, high = float(sigma_min) ** (1 / rho), float(sigma_max) ** (1 / rho)
    return (high + np.linspace(0, 1, n) * (low - high)) ** rho


def _sigma_to_t(sigmas: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the fractional timesteps at which `table` (T,), rising, has these noise levels, linear in log σ."""
    log_table, log_sigmas = np.log(table), np.log(sigmas)
    i = (np.searchsorted(log_table, log_sigmas, side="right") - 1).clip(0, len(table) - 2)
    w = ((log_table[i] - log_sigmas) / (log_table[i] - log_table[i + 1])).clip(0, 1)
    return (1 - w) * i + w * (i + 1)


# ----------------------------------------------------------------------------------------------------------------------
# What all samplers share
# ----------------------------------------------------------------------------------------------------------------------


def check_arguments(sampler: str, grid: TimestepGrid, noise: Noise | None, eta: float) -> None:
    """Raise ValueError if the grid was made for another sampler, or if this one lacks noise or has no use for eta."""
    if grid.sampler != sampler:
        raise ValueError(f"The grid was made for {grid.sampler}: for {sampler}, call timestep_grid({sampler!r}, ...).")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}, but must be from 0 (deterministic) to 1 (as random as DDPM).")
    if eta > 0 and sampler != "ddim":
        raise ValueError(f"eta applies to ddim only: leave it at 0 for {sampler}.")
    if noise is None and (sampler in STOCHASTIC_SAMPLERS or eta > 0):
        raise ValueError(f"{sampler} adds noise in each step: pass noise, a function from the step to a tensor like x.")


def _denoise(predict: Predict, x: Tensor, t: float, a: float, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Call the model once; return the x_0 and ε that its prediction for x at ᾱ = `a` implies."""
    prediction, kind = predict(x, t).to(x.dtype), schedule.prediction_type  # the model may be of half precision
    return x0_from_prediction(prediction, x, a, kind), epsilon_from_prediction(prediction, x, a, kind)


def _report(callback: Callback | None, step: int, t: float, x: Tensor, x0: Tensor) -> Tensor:
    """Call the callback with step number `step` (from 0), the timestep, the new x_t and the predicted x_0.

    The new x_t is the one the step ends with, at its next, cleaner level. A tensor that the callback returns replaces
    it; the predicted x_0 that DPM-Solver++ keeps stays the same.
    """
    replaced = None if callback is None else callback(step, t, x, x0)
    return x if replaced is None else replaced


def inpainting(
    grid: TimestepGrid, original: Tensor, noise: Tensor, mask: Tensor, callback: Callback | None = None
) -> Callback:
    """Return a callback that after each step puts `original` back where `mask` is 0, as noisy as the next step expects.

    `original` (clean latents) and `noise` are like x; `mask` broadcasts to x and lies in [0, 1], 1 = sample
    anew. The last step puts the clean original back. `callback` sees, and may replace, the blended x_t.
    """

    def blend(step: int, t: float, x: Tensor, x0: Tensor) -> Tensor:
        x = (1 - mask) * grid.noised(original, noise, step + 1) + mask * x
        return _report(callback, step, t, x, x0)

    return blend


# ----------------------------------------------------------------------------------------------------------------------
# The samplers. All take:
#   predict   the guided model, called once a step
#   x         x_t at the grid's first timestep, from `grid.start` or `grid.noised`; float32 or wider
#   schedule  says what the prediction means
#   grid      from `timestep_grid` with this sampler's name, maybe trimmed by `from_strength`
#   noise     unit noise for each step that needs some (ddpm, euler_ancestral, ddim with eta > 0)
#   callback  sees, and may replace, x_t after every step
#   eta       ddim only: 0 deterministic … 1 as random as DDPM
# and return x_0 latents like x.
# ----------------------------------------------------------------------------------------------------------------------


def ddpm(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: TimestepGrid, *,
    noise: Noise | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Ancestral sampling with the posterior's variance β̃ (Ho 2020, Algorithm 2) on a chain thinned out to the grid."""
    check_arguments("ddpm", grid, noise, eta)
    for step, (t, a, a_next) in enumerate(grid):
        x0, _ = _denoise(predict, x, t, a, schedule)
        beta = 1 - a / a_next
        mean_x0, mean_x = math.sqrt(a_next) * beta / (1 - a), math.sqrt(1 - beta) * (1 - a_next) / (1 - a)
        variance = (1 - a_next) / (1 - a) * beta
        x = mean_x0 * x0 + mean_x * x  # Eq. 7, left
        if variance > 0:  # not after the last step, which ends at ᾱ = 1
            x = x + math.sqrt(variance) * noise(step)  # Eq. 7, right
        x = _report(callback, step, t, x, x0)
    return x


def ddim(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: TimestepGrid, *,
    noise: Noise | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Denoising diffusion implicit models (Song 2021): the chain's marginals without (eta = 0) or with its noise."""
    check_arguments("ddim", grid, noise, eta)
    for step, (t, a, a_next) in enumerate(grid):
        x0, epsilon = _denoise(predict, x, t, a, schedule)
        sigma = eta * math.sqrt((1 - a_next) / (1 - a) * (1 - a / a_next))  # Eq. 16
        direction = math.sqrt(max(1 - a_next - sigma**2, 0))
        x = math.sqrt(a_next) * x0 + direction * epsilon  # Eq. 12
        if sigma > 0:
            x = x + sigma * noise(step)
        x = _report(callback, step, t, x, x0)
    return x


def euler(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: TimestepGrid, *,
    noise: Noise | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Euler's method on the ODE dx/dσ = (x - D(x; σ)) / σ (Karras 2022, Equation 3, Algorithm 2 without churn)."""
    check_arguments("euler", grid, noise, eta)
    for step, (t, a, a_next) in enumerate(grid):
        x0, slope = _denoise(predict, x, t, a, schedule)  # the slope (x - D) / σ is the predicted ε
        # Algorithm 2, line 7, x + (σ_next - σ) · slope, is the same; but where σ is 4096, float32 would round x_0 away.
        x = x0 + noise_level(a_next) * slope
        x = _report(callback, step, t, x * math.sqrt(a_next), x0)
    return x / math.sqrt(grid.next_levels[-1])  # differs from 1 only if the grid ends at sigma_min


def euler_ancestral(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: TimestepGrid, *,
    noise: Noise | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """Euler to σ_down, below the goal, then up with fresh noise (k-diffusion's Euler-a; cf. Ho 2020, Eq. 7)."""
    check_arguments("euler_a", grid, noise, eta)
    for step, (t, a, a_next) in enumerate(grid):
        x0, slope = _denoise(predict, x, t, a, schedule)
        sigma, sigma_next = noise_level(a), noise_level(a_next)
        sigma_down = sigma_next**2 / sigma
        sigma_up = math.sqrt(max(sigma_next**2 - sigma_down**2, 0))  # β̃ in σ: σ_next² (σ² - σ_next²) / σ²
        x = x0 + sigma_down * slope
        if sigma_up > 0:
            x = x + sigma_up * noise(step)
        x = _report(callback, step, t, x * math.sqrt(a_next), x0)
    return x


def dpmpp_2m(
    predict: Predict, x: Tensor, schedule: NoiseSchedule, grid: TimestepGrid, *,
    noise: Noise | None = None, callback: Callback | None = None, eta: float = 0.0,
) -> Tensor:  # fmt: skip
    """DPM-Solver++(2M) (Lu 2022, Algorithm 2): DDIM, but with x_0 extrapolated from the last two predictions."""
    check_arguments("dpm++2m", grid, noise, eta)
    x0_last, h_last = None, 0.0
    for step, (t, a, a_next) in enumerate(grid):
        x0, _ = _denoise(predict, x, t, a, schedule)
        sigma, sigma_next = noise_level(a), noise_level(a_next)
        shrink = sigma_next / sigma  # e^{-h}, for h = λ_next - λ and λ = log(√ᾱ / √(1-ᾱ)) = -log σ
        h = -math.log(shrink) if shrink > 0 else math.inf

        D, is_last = x0, step == len(grid) - 1
        if h_last > 0 and not (is_last and grid.first_order_last):  # h_last = 0: no step yet, or between equal levels
            D = x0 + h / (2 * h_last) * (x0 - x0_last)  # (1 + 1/2r) x0 - 1/2r x0_last, r = h_last / h
        x = math.sqrt(a_next / a) * shrink * x + math.sqrt(a_next) * (1 - shrink) * D

        x0_last, h_last = x0, h
        x = _report(callback, step, t, x, x0)
    return x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "euler": euler, "euler_a": euler_ancestral, "dpm++2m": dpmpp_2m}
STOCHASTIC_SAMPLERS = ("ddpm", "euler_a")  # and "ddim" if eta > 0

# ----------------------------------------------------------------------------------------------------------------------
# What a published folder's scheduler_config.json means for each sampler
# ----------------------------------------------------------------------------------------------------------------------

_OPTIONS = {  # those that diffusers' counterpart of a sampler reads
    "ddpm": {"timestep_spacing", "steps_offset"},
    "ddim": {"timestep_spacing", "steps_offset", "set_alpha_to_one"},
    "euler": {"timestep_spacing", "steps_offset", "use_karras_sigmas", "final_sigmas_type"},
    "euler_a": {"timestep_spacing", "steps_offset"},
    "dpm++2m": {"timestep_spacing", "steps_offset", "use_karras_sigmas", "final_sigmas_type", "lower_order_final",
                "euler_at_final"},
}  # fmt: skip
_OFF = (False, None)
_ONLY = {  # those that it reads as well, but of which only these values are implemented here, the default first
    "ddpm": {"variance_type": ("fixed_small",), "thresholding": _OFF},
    "ddim": {"thresholding": _OFF},
    "euler": {"interpolation_type": ("linear",), "timestep_type": ("discrete",), "sigma_min": (None,),
              "sigma_max": (None,), "use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF},
    "euler_a": {},
    "dpm++2m": {"algorithm_type": ("dpmsolver++", "deis"), "solver_type": ("midpoint", "bh1", "bh2", "logrho"),
                "solver_order": (2,), "lambda_min_clipped": (-math.inf,), "variance_type": (None,),
                "thresholding": _OFF, "use_exponential_sigmas": _OFF, "use_beta_sigmas": _OFF, "use_lu_lambdas": _OFF,
                "use_flow_sigmas": _OFF},
}  # fmt: skip


def grid_options(sampler: str, scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `timestep_grid` that diffusers' `sampler` would take from a scheduler_config.json.

    Raises ValueError, naming the option, for one that would change this sampler's result but is not implemented.
    `clip_sample` is not refused: Stable Diffusion's pipelines switch it off.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"Unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}.")
    for name, values in _ONLY[sampler].items():
        if scheduler_config.get(name, values[0]) not in values:
            raise ValueError(
                f"scheduler_config.json: {sampler} does not implement {name} = {scheduler_config[name]!r}, "
                f"only {values[0]!r}: choose another sampler."
            )
    silent = {"set_alpha_to_one": True} if sampler == "ddim" else {}  # what diffusers takes where its config is silent
    return silent | {name: value for name, value in scheduler_config.items() if name in _OPTIONS[sampler]}
