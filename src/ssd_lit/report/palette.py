"""The colour, dash and marker of every arm: of the figures, and of the runs in MLflow.

Needs matplotlib only for the cells of grids.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Okabe and Ito's colours without yellow, too faint on white, then three of Tol's: colour-blind readers tell them apart.
PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#44AA99", "#999933",
)  # fmt: skip
Line = Literal["-", "-.", ":"] | tuple[float, tuple[float, ...]]
LINES: tuple[Line, ...] = ("-", "-.", ":", (0, (6, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 3)))
"""Plain dashes are left for what is not a curve: reference lines."""
MARKERS = ("o", "^", "s", "v", "P", "X")
RAMPS = ("plasma", "viridis")
"""Colours of the cells of grids, which stand in an order."""
RAMP_COLOURS = 200
"""More of a ramp could not be told apart, even by number."""


@dataclass(frozen=True)
class ArmStyle:
    """Colour, line and marker of an arm, the same in every figure; MLflow's charts have the colour."""

    colour: str
    line: Line
    marker: str = MARKERS[0]


def styles_of(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, ArmStyle]:
    """The style of each arm in order, given the settings that set it apart in its grid, none outside one.

    No two are alike among the arms that one figure draws. With more arms than colours another kind of line and marker
    begins. The cells of all grids over the same settings share a ramp of colours.
    """
    ramps: dict[tuple[str, ...], list[str]] = {}
    others: list[str] = []
    for arm, values in arms.items():
        (ramps.setdefault(tuple(values), []) if values else others).append(arm)
    styles = {}
    for index, arm in enumerate(others):
        kind = index // len(PALETTE) % len(LINES)
        styles[arm] = ArmStyle(PALETTE[index % len(PALETTE)], LINES[kind], MARKERS[kind])
    for index, cells in enumerate(ramps.values()):
        colours = ramp(min(len(cells), RAMP_COLOURS), RAMPS[index % len(RAMPS)])
        for place, arm in enumerate(cells):
            kind = (index // len(RAMPS) + place // RAMP_COLOURS) % len(LINES)
            styles[arm] = ArmStyle(colours[place % RAMP_COLOURS], LINES[kind], "D")
    return styles


def ramp(count: int, name: str) -> list[str]:
    """Colours from dark to light, the lightest left out: they are too faint on white."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps[name](0.88 * index / max(count - 1, 1))) for index in range(count)]
