"""Several seeds as one curve: the mean and the range."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ssd_lit.report.runs import Points, RunResult
from ssd_lit.report.style import ArmStyle

Array = np.ndarray[Any, np.dtype[np.float64]]


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


def mean_flops(results: Sequence[RunResult], steps: Array) -> Array:
    """FLOPs spent at each step, averaged over runs."""
    return np.asarray(np.mean([result.flops_at(list(steps)) for result in results], axis=0), dtype=np.float64)


def mean_seconds(results: Sequence[RunResult], steps: Array) -> Array:
    """Seconds of training spent at each step, averaged over runs."""
    return np.asarray(np.mean([result.seconds_at(list(steps)) for result in results], axis=0), dtype=np.float64)
