"""The noise schedule: how noisy each timestep is, and how x_t, x_0, ε and v follow from each other.

Papers: DDPM (Ho et al. 2020, arXiv:2006.11239), v-prediction (Salimans & Ho 2022, arXiv:2202.00512), min-SNR
(Hang et al. 2023, arXiv:2303.09556), zero-terminal SNR (Lin et al. 2024, arXiv:2305.08891).

Each equation is written once, as a small function of ᾱ. Training calls it through `NoiseSchedule`, where ᾱ is a tensor
with one value for each image of the batch; the samplers call it directly, where ᾱ is a Python float (float64).

    ᾱ    `alpha_bar`          share of the variance of x_t that is image: 1 = clean, 0 = pure noise
    ε    `noise`, `epsilon`   unit Gaussian noise
    v    `velocity`           what a "v_prediction" model predicts instead of ε
    σ    `noise_level`        noise relative to the image, as in Karras et al. 2022
"""

import math
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# The equations. `alpha_bar` is a float, or a tensor that broadcasts to the others
# ----------------------------------------------------------------------------------------------------------------------

Level = TypeVar("Level", float, Tensor)


def noised(x0: Tensor, noise: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """x_t = √ᾱ x_0 + √(1-ᾱ) ε, a sample of q(x_t | x_0) (DDPM, Equation 4)."""
    return alpha_bar**0.5 * x0 + (1 - alpha_bar) ** 0.5 * noise


def velocity(x0: Tensor, noise: Tensor, alpha_bar: float | Tensor) -> Tensor:
    """v = √ᾱ ε - √(1-ᾱ) x_0 (Salimans & Ho 2022, Section 4)."""
    return alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * x0


def x0_from_prediction(prediction: Tensor, x_t: Tensor, alpha_bar: float | Tensor, prediction_type: str) -> Tensor:
    """The x_0 that a prediction implies: from ε by DDPM, Equation 15; from v by Salimans & Ho 2022, Appendix D."""
    if prediction_type == "epsilon":
        return (x_t - (1 - alpha_bar) ** 0.5 * prediction) / alpha_bar**0.5
    return alpha_bar**0.5 * x_t - (1 - alpha_bar) ** 0.5 * prediction


def epsilon_from_prediction(prediction: Tensor, x_t: Tensor, alpha_bar: float | Tensor, prediction_type: str) -> Tensor:
    """The ε that a prediction implies: itself, or √ᾱ v + √(1-ᾱ) x_t (Salimans & Ho 2022, Appendix D)."""
    if prediction_type == "epsilon":
        return prediction
    return alpha_bar**0.5 * prediction + (1 - alpha_bar) ** 0.5 * x_t


def noise_level(alpha_bar: Level) -> Level:
    """σ = √((1-ᾱ)/ᾱ): 0 = clean, growing without bound as ᾱ falls to 0; a float ᾱ must be above 0."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def signal_to_noise(alpha_bar: Tensor) -> Tensor:
    """SNR = ᾱ/(1-ᾱ), which is 1/σ²."""
    return alpha_bar / (1 - alpha_bar)


# ----------------------------------------------------------------------------------------------------------------------
# The schedule
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class NoiseSchedule:
    """The noise of each timestep, ᾱ_t = ∏(1 - β_s), and the equations at integer timesteps.

    The defaults are Stable Diffusion's. Tensors are (N, ...), timesteps `t` are integer tensors (N,) in [0, T).
    """

    num_timesteps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012
    schedule: str = "scaled_linear"  # or "linear" (DDPM), "squaredcos_cap_v2" (cosine)
    prediction_type: str = "epsilon"  # what the U-Net predicts: "epsilon" or "v_prediction"
    zero_terminal_snr: bool = False  # make x_{T-1} pure noise (Lin et al. 2024); needs v-prediction

    betas: Tensor = field(init=False, repr=False, compare=False)  # (T,)
    alphas_cumprod: Tensor = field(init=False, repr=False, compare=False)  # (T,), ᾱ_t

    def __post_init__(self) -> None:
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type must be 'epsilon' or 'v_prediction', not {self.prediction_type!r}.")
        if self.zero_terminal_snr and self.prediction_type == "epsilon":
            raise ValueError("zero_terminal_snr needs prediction_type='v_prediction': ε says nothing about pure noise.")
        self.betas = _make_betas(self.schedule, self.num_timesteps, self.beta_start, self.beta_end)
        if self.zero_terminal_snr:
            self.betas = _rescale_to_zero_terminal_snr(self.betas)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Moves the tables to `device`, so that training steps index them without waiting for a copy."""
        self.betas, self.alphas_cumprod = self.betas.to(device), self.alphas_cumprod.to(device)
        return self

    def draw_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """n random timesteps (n,), rising, each equally likely, spread evenly: losses vary less from batch to batch.

        All are moved by one random offset (Kingma et al. 2021, arXiv:2107.00630, Appendix I.1).
        """
        device, T = generator.device, self.num_timesteps
        evenly = (torch.arange(n, device=device) + torch.rand(1, generator=generator, device=device)) / n
        return (evenly * T).long().clamp(max=T - 1)  # 1 - 1e-8 is 1 in float32

    def _alpha_bar(self, t: Tensor, like: Tensor) -> Tensor:
        """ᾱ_t on the device of `like`, shaped (N, 1, ..., 1) to multiply it; float32, also beside half precision."""
        return self.alphas_cumprod.to(like.device)[t.to(like.device)].reshape(-1, *[1] * (like.ndim - 1))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t from x_0 and ε."""
        return noised(x0, noise, self._alpha_bar(t, x0)).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the U-Net should predict at x_t: ε or v."""
        if self.prediction_type == "epsilon":
            return noise
        return velocity(x0, noise, self._alpha_bar(t, x0)).to(x0.dtype)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean x_0 that a prediction at x_t implies."""
        return x0_from_prediction(prediction, x_t, self._alpha_bar(t, x_t), self.prediction_type).to(x_t.dtype)

    def to_epsilon(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction at x_t implies."""
        return epsilon_from_prediction(prediction, x_t, self._alpha_bar(t, x_t), self.prediction_type).to(x_t.dtype)

    def snr(self, t: Tensor) -> Tensor:
        """Signal-to-noise ratio of each timestep, (N,); 0 at the last one of a zero-terminal-SNR schedule."""
        return signal_to_noise(self.alphas_cumprod.to(t.device)[t])

    def loss_weight(self, t: Tensor, gamma: float | None) -> Tensor:
        """Weight of each image's squared error, (N,): min-SNR-γ (Hang et al. 2023, Section 3.4); None weighs all 1.

        In x_0-space the weight is min(SNR, γ). An ε-error is an x_0-error times √SNR, a v-error one times √(SNR+1),
        so the weight is divided by that. A zero-terminal-SNR schedule weighs all 1, as Lin et al. 2024 do: min-SNR
        would give the last timestep the weight 0, and it is there to be learned.
        """
        if gamma is None or self.zero_terminal_snr:
            return torch.ones(t.shape, device=t.device)
        snr = self.snr(t)
        return snr.clamp(max=gamma) / (snr if self.prediction_type == "epsilon" else snr + 1)


def _make_betas(schedule: str, T: int, first: float, last: float) -> Tensor:
    if schedule == "linear":  # DDPM, Section 4
        return torch.linspace(first, last, T, dtype=torch.float32)
    if schedule == "scaled_linear":  # latent diffusion: linear in √β
        return torch.linspace(first**0.5, last**0.5, T, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, Equation 17; β capped at 0.999

        def alpha_bar(s: float) -> float:
            return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), 0.999) for i in range(T)]
        return torch.tensor(betas, dtype=torch.float32)
    raise ValueError(f"schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', not {schedule!r}.")


def _rescale_to_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shifts and scales √ᾱ so that the last value is 0 and the first stays (Lin et al. 2024, Algorithm 1)."""
    root = torch.cumprod(1 - betas, dim=0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas
