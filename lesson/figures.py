"""Figures of the notebook `understand_stable_diffusion.ipynb`: curves, vectors, paths of samplers in one dimension."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import display
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from noise_schedule import NoiseSchedule
from samplers import SAMPLERS, STOCHASTIC_SAMPLERS, timestep_grid

# ----------------------------------------------------------------------------------------------------------------------
# Curves
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Panel:
    """One diagram: lines by label, each (x, y) or (x, y, style of matplotlib)."""

    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, Sequence] = field(default_factory=dict)
    log: bool = False  # of y


def show_curves(*panels: Panel, height: float = 3.2) -> None:
    """Diagrams side by side, each with a legend if it has more than one line."""
    _, all_axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), height), layout="constrained", squeeze=False)
    for axes, panel in zip(all_axes[0], panels, strict=True):
        for label, (x, y, *style) in panel.lines.items():
            axes.plot(_numbers(x), _numbers(y), *style, label=label)
        axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.grid(alpha=0.3)
        if panel.log:
            axes.set_yscale("log")
        if len(panel.lines) > 1:
            axes.legend(fontsize=8)
    plt.show()


def show_strips(strips: dict[str, Image.Image]) -> None:
    """Wide images below each other, each under its name."""
    _, all_axes = plt.subplots(len(strips), 1, figsize=(8.4, 1.35 * len(strips)), layout="constrained", squeeze=False)
    for axes, (name, strip) in zip(all_axes[:, 0], strips.items(), strict=True):
        axes.imshow(np.asarray(strip.convert("RGB")))
        axes.set_title(name, fontsize=9, loc="left")
        axes.axis("off")
    plt.show()


def as_jpeg(image: Image.Image, note: str = "") -> display.Image:
    """An image to end a cell with, below a line of text if there is one, as the tenth of a PNG's bytes."""
    strip = 24 if note else 0
    page = Image.new("RGB", (image.width, image.height + strip), "white")
    page.paste(image.convert("RGB"), (0, strip))
    ImageDraw.Draw(page).text((6, 4), note, fill="black", font=ImageFont.load_default(14))
    page.save(file := io.BytesIO(), "jpeg", quality=85)
    return display.Image(file.getvalue(), format="jpeg")


def _numbers(values: Tensor | Sequence[float]) -> np.ndarray:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


# ----------------------------------------------------------------------------------------------------------------------
# Vectors
# ----------------------------------------------------------------------------------------------------------------------


def plane_of(unconditional: Tensor, conditional: Tensor) -> Callable[[Tensor], tuple[float, float]]:
    """The plane through 0 and two predictions: from a prediction to its coordinates, first along `unconditional`."""
    first = unconditional.flatten() / unconditional.norm()
    across = conditional.flatten() - (conditional.flatten() @ first) * first
    second = across / across.norm()
    return lambda prediction: ((prediction.flatten() @ first).item(), (prediction.flatten() @ second).item())


def show_vectors(title: str, vectors: dict[str, tuple[float, float]], unit: str) -> None:
    """Arrows from 0 with their names; the two axes have scales of their own, since the second is far shorter."""
    _, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    xs, ys = zip(*vectors.values(), (0, 0), strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    for i, (x, y) in enumerate(vectors.values()):
        axes.annotate("", (x, y), (0, 0), arrowprops={"arrowstyle": "->", "color": f"C{i}", "linewidth": 1.5})
    lowest = -np.inf
    for i, (name, (x, y)) in sorted(enumerate(vectors.items()), key=lambda item: item[1][1][1]):
        lowest = max(y, lowest + 0.085 * height)  # no name upon another
        axes.text(x + 0.015 * width, lowest, name, va="center", color=f"C{i}")
    axes.set_xlim(min(xs) - 0.1 * width, max(xs) + 0.35 * width)
    axes.set_ylim(min(ys) - 0.15 * height, max(ys) + 0.15 * height)
    axes.set(title=title, xlabel=f"along the unconditional prediction ({unit})", ylabel=f"across it ({unit})")
    axes.grid(alpha=0.3)
    plt.show()


# ----------------------------------------------------------------------------------------------------------------------
# Samplers where everything is known: x_0 is one number, -1 or +1 with equal chance
# ----------------------------------------------------------------------------------------------------------------------


def exact_epsilon(x_t: Tensor, alpha_bar: float) -> Tensor:
    """The best prediction of ε if x_0 is -1 or +1: E[x_0 | x_t] = tanh(√ᾱ x_t / (1-ᾱ)), and ε follows from it."""
    x0 = torch.tanh(alpha_bar**0.5 * x_t / (1 - alpha_bar))
    return (x_t - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5


def paths(
    sampler: str, steps: int, count: int, seed: int = 0, spacing: str | None = "trailing"
) -> tuple[Tensor, Tensor]:
    """What a sampler of this repository does to `count` numbers: timesteps (steps + 1,), x_t (steps + 1, count).

    `spacing` is the `timestep_spacing` of `timestep_grid`: None is the sampler's own, and only with "trailing" do all
    call the model at the same timesteps.
    """
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(seed)
    grid = timestep_grid(sampler, schedule, steps, timestep_spacing=spacing)
    alpha_bars = schedule.alphas_cumprod.numpy()

    def predict(x_t: Tensor, t: float) -> Tensor:
        return exact_epsilon(x_t, float(np.interp(t, range(len(alpha_bars)), alpha_bars)))

    x = grid.start(torch.randn(1, 1, 1, count, generator=generator))
    film = [x]
    noise = (lambda _: torch.randn(x.shape, generator=generator)) if sampler in STOCHASTIC_SAMPLERS else None
    SAMPLERS[sampler](predict, x, schedule, grid, noise=noise, callback=lambda _, __, x_t, ___: film.append(x_t))
    return torch.tensor([*grid.timesteps, 0.0]), torch.stack(film).reshape(len(film), count)


def on_a_point(x: Tensor) -> Tensor:
    """Which of these numbers are within 0.1 of -1 or +1."""
    return (x.abs() - 1).abs() < 0.1


def show_paths(samplers: Sequence[str], steps: int, spacing: str | None = "trailing", shown: int = 60) -> None:
    """Paths from noise (left) to data (right), grey where they miss it; in the titles, how many of 2,000 do not."""
    layout = {"figsize": (2.9 * len(samplers), 3), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, all_axes = plt.subplots(1, len(samplers), **layout)
    figure.suptitle(f"{steps} steps, {'each its own timesteps' if spacing is None else f'{spacing} timesteps'}")
    for axes, sampler in zip(all_axes[0], samplers, strict=True):
        t, x = paths(sampler, steps, 2000, spacing=spacing)
        hit = on_a_point(x[-1])
        for path, is_hit in zip(x.T[:shown], hit, strict=False):
            colour = ("C0" if path[-1] > 0 else "C1") if is_hit else "0.3"
            axes.plot(t, path, color=colour, linewidth=0.7, alpha=0.7)
        axes.plot(t[:-1], torch.full((steps,), -3.6), "k|", markersize=6)  # the model's calls
        axes.set(title=f"{sampler}: {hit.float().mean():.0%} on a point", xlabel="timestep t", xlim=(1020, -20))
        axes.grid(alpha=0.3)
    all_axes[0, 0].set_ylabel("$x_t$ (one number)")
    plt.show()
