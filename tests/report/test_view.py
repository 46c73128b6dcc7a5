from types import SimpleNamespace
from typing import Any

from matplotlib.figure import Figure

from ssd_lit.report.view import MOST_ARMS, select_arms, tell_left_out


def runs(count: int, *, cells: int = 0) -> list[Any]:
    """So many arms with two seeds each, the last of them cells of a grid."""
    return [SimpleNamespace(arm=f"arm{i}", is_cell=i >= count - cells) for i in range(count) for _ in range(2)]


def told(results: list[Any], drawn: list[Any]) -> str:
    figure = Figure()
    tell_left_out(figure, results, drawn)
    return figure.get_supxlabel()


def test_of_very_many_arms_the_first_are_drawn_and_the_others_are_told() -> None:
    results = runs(100)
    drawn = select_arms(results, most=9)
    assert drawn == results[: 2 * MOST_ARMS]
    assert told(results, drawn) == f"{100 - MOST_ARMS} more arms are not drawn here: see the CSV of this figure."


def test_cells_of_grids_leave_room_for_the_arms_beside_them() -> None:
    results = runs(100, cells=96)
    drawn = select_arms(results, most=9)
    assert drawn == results[:8]
    assert told(results, drawn).startswith("96 cells of grids are not drawn here")
    assert select_arms(results[:12], most=9) == results[:12]
