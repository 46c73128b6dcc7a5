"""Which arms a figure of all arms shows: with many of them, the cells of grids are left to the pages of their grids.

With very many, only the first are drawn: nobody tells more of them apart, and drawing takes a second for each.
"""

from collections.abc import Sequence

from matplotlib.figure import Figure

from ssd_lit.report.runs import RunResult, by_arm
from ssd_lit.report.style import GREY

MOST_CURVES = 16
"""Arms in one plot."""
MOST_PANELS = 9
"""Arms with a panel each."""
MOST_ARMS = 24
"""Arms in any figure, cells of grids or not."""


def select_arms(results: Sequence[RunResult], most: int) -> list[RunResult]:
    """The runs to draw: all, or all but the cells of grids if there are more than `most` arms; of MOST_ARMS arms."""
    crowded = len(by_arm(results)) > most
    able = [result for result in results if not (crowded and result.is_cell)]
    drawn = set(list(by_arm(able))[:MOST_ARMS])
    return [result for result in able if result.arm in drawn]


def tell_left_out(figure: Figure, results: Sequence[RunResult], drawn: Sequence[RunResult]) -> None:
    """Say below the figure how many arms it leaves out, if any."""
    shown = by_arm(drawn)
    cells = [runs[0].is_cell for arm, runs in by_arm(results).items() if arm not in shown]
    told = []
    if any(cells):
        told.append(f"{sum(cells)} cells of grids are not drawn here: see their own figures, and the CSV of this one.")
    if not all(cells):
        told.append(f"{len(cells) - sum(cells)} more arms are not drawn here: see the CSV of this figure.")
    if told:
        figure.supxlabel(" ".join(told), fontsize=8, color=GREY, x=0.01, ha="left")
