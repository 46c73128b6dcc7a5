"""How figures look: one colour an arm in all of them, and files that are the same bytes every time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.figure import Figure

from ssd_lit.files import whole_file
from ssd_lit.reporting.runs import RunResult, by_arm

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too faint on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
Line = Literal["-", "-.", ":"]
LINES: tuple[Line, ...] = ("-", "-.", ":")
"""Dashes are left for what is not a curve: reference lines."""
GREY = "#555555"
WIDTH = 9.0
"""Inches; the report shows figures at page width."""

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
    "svg.fonttype": "path",
    # Without a fixed salt the ids inside an SVG are random.
    "svg.hashsalt": "ssd_lit",
}


@dataclass(frozen=True)
class ArmStyle:
    """Colour and line of an arm, the same in every figure."""

    colour: str
    line: Line


def arm_styles(results: Sequence[RunResult]) -> dict[str, ArmStyle]:
    """A colour for each arm in order; with more arms than colours, another kind of line."""
    return {
        arm: ArmStyle(PALETTE[index % len(PALETTE)], LINES[index // len(PALETTE) % len(LINES)])
        for index, arm in enumerate(by_arm(results))
    }


@contextmanager
def figure_settings() -> Iterator[None]:
    """matplotlib's settings for our figures, whatever the user's own are."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_RC)
        yield


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write the figure as .svg and .png, without dates or versions inside."""
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    with whole_file(svg) as part:
        figure.savefig(part, format="svg", metadata={"Date": None, "Creator": None})
    with whole_file(png) as part:
        figure.savefig(part, format="png", dpi=150, metadata={"Software": None})
    return [svg, png]
