"""The figure of a grid: perplexity in both modes above, what it takes and what comes with it below."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ssd_lit.report.arms import Arm
from ssd_lit.report.figures.style import GREY, MARKERS, PALETTE, WIDTH, arm_label, key, ramp, scale_perplexities
from ssd_lit.report.formatting import percent, shortened
from ssd_lit.report.grid import QUANTITIES, Grid, Quantity, measured, table

SPREAD = 0.3
"""Fraction of the space between two values of the first key over which the series are spread."""
LETTERS = 11
"""Letters of a tick label to the inch."""


@dataclass(frozen=True)
class Series:
    """The cells that share all values but the first, by their place on the x axis."""

    label: str
    colour: str
    marker: str
    shift: float
    cells: dict[int, Arm]


def grid(grid: Grid) -> tuple[Figure, pd.DataFrame]:
    """A panel for each quantity: the first key's values along the x axis, the others' as colours."""
    series = _series(grid)
    figure = Figure(figsize=(WIDTH, 6.0))
    figure.set_layout_engine("constrained", hspace=0.08)
    upper, lower = QUANTITIES[:2], QUANTITIES[2:]
    panels = figure.subplot_mosaic(
        [
            [quantity.column for quantity in upper for _ in range(len(lower) // len(upper))],
            [quantity.column for quantity in lower],
        ],
        height_ratios=[1.7, 1.0],
    )
    for quantity in QUANTITIES:
        panel = panels[quantity.column]
        _draw_quantity(panel, grid, series, quantity)
        panel.set_title(quantity.title)
        _label_values(panel, grid, room=WIDTH / (len(upper) if quantity in upper else len(lower)))
        if quantity in upper:
            panel.set_xlabel(grid.keys[0])
    handles = _legend(grid, series)
    if handles:
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 5))
    return figure, table(grid)


def _series(grid: Grid) -> list[Series]:
    groups: dict[tuple[str, ...], dict[int, Arm]] = {}
    for cell in grid.cells:
        groups.setdefault(cell.values[1:], {})[grid.values[0].index(cell.values[0])] = cell.arm
    count = len(groups)
    if count == 1:
        colours = [PALETTE[1]]
    elif all(grid.ordered[1:]) or count > len(PALETTE):
        colours = ramp(count, "viridis")
    else:
        colours = list(PALETTE[:count])
    shifts = [SPREAD * ((index + 0.5) / count - 0.5) for index in range(count)]
    names = [key.rpartition(".")[2] for key in grid.keys[1:]]
    return [
        Series(
            ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True)),
            colour, MARKERS[index % len(MARKERS)], shift, cells,
        )
        for index, ((values, cells), colour, shift) in enumerate(zip(groups.items(), colours, shifts, strict=True))
    ]  # fmt: skip


def _draw_quantity(panel: Axes, grid: Grid, series: Sequence[Series], quantity: Quantity) -> None:
    drawn: list[float] = []
    for line in series:
        places, means = [], []
        for place, arm in sorted(line.cells.items()):
            measure = measured(grid, arm, quantity)
            if measure is None or not math.isfinite(measure.mean):
                continue
            at = place + line.shift
            places.append(at)
            means.append(measure.mean)
            drawn += measure.values
            if len(measure.values) > 1:
                panel.vlines(at, measure.low, measure.high, color=line.colour, linewidth=1)
                panel.plot(
                    [at] * len(measure.values), measure.values, color=line.colour, linestyle="none", marker=".",
                    markersize=4,
                )  # fmt: skip
        panel.plot(
            places, means, color=line.colour, linestyle=_line(grid), linewidth=1.2, marker=line.marker, markersize=4.5
        )
    if not drawn:
        panel.text(0.5, 0.5, "does not apply", transform=panel.transAxes, ha="center", va="center", color=GREY)
        panel.set_yticks([])
        return
    drawn += _draw_reference(panel, grid, quantity)
    if quantity.column.startswith("perplexity"):
        scale_perplexities(panel, drawn)
    else:
        panel.set_ylim(bottom=max(0.0, panel.get_ylim()[0]))
        scale, unit = (100, "%") if quantity.write is percent else (1, "")
        # As many digits as tell the ticks apart, however near to each other the cells are.
        panel.yaxis.set_major_formatter(lambda value, _: f"{scale * value:.6g}{unit}")


def _draw_reference(panel: Axes, grid: Grid, quantity: Quantity) -> list[float]:
    """The dense arm as a dashed line: in the sparse panel too, it is its dense mode that is compared with."""
    if grid.reference is None or quantity.column == "sparse_fraction":
        return []
    compared = QUANTITIES[0] if quantity.column == "perplexity_sparse" else quantity
    measure = measured(grid, grid.reference, compared)
    if measure is None or not math.isfinite(measure.mean):
        return []
    panel.axhline(measure.mean, color="black", linestyle="--", linewidth=1, zorder=1)
    return [measure.mean]


def _line(grid: Grid) -> Literal["-", "none"]:
    """Numbers are joined by a line, names are not."""
    return "-" if grid.ordered[0] else "none"


def _label_values(panel: Axes, grid: Grid, room: float) -> None:
    """The first key's values below the axis, slanting where `room`, the panel's width in inches, is too little."""
    values = [textwrap.fill(shortened(value, 40), 20) for value in grid.values[0]]
    panel.set_xticks(range(len(values)), values)
    if max(map(len, values)) > LETTERS * room / len(values):
        for label in panel.get_xticklabels():
            label.set(rotation=35, ha="right", va="center", rotation_mode="anchor")
    panel.set_xlim(-0.5, len(values) - 0.5)
    panel.grid(visible=False, axis="x")


def _legend(grid: Grid, series: Sequence[Series]) -> list[Line2D]:
    entries = [
        key(line.label, color=line.colour, linestyle=_line(grid), marker=line.marker, markersize=4.5)
        for line in series
        if line.label
    ]
    if grid.reference is not None:
        entries.append(key(f"{arm_label(grid.reference.runs[0])} (in dense mode)"))
    return entries
