"""Figures of one panel an arm, and what their panels have in common."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from ssd_lit.report.formatting import shortened
from ssd_lit.report.runs import RunResult, by_arm
from ssd_lit.report.style import GREY, WIDTH, ArmStyle, ramp

COLUMNS = 3
"""Panels in a row, at most."""


def arm_panels(
    shown: Sequence[RunResult], styles: dict[str, ArmStyle], x_label: str, *, row_height: float = 2.6
) -> tuple[Figure, list[Axes]]:
    """A panel for each arm, titled with its label; all have the same axes."""
    arms = by_arm(shown)
    columns = min(COLUMNS, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(WIDTH, 0.3 + row_height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for unused in grid[len(arms) :]:
        unused.set_axis_off()
    panels = grid[: len(arms)]
    for place, (panel, (arm, runs)) in enumerate(zip(panels, arms.items(), strict=True)):
        panel.set_title(shortened(runs[0].label, 44), color=styles[arm].colour)
        if place + columns >= len(arms):
            panel.set_xlabel(x_label)
            panel.tick_params(labelbottom=True)
    return figure, panels


def shade_sparse(panel: Axes, runs: Sequence[RunResult], colour: str) -> None:
    """Shade the sparse phases along the x axis; over several seeds the shades add up."""
    for result in runs:
        for first, last in result.sparse_spans():
            panel.axvspan(first, last, color=colour, alpha=0.14 / len(runs), lw=0)


def layer_colours(layers: int) -> list[str]:
    """From the first layer, dark, to the last."""
    return ramp(layers, "viridis")


def layer_bar(figure: Figure, panels: Sequence[Axes], layers: int) -> None:
    """Which of the `layer_colours` is which layer."""
    scale = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), ListedColormap(layer_colours(layers)))
    rows = math.ceil(len(panels) / COLUMNS)
    bar = figure.colorbar(
        scale, ax=list(panels), label="layer", ticks=range(0, layers, math.ceil(layers / 12)), aspect=20 * rows
    )
    bar.ax.tick_params(length=0)


def empty_figure(why: str) -> Figure:
    """A line that says why there is nothing to show."""
    figure = Figure(figsize=(WIDTH, 0.6))
    figure.text(0.5, 0.5, why, ha="center", va="center", color=GREY)
    return figure
