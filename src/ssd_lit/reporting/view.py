"""Which arms a figure of all arms shows: with many of them, the cells of grids are left to the pages of their grids."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ssd_lit.reporting.runs import RunResult, by_arm
from ssd_lit.reporting.style import GREY

MOST_CURVES = 16
"""Arms in one plot."""
MOST_PANELS = 9
"""Arms with a panel each."""


def in_view(results: Sequence[RunResult], most: int) -> list[RunResult]:
    """The runs to draw: all, or all but the cells of grids if there are more than `most` arms."""
    crowded = len(by_arm(results)) > most
    return [result for result in results if not (crowded and result.is_cell)]


def tell_left_out(figure: Figure, results: Sequence[RunResult], drawn: Sequence[RunResult]) -> None:
    """Say below the figure how many arms it leaves out, if any."""
    count = len(by_arm(results)) - len(by_arm(drawn))
    if count:
        figure.supxlabel(
            f"{count} cells of grids are not drawn here: see their own figures, and the CSV of this one.",
            fontsize=8, color=GREY, x=0.01, ha="left",
        )  # fmt: skip
