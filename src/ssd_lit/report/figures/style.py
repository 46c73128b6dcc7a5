"""What figures share: a colour and a dash for every arm, which arms are drawn, panels, curves over seeds, files."""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ssd_lit.report.formatting import shortened
from ssd_lit.report.palette import MARKERS as MARKERS  # the figures import from here what they share
from ssd_lit.report.palette import PALETTE as PALETTE
from ssd_lit.report.palette import ArmStyle as ArmStyle
from ssd_lit.report.palette import ramp as ramp
from ssd_lit.report.palette import styles_of
from ssd_lit.report.results import Array, Points, RunResult, by_arm
from ssd_lit.support.files import whole_file

GREY = "#555555"
WIDTH = 9.0
"""Inches; the report shows figures at page width."""
LOG_RATIO = 3.0
"""Perplexities further apart than this factor are drawn on a log scale."""
COLUMNS = 3
"""Panels in a row, at most."""
MOST_CURVES = 16
"""Arms in one plot; with more, the cells of grids are left to the figures of their grids."""
MOST_PANELS = 9
"""Arms with a panel each; with more, cells are left out likewise."""
MOST_ARMS = 24
"""Arms in any figure: nobody tells more of them apart, and drawing takes a second for each."""

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    # A dollar in an arm's label is a dollar; no axis needs powers of ten.
    "text.parse_math": False,
    "svg.fonttype": "path",
    # Without a fixed salt the ids inside an SVG are random.
    "svg.hashsalt": "ssd_lit",
}


def arm_styles(results: Sequence[RunResult]) -> dict[str, ArmStyle]:
    """The style of each arm: see `styles_of`."""
    return styles_of({arm: runs[0].config.grid for arm, runs in by_arm(results).items()})


def arm_label(result: RunResult) -> str:
    """The label of a run's arm as it stands in legends, beside lanes and above panels."""
    return shortened(result.label, 30)


def scale_perplexities(axes: Axes, values: Sequence[float]) -> None:
    """A log scale for the y axis if the perplexities drawn are far apart."""
    if values and max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
        # Perplexities span one or two decades: label 20 and 50 too, in plain numbers.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def axis_of_experts(axes: Axes, ks: Collection[int], label: str) -> None:
    """An x axis of numbers of experts, each doubling as wide as the one before."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ks), [str(k) for k in sorted(ks)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def ring(axes: Axes, k: float, value: float, colour: str) -> None:
    """A ring around the point at the k that an arm is set to."""
    axes.plot(k, value, marker="o", markersize=9, markerfacecolor="none", color=colour)


def key(label: str, **look: Any) -> Line2D:
    """An entry of a legend, drawn as `plot` would with these arguments; without any a thin dashed black line."""
    look = look or {"color": "black", "linestyle": "--", "linewidth": 1}
    return Line2D([], [], label=label, **look)


def arm_key(result: RunResult, style: ArmStyle, has_marker: bool = True) -> Line2D:
    """The entry of a run's arm."""
    marker = style.marker if has_marker else ""
    return key(arm_label(result), color=style.colour, linestyle=style.line, marker=marker, markersize=3.5)


def legend_columns(handles: Sequence[Artist]) -> int:
    """How many columns of a legend fit beside each other on a figure's width."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(5, int(WIDTH / (0.6 + 0.07 * longest))))


def select_arms(results: Sequence[RunResult], most: int) -> list[RunResult]:
    """The runs to draw: all, or all but the cells of grids if there are more than `most` arms; of MOST_ARMS arms."""
    crowded = len(by_arm(results)) > most
    candidates = [result for result in results if not (crowded and result.is_cell)]
    drawn = set(list(by_arm(candidates))[:MOST_ARMS])
    return [result for result in candidates if result.arm in drawn]


def note_left_out(figure: Figure, results: Sequence[RunResult], drawn: Sequence[RunResult]) -> None:
    """Say below the figure how many arms it leaves out, if any."""
    shown = by_arm(drawn)
    cells = [runs[0].is_cell for arm, runs in by_arm(results).items() if arm not in shown]
    remarks = []
    if any(cells):
        remarks.append(
            f"{sum(cells)} cells of grids are not drawn here: see their own figures and the CSV of this one."
        )
    if not all(cells):
        remarks.append(f"{len(cells) - sum(cells)} more arms are not drawn here: see the CSV of this figure.")
    if remarks:
        figure.supxlabel(" ".join(remarks), fontsize=8, color=GREY, x=0.01, ha="left")


def arm_panels(
    results: Sequence[RunResult],
    able: Sequence[RunResult],
    draw: Callable[[Axes, list[RunResult], ArmStyle], None],
    x_label: str,
    why_empty: str,
    row_height: float = 2.6,
) -> tuple[Figure, list[Axes]]:
    """A panel for each arm of the runs that are `able`, titled with its label, then drawn; all have the same axes.

    Without an arm to draw the figure is a line that says why, and there are no panels.
    """
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(why_empty), []
    arms, styles = by_arm(shown), arm_styles(results)
    columns = min(COLUMNS, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(WIDTH, 0.3 + row_height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for unused in grid[len(arms) :]:
        unused.set_axis_off()
    panels = grid[: len(arms)]
    for place, (panel, (arm, runs)) in enumerate(zip(panels, arms.items(), strict=True)):
        panel.set_title(arm_label(runs[0]), color=styles[arm].colour)
        if place + columns >= len(arms):
            panel.set_xlabel(x_label)
            panel.tick_params(labelbottom=True)
        draw(panel, runs, styles[arm])
    note_left_out(figure, able, shown)
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


@dataclass(frozen=True)
class Band:
    """Mean, lowest and highest value over seeds at each x."""

    x: Array
    mean: Array
    low: Array
    high: Array


def over_seeds(curves: Sequence[Points]) -> Band:
    """Join curves on all their x values, within the range that every curve covers.

    Phases end at different steps with different seeds, so a curve is interpolated where only others have a point.
    """
    first = max(curve[0][0] for curve in curves)
    last = min(curve[-1][0] for curve in curves)
    x = np.array(sorted({x for curve in curves for x, _ in curve if first <= x <= last}), dtype=np.float64)
    values = np.array([np.interp(x, [x for x, _ in curve], [y for _, y in curve]) for curve in curves])
    if x.size == 0:
        return Band(x, x, x, x)
    return Band(x, values.mean(axis=0), values.min(axis=0), values.max(axis=0))


def draw_band(axes: Axes, band: Band, style: ArmStyle, x: Array | None = None, **line: Any) -> None:
    """The mean as a line, the range as a pale band if there is one; `x` replaces the band's own."""
    at = band.x if x is None else x
    axes.plot(at, band.mean, color=style.colour, linestyle=style.line, **line)
    if (band.high > band.low).any():
        axes.fill_between(at, band.low, band.high, color=style.colour, alpha=0.2, linewidth=0)


def curves_of(results: Sequence[RunResult], name: str) -> list[Points]:
    """The curve of that name from every run that has it."""
    return [result.points[name] for result in results if result.points.get(name)]


@contextmanager
def figure_settings() -> Iterator[None]:
    """matplotlib's settings for our figures, whatever the user's own are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as .svg and .png, without dates or versions inside."""
    # The name of an arm may hold a dot: no suffix is to be replaced.
    svg, png = (stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png"))
    with whole_file(svg) as part:
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
    figure.set_layout_engine("none")  # the picture is laid out as the drawing was
    with whole_file(png) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
    return [svg, png]
