"""Curves of a run: columns of its metrics.csv against the step."""

from matplotlib import colormaps
from matplotlib.figure import Figure


def draw_columns(
    rows: list[dict[str, str]],
    curves: dict[str, str],
    ylabel: str,
    log_scale: bool = False,
    beside: dict[str, str] | None = None,
) -> Figure:
    """`curves` maps a column to its label; where a row has nothing in a column, its curve has no point.

    `beside`: the held-out loss by tenths of the timesteps, a column each, for a second panel with a logarithmic scale,
    coloured in their order.
    """
    panels = [curves, beside] if beside else [curves]
    figure = Figure(figsize=(7 * len(panels), 4), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(1, len(panels), place, xlabel="step", ylabel=ylabel)
        for i, (column, label) in enumerate(panel.items()):
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            style = {"color": colormaps["viridis"](i / len(panel))} if panel is beside else {}
            if points:
                marker = "." if len(points) < 40 else None
                axes.plot(*zip(*points, strict=True), label=label, marker=marker, **style)
        if axes.lines:
            axes.legend(fontsize=7 if panel is beside else None)
        if panel is beside:
            axes.set_title("held out, by tenths of the timesteps")
        if log_scale or panel is beside:
            axes.set_yscale("log")
        axes.grid(alpha=0.3)
    return figure
