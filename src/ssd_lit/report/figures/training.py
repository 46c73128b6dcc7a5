"""Curves over training: loss over steps, FLOPs and seconds, active neurons, similarity of the activation pattern."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter

from ssd_lit.report.figures.style import (
    GREY,
    MOST_CURVES,
    WIDTH,
    ArmStyle,
    arm_key,
    arm_label,
    arm_panels,
    arm_styles,
    curves_of,
    draw_band,
    empty_figure,
    layer_bar,
    layer_colours,
    legend_columns,
    note_left_out,
    over_seeds,
    select_arms,
    shade_sparse,
)
from ssd_lit.report.results import RUN, Array, Points, RunResult, by_arm

ZOOM = 0.6
"""The enlarged panel begins at this fraction of the training that ends first."""
LANE, LABEL = 0.13, 0.16
"""Inches for a run's lane and for an arm's name beside its lanes."""

# Where steps lie on the x axis, for a run.
Place = Callable[[RunResult, Sequence[float]], Array]
RATIO = "activation/active_ratio/layer_"
SIMILARITY = "activation/similarity"


def loss_over_steps(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the global step."""
    figure = _draw(results, lambda _, steps: np.asarray(steps, dtype=np.float64), "step")
    return figure, _losses(results).drop(columns=["flops", "seconds"])


def loss_over_flops(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the FLOPs spent."""
    return _draw(results, RunResult.flops_at, "training FLOPs"), _losses(results).drop(columns="seconds")


def loss_over_seconds(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Loss against the wall-clock seconds spent in training."""
    return _draw(results, RunResult.seconds_at, "training time (s)"), _losses(results).drop(columns="flops")


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
    ends = [place(result, [0.0, result.last_step]) for result in trained]
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
    handles: list[Artist] = [arm_key(runs[0], styles[arm]) for arm, runs in by_arm(trained).items()]
    handles += [Patch(color=GREY, label="sparse phase"), Patch(color=GREY, alpha=0.2, lw=0, label="dense phase")]
    figure.legend(handles=handles, loc="outside upper center", ncols=legend_columns(handles))
    note_left_out(figure, results, drawn)
    return figure


def _draw_arm(plot: Axes, runs: Sequence[RunResult], style: ArmStyle, place: Place) -> None:
    for name in ("train/loss", "validation/loss"):
        curves = curves_of(runs, name)
        if not curves:
            continue
        band = over_seeds(curves)
        x = np.mean([place(result, list(band.x)) for result in runs], axis=0)
        if name == "train/loss":
            plot.plot(x, band.mean, color=style.colour, linestyle=style.line, linewidth=0.7, alpha=0.35)
        else:
            draw_band(plot, band, style, x=x, marker=style.marker, markersize=3)


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
            left, right = place(result, [record.first_step, record.last_step])
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
    lanes.set_yticks(list(middles.values()), [arm_label(runs[0]) for runs in by_arm(trained).values()])
    lanes.tick_params(axis="y", length=0)


def _fit_height(plot: Axes, trained: Sequence[RunResult], place: Place, left: float) -> None:
    """Let the validation losses in view fill the plot; the training loss of the first steps may leave it."""
    values = []
    for result in trained:
        points = result.points.get("validation/loss", [])
        x = place(result, [step for step, _ in points])
        values += [loss for at, (step, loss) in zip(x, points, strict=True) if at >= left and step > 0]
    values = [value for value in values if np.isfinite(value)]
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.05
        plot.set_ylim(min(values) - margin, max(values) + margin)


def _losses(results: Sequence[RunResult]) -> pd.DataFrame:
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
    return pd.DataFrame(rows, columns=[*RUN, "what", "step", "flops", "seconds", "value"])


def _spent(result: RunResult, steps: list[int]) -> list[dict[str, float]]:
    """FLOPs and seconds spent at each step."""
    both = zip(result.flops_at(steps), result.seconds_at(steps), strict=True)
    return [{"flops": flops, "seconds": seconds} for flops, seconds in both]


def active_neurons(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of active neurons by layer."""
    measured = [result for result in results if _ratios(result)]
    rows = [
        (result.name, result.arm, result.config.seed, int(name.removeprefix(RATIO)), step, value)
        for result in measured
        for name in _ratios(result)
        for step, value in result.points[name]
    ]
    layers = max((len(_ratios(result)) for result in measured), default=0)
    colours = layer_colours(layers)

    def draw(panel: Axes, runs: list[RunResult], style: ArmStyle) -> None:
        for layer, name in enumerate(_ratios(runs[0])):
            draw_band(panel, over_seeds(curves_of(runs, name)), ArmStyle(colours[layer], "-"), linewidth=1.3)
        shade_sparse(panel, runs, style.colour)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")

    figure, panels = arm_panels(results, measured, draw, "step", "no run to draw here recorded its active neurons")
    if panels:
        panels[0].set_xlim(left=0)
        panels[0].set_ylabel("active neurons")
        layer_bar(figure, panels, layers)
    return figure, pd.DataFrame(rows, columns=[*RUN, "layer", "step", "active_ratio"])


def similarity(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of the activation pattern at every check."""
    measured = [result for result in results if checks(result)]
    rows = [
        (result.name, result.arm, result.config.seed, step, value)
        for result in measured
        for stretch in checks(result)
        for step, value in stretch
    ]

    def draw(panel: Axes, runs: list[RunResult], style: ArmStyle) -> None:
        for result in runs:
            for stretch in checks(result):
                steps, values = zip(*stretch, strict=True)
                panel.plot(steps, values, color=style.colour, marker="o", markersize=3, linewidth=1.2)
            for record in result.chain[1:]:
                panel.axvline(record.first_step, color=GREY, linewidth=0.5, alpha=0.6)
        shade_sparse(panel, runs, style.colour)
        if runs[0].config.method == "ssd" and runs[0].config.switching.switch_points is None:
            _mark_tau(panel, runs[0].config.switching.tau)
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.02)

    figure, panels = arm_panels(results, measured, draw, "step", "no run to draw here measured its similarity")
    if panels:
        panels[0].set_xlim(left=0)
        panels[0].set_ylabel("similarity (adjusted Rand index)")
    return figure, pd.DataFrame(rows, columns=[*RUN, "step", "similarity"])


def _ratios(result: RunResult) -> list[str]:
    """The names of the run's curves of active neurons, layer by layer."""
    return sorted(name for name in result.points if name.startswith(RATIO))


def checks(result: RunResult) -> list[Points]:
    """The run's similarity checks, a list for each stretch without a switch.

    The records hold those that decided a switch; a run that never switches has them in its metrics only.
    """
    recorded = [[(int(step), value) for step, value in record.similarity] for record in result.chain]
    recorded = [stretch for stretch in recorded if stretch]
    return recorded or [points for points in [result.points.get(SIMILARITY, [])] if points]


def _mark_tau(panel: Axes, tau: float) -> None:
    panel.axhline(tau, color="black", linestyle="--", linewidth=1)
    panel.annotate(
        f"tau = {tau:g}", (1, tau), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip
