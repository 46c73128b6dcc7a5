"""How far each arm is above dense training, all through training."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssd_lit.moe.names import Mode
from ssd_lit.report.arms import arms_of, dense_peer
from ssd_lit.report.figures.style import (
    GREY,
    MOST_CURVES,
    WIDTH,
    arm_key,
    arm_styles,
    draw_band,
    empty_figure,
    key,
    legend_columns,
    note_left_out,
    over_seeds,
    select_arms,
)
from ssd_lit.report.results import RUN, Points, RunResult, by_arm

MODES: tuple[Mode, ...] = ("dense", "sparse")
FAINT = 0.45
"""Opacity of the curves in sparse mode."""
SETTLED = 0.2
"""The plot's height fits what comes after this fraction of the steps: losses are far apart before, for few steps."""


def above_dense(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Validation perplexity over that of dense training with the same seed at the same step, less one."""
    gaps = dict(_gaps(results))
    rows = [
        (result.name, result.arm, result.config.seed, mode, step, value)
        for result in results
        for mode in MODES
        for step, value in gaps.get((result.name, mode), [])
    ]
    data = pd.DataFrame(rows, columns=[*RUN, "mode", "step", "above_dense"])
    compared = [result for result in results if any((result.name, mode) in gaps for mode in MODES)]
    drawn = select_arms(compared, MOST_CURVES)
    if not drawn:
        return empty_figure("no run to draw here has dense training of its model and seed beside it"), data
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    plot, styles = figure.subplots(), arm_styles(results)
    for arm, runs in by_arm(drawn).items():
        style = styles[arm]
        for mode in MODES:
            curves = [gaps[run.name, mode] for run in runs if (run.name, mode) in gaps]
            if curves:
                alpha = 1.0 if mode == "dense" else FAINT
                draw_band(plot, over_seeds(curves), style, marker=style.marker, markersize=3, alpha=alpha)
    plot.axhline(0.0, color="black", linewidth=0.8)
    _fit_height(plot, drawn, gaps)
    plot.set_xlabel("step")
    plot.set_ylabel("perplexity above dense training")
    plot.yaxis.set_major_formatter(lambda fraction, _: f"{100 * fraction:g} %")
    handles: list[Artist] = [arm_key(runs[0], styles[arm]) for arm, runs in by_arm(drawn).items()]
    handles += [key("in dense mode", color=GREY), key("in sparse mode", color=GREY, alpha=FAINT)]
    figure.legend(handles=handles, loc="outside upper center", ncols=legend_columns(handles))
    note_left_out(figure, compared, drawn)
    return figure, data


def _gaps(results: Sequence[RunResult]) -> Iterator[tuple[tuple[str, Mode], Points]]:
    """By run and the mode that it was validated in: the steps up to dense training's last, and how far above it."""
    arms = arms_of(results)
    for arm in arms:
        peer = dense_peer(arm, arms)
        if peer is None or peer is arm:
            continue
        dense = {run.config.seed: _validations(run) for run in peer.runs}
        for run in arm.runs:
            known = dense.get(run.config.seed)
            # The steps of a run that starts from another are not those of dense training.
            if not known or run.config.parent_arm is not None:
                continue
            first, last = known[0][0], known[-1][0]
            points = [point for point in _validations(run) if first <= point[0] <= last]
            for mode in MODES:
                shared = [(step, loss) for step, loss in points if _mode(run, step) == mode]
                if shared:
                    yield (run.name, mode), _above(shared, known)


def _validations(run: RunResult) -> Points:
    """The validation losses that can be compared: of an untrained model there is no logarithm of steps."""
    return [(step, loss) for step, loss in run.points.get("validation/loss", []) if step > 0 and np.isfinite(loss)]


def _above(points: Points, dense: Points) -> Points:
    """The perplexity of losses over that of dense training at the same step, less one.

    Between two validations a loss runs below the line that joins them, the more so the earlier: a curve over the
    logarithm of steps goes through them instead, which bends no more often than they do.
    """
    from scipy.interpolate import PchipInterpolator

    steps, losses = np.array(points, dtype=np.float64).T
    dense_steps, dense_losses = np.array(dense, dtype=np.float64).T
    if len(dense) > 1:
        dense_losses = PchipInterpolator(np.log(dense_steps), dense_losses)(np.log(steps))
    above = np.exp(losses - dense_losses) - 1
    return [(step, float(value)) for (step, _), value in zip(points, above, strict=True)]


def _mode(run: RunResult, step: int) -> str | None:
    """The mode in which a run was validated after a step."""
    return next((phase.mode for phase in run.chain if phase.first_step < step <= phase.last_step), None)


def _fit_height(plot: Axes, drawn: Sequence[RunResult], gaps: dict[tuple[str, Mode], Points]) -> None:
    values = [
        value
        for run in drawn
        for mode in MODES
        for step, value in gaps.get((run.name, mode), [])
        if step >= SETTLED * run.last_step and np.isfinite(value)
    ]
    if values:
        low, high = min(0.0, *values), max(0.0, *values)
        margin = 0.05 * (high - low) or 0.01
        plot.set_ylim(low - margin, high + margin)
