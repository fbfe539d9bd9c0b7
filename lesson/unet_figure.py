"""The U-Net as a figure, drawn from the network itself: its levels, their shapes, the skips between them, the text.

    python -m lesson.unet_figure --output unet.svg                              # Stable Diffusion 1.x at 512×512
    python -m lesson.unet_figure stable_diffusion_results/monsters/model --output unet.svg

Shapes are recorded while a U-Net of that config runs on PyTorch's meta device, which computes shapes and no numbers.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch import nn

from diffusion_model import ResnetBlock, SpatialTransformer, UNet, UNetConfig

Shape = tuple[int, int, int]  # C, h, w
FORMATS = (".svg", ".png", ".pdf")


@dataclass
class Stage:
    """One level of the U-Net on its way down or up, or its middle."""

    name: str  # down_blocks.0, mid_block, …
    resnets: int
    attends: bool
    shape: Shape  # of its feature maps, before the level is left


def stages(config: UNetConfig, height: int, width: int) -> list[Stage]:
    """What a U-Net of that config does to latents of `height` × `width`, in its order: down, middle, up."""
    with torch.device("meta"):
        unet = UNet(config)
        latents, context = torch.empty(1, config.in_channels, height, width), torch.empty(1, 77, config.context_dim)
        found: dict[str, Stage] = {}

        def record(level: str, kind: type[nn.Module]) -> Callable:
            def note(_: nn.Module, __: object, output: torch.Tensor) -> None:
                stage = found.setdefault(level, Stage(level, 0, False, (0, 0, 0)))
                stage.resnets += kind is ResnetBlock
                stage.attends |= kind is SpatialTransformer
                stage.shape = tuple(output.shape[1:])

            return note

        for name, module in unet.named_modules():
            if isinstance(module, ResnetBlock | SpatialTransformer):
                level = ".".join(name.split(".")[: 1 if name.startswith("mid") else 2])
                module.register_forward_hook(record(level, type(module)))
        with torch.no_grad():
            unet(latents, torch.zeros(1), context)
    return list(found.values())


def draw_unet(config: UNetConfig, height: int, width: int) -> Figure:
    """The figure: down on the left, up on the right, a row for each size of feature maps (C × h × w).

    As many skips as there are ResnetBlocks on the way up: each takes one, concatenated to its input.
    """
    found = stages(config, height, width)
    depth = len(config.block_out_channels)
    figure = Figure(figsize=(10, 1.15 * depth + 2.6), layout="constrained")
    axes = figure.add_subplot(xlim=(-5, 5), ylim=(-depth - 0.75, 1.5))
    axes.axis("off")
    for i, stage in enumerate(found):
        side, level = (-1, i) if i < depth else (1, 2 * depth - i) if i > depth else (0, depth)
        _box(axes, 2.7 * side, -level, stage)
        if side == 1:
            _arrow(axes, (-1.36, -level), (1.36, -level), f"{stage.resnets} skips, concatenated", "dimgray")
        if side and level:
            ends = (-level + 0.66, -level + 0.34)
            text = "Downsample" if side == -1 else "Upsample"
            _arrow(axes, *((2.7 * side, y) for y in ends[::-side]), text, "black", beside=0.1)
    _arrow(axes, (-2.7, -depth + 0.66), (-1.36, -depth), "", "black")
    _arrow(axes, (1.36, -depth), (2.7, -depth + 0.66), "", "black")
    for x, name, channels, layer, start, end in (
        (-2.7, "x_t", config.in_channels, "conv_in", 0.85, 0.34),
        (2.7, "\\epsilon", config.out_channels, "conv_out", 0.34, 0.85),
    ):
        axes.text(x, 1.0, f"${name}$: {channels} × {height} × {width}", ha="center", va="bottom")
        _arrow(axes, (x, start), (x, end), layer, "black", beside=0.1)
    axes.text(
        0, 1.0, f"t → {4 * config.block_out_channels[0]} numbers, into every ResnetBlock", ha="center", va="bottom"
    )
    axes.text(0, 0.72, f"text: 77 × {config.context_dim}, into every SpatialTransformer", ha="center", va="bottom")
    return figure


def _box(axes: Axes, x: float, y: float, stage: Stage) -> None:
    colour = "#cfe3f5" if stage.attends else "#eeeeee"
    style = {"boxstyle": "round,pad=0.04", "facecolor": colour, "edgecolor": "black", "linewidth": 0.8}
    axes.add_patch(FancyBboxPatch((x - 1.3, y - 0.3), 2.6, 0.6, **style))
    if stage.name == "mid_block":
        blocks = "ResnetBlock, SpatialTransformer, ResnetBlock"
    else:
        blocks = f"{stage.resnets} × {'(ResnetBlock + SpatialTransformer)' if stage.attends else 'ResnetBlock'}"
    axes.text(x, y + 0.1, " × ".join(map(str, stage.shape)), ha="center", va="center", weight="bold")
    axes.text(x, y - 0.14, blocks, ha="center", va="center", fontsize=7.5)


def _arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], text: str, colour: str, beside: float = 0
) -> None:
    """An arrow with its text above, or `beside` it to the right."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "shrinkA": 0, "shrinkB": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    where = {"ha": "left", "va": "center"} if beside else {"ha": "center", "va": "bottom"}
    axes.text(x + beside, y if beside else y + 0.04, text, fontsize=8, color=colour, **where)


def save(figure: Figure, path: Path) -> None:
    """As SVG, PNG or PDF by its name; an SVG has its words as text, and the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unet"}):
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="MODEL", help="default: the shape of Stable Diffusion 1.x")
    parser.add_argument("--resolution", type=int, default=512, help="pixels a side (512)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="SVG, PNG or PDF")
    options = parser.parse_args()
    if options.output.suffix not in FORMATS:
        parser.error(
            f"--output: must end with {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, not {str(options.output)!r}."
        )
    if options.resolution < 8 or options.resolution % 8:
        parser.error(f"--resolution: must be positive and divisible by 8, not {options.resolution}.")
    try:
        config = UNetConfig()
        if options.model:
            from stable_diffusion_model import StableDiffusion

            config = StableDiffusion.from_pretrained(options.model, device="cpu").unet.config
        save(draw_unet(config, options.resolution // 8, options.resolution // 8), options.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
