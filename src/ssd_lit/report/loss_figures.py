"""Loss through training, over steps, FLOPs and seconds, with each run's phases in lanes below."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from ssd_lit.report.curves import Array, curves_of, draw_band, mean_flops, mean_seconds, over_seeds
from ssd_lit.report.formatting import shortened
from ssd_lit.report.panels import empty_figure
from ssd_lit.report.runs import RunResult, by_arm
from ssd_lit.report.style import GREY, WIDTH, ArmStyle, arm_styles, legend_columns
from ssd_lit.report.view import MOST_CURVES, select_arms, tell_left_out

ZOOM = 0.6
"""The enlarged panel begins at this share of the training that ends first."""
LANE, LABEL = 0.13, 0.16
"""Inches for a run's lane and for an arm's name beside its lanes."""

# Where steps lie on the x axis, for the runs of one arm.
Place = Callable[[Sequence[RunResult], Array], Array]


def over_steps(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the global step."""
    figure = _draw(results, lambda _, steps: steps, "step")
    return figure, _table(results).drop(columns=["flops", "seconds"])


def over_flops(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the FLOPs spent."""
    return _draw(results, mean_flops, "training FLOPs"), _table(results).drop(columns="seconds")


def over_seconds(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the wall-clock seconds spent in training."""
    return _draw(results, mean_seconds, "training time (s)"), _table(results).drop(columns="flops")


def _draw(results: Sequence[RunResult], place: Place, x_label: str) -> Figure:
    drawn = select_arms(results, MOST_CURVES)
    trained = [result for result in drawn if result.trained]
    if not trained:
        return empty_figure("no run to draw here trained a step")
    styles = arm_styles(results)
    lane_height = max(LANE * len(trained), LABEL * len(by_arm(trained)))
    figure = Figure(figsize=(WIDTH, 3.6 + lane_height), layout="constrained")
    grid = figure.subplots(
        2, 2, sharex="col", gridspec_kw={"height_ratios": [3.0, lane_height], "width_ratios": [3, 2]}
    )
    ends = [place([result], np.array([0.0, result.last_step])) for result in trained]
    start, end = min(float(span[0]) for span in ends), max(float(span[1]) for span in ends)
    first_end = min(float(span[1]) for span in ends)
    for column, left in enumerate((start, start + ZOOM * (first_end - start))):
        plot, lanes = grid[0, column], grid[1, column]
        for arm, runs in by_arm(trained).items():
            _draw_arm(plot, runs, styles[arm], place)
        _draw_lanes(plot, lanes, trained, styles, place)
        # The last marker is not cut in half.
        plot.set_xlim(left, end + 0.01 * (end - left))
        _fit_height(plot, trained, place, left)
        lanes.set_xlabel(x_label)
        lanes.xaxis.set_major_formatter(EngFormatter())
    grid[0, 0].set_ylabel("validation loss (nats per target)")
    grid[0, 1].set_title("the last part", color=GREY)
    _label_lanes(grid[1, 0], trained)
    grid[1, 1].set_yticks([])
    handles = _legend(trained, styles)
    figure.legend(handles=handles, loc="outside upper center", ncols=legend_columns(handles))
    tell_left_out(figure, results, drawn)
    return figure


def _draw_arm(plot: Axes, runs: Sequence[RunResult], style: ArmStyle, place: Place) -> None:
    faint: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.35}
    strong: dict[str, Any] = {"marker": style.marker, "markersize": 3}
    for name, line in (("train/loss", faint), ("validation/loss", strong)):
        curves = curves_of(runs, name)
        if not curves:
            continue
        band = over_seeds(curves)
        if name == "train/loss":
            plot.plot(place(runs, band.x), band.mean, color=style.colour, **line)
        else:
            draw_band(plot, band, style, x=place(runs, band.x), **line)


def _draw_lanes(
    plot: Axes, lanes: Axes, trained: Sequence[RunResult], styles: dict[str, ArmStyle], place: Place
) -> None:
    """A lane of phases for each run; sparse phases also shade the plot where a run alternates."""
    # Shades of several runs add up: together they stay light enough to read the curves.
    alternating = [result for result in trained if result.config.method == "ssd"]
    for lane, result in enumerate(trained):
        colour = styles[result.arm].colour
        for record in result.chain:
            if not record.steps:
                continue
            left, right = place([result], np.array([record.first_step, record.last_step], dtype=np.float64))
            sparse = record.mode == "sparse"
            lanes.barh(lane, right - left, left=left, height=0.7, color=colour, alpha=1.0 if sparse else 0.2, lw=0)
            if sparse and result in alternating:
                plot.axvspan(left, right, color=colour, alpha=0.14 / len(alternating), lw=0)
    lanes.set_ylim(len(trained) - 0.4, -0.6)
    lanes.grid(False)
    lanes.spines["left"].set_visible(False)
    plot.tick_params(labelbottom=False)


def _label_lanes(lanes: Axes, trained: Sequence[RunResult]) -> None:
    arms = [result.arm for result in trained]
    middles = {arm: sum(i for i, name in enumerate(arms) if name == arm) / arms.count(arm) for arm in arms}
    lanes.set_yticks(list(middles.values()), [shortened(arm) for arm in middles])
    lanes.tick_params(axis="y", length=0)


def _fit_height(plot: Axes, trained: Sequence[RunResult], place: Place, left: float) -> None:
    """Let the validation losses in view fill the plot; the training loss of the first steps may leave it."""
    values = []
    for result in trained:
        points = result.points.get("validation/loss", [])
        x = place([result], np.array([step for step, _ in points], dtype=np.float64))
        values += [loss for at, (step, loss) in zip(x, points, strict=True) if at >= left and step > 0]
    values = [value for value in values if np.isfinite(value)]
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.05
        plot.set_ylim(min(values) - margin, max(values) + margin)


def _legend(trained: Sequence[RunResult], styles: dict[str, ArmStyle]) -> list[Line2D | Patch]:
    lines: list[Line2D | Patch] = []
    for arm, runs in by_arm(trained).items():
        style = styles[arm]
        lines.append(
            Line2D(
                [],
                [],
                color=style.colour,
                linestyle=style.line,
                marker=style.marker,
                markersize=3,
                label=shortened(runs[0].label),
            )
        )
    phases = [Patch(color=GREY, label="sparse phase"), Patch(color=GREY, alpha=0.2, lw=0, label="dense phase")]
    return [*lines, *phases]


def _table(results: Sequence[RunResult]) -> pd.DataFrame:
    """Every point drawn, and the phases, one row each."""
    rows: list[dict[str, object]] = []
    for result in results:
        run = {"run": result.name, "arm": result.arm, "seed": result.config.seed}
        for name in ("train/loss", "validation/loss"):
            points = result.points.get(name, [])
            for (step, value), spent in zip(points, _spent(result, [step for step, _ in points]), strict=True):
                rows.append({**run, "what": name, "step": step, **spent, "value": value})
        for record in result.chain if result.trained else ():
            for edge, step in (("begins", record.first_step), ("ends", record.last_step)):
                what = f"phase {record.name} {edge}"
                rows.append({**run, "what": what, "step": step, **_spent(result, [step])[0], "value": None})
    return pd.DataFrame(rows, columns=["run", "arm", "seed", "what", "step", "flops", "seconds", "value"])


def _spent(result: RunResult, steps: list[int]) -> list[dict[str, float]]:
    """FLOPs and seconds spent at each step."""
    both = zip(result.flops_at(steps), result.seconds_at(steps), strict=True)
    return [{"flops": flops, "seconds": seconds} for flops, seconds in both]
