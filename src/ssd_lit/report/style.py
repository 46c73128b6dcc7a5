"""How figures look: one colour an arm in all of them, and files that are the same bytes every time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from ssd_lit.report.runs import RunResult, by_arm
from ssd_lit.support.files import whole_file

# Okabe and Ito's colours without yellow, too faint on white, then three of Tol's: colour-blind readers tell them apart.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#44AA99", "#999933",
)  # fmt: skip
Line = Literal["-", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "-.", ":")
"""Dashes are left for what is not a curve: reference lines."""
MARKERS = ("o", "^", "s")
RAMPS = ("plasma", "viridis")
"""Colours of the cells of grids, which stand in an order."""
GREY = "#555555"
WIDTH = 9.0
"""Inches; the report shows figures at page width."""
LOG_RATIO = 3.0
"""Perplexities further apart than this factor are drawn on a log scale."""

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


@dataclass(frozen=True)
class ArmStyle:
    """Colour, line and marker of an arm, the same in every figure."""

    colour: str
    line: Line
    marker: str = MARKERS[0]


def arm_styles(results: Sequence[RunResult]) -> dict[str, ArmStyle]:
    """A colour for each arm in order; with more arms than colours, another kind of line and marker.

    The cells of all grids over the same settings share a ramp of colours.
    """
    ramps: dict[tuple[str, ...], list[str]] = {}
    others: list[str] = []
    for arm, runs in by_arm(results).items():
        (ramps.setdefault(tuple(runs[0].config.grid), []) if runs[0].is_cell else others).append(arm)
    styles = {}
    for index, arm in enumerate(others):
        kind = index // len(PALETTE) % len(LINES)
        styles[arm] = ArmStyle(PALETTE[index % len(PALETTE)], LINES[kind], MARKERS[kind])
    for index, cells in enumerate(ramps.values()):
        for arm, colour in zip(cells, ramp(len(cells), RAMPS[index % len(RAMPS)]), strict=True):
            styles[arm] = ArmStyle(colour, "-", "D")
    return styles


def ramp(count: int, name: str) -> list[str]:
    """Colours from dark to light, the lightest left out: they are too faint on white."""
    return [to_hex(colormaps[name](0.88 * index / max(count - 1, 1))) for index in range(count)]


def scale_perplexities(axes: Axes, values: Sequence[float]) -> None:
    """A log scale for the y axis if the perplexities drawn are far apart."""
    if values and max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
        # Perplexities span one or two decades: label 20 and 50 too, in plain numbers.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def legend_columns(handles: Sequence[Artist]) -> int:
    """How many columns of a legend fit beside each other on a figure's width."""
    longest = max(len(str(handle.get_label())) for handle in handles)
    return max(1, min(5, int(WIDTH / (0.6 + 0.07 * longest))))


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
    with whole_file(png) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
    return [svg, png]
