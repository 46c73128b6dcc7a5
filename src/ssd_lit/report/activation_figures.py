"""Activation sparsity and pattern similarity through training, one panel an arm."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssd_lit.report.curves import curves_of, draw_band, over_seeds
from ssd_lit.report.panels import arm_panels, empty_figure, layer_bar, layer_colours, shade_sparse
from ssd_lit.report.runs import Points, RunResult, by_arm
from ssd_lit.report.style import GREY, ArmStyle, arm_styles
from ssd_lit.report.view import MOST_PANELS, select_arms, tell_left_out

RATIO = "activation/active_ratio/layer_"
SIMILARITY = "activation/similarity"


def active_neurons(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of active neurons by layer."""
    measured = [result for result in results if _ratios(result)]
    shown = select_arms(measured, MOST_PANELS)
    table = pd.DataFrame(
        [
            (result.name, result.arm, result.config.seed, int(name.removeprefix(RATIO)), step, value)
            for result in measured
            for name in _ratios(result)
            for step, value in result.points[name]
        ],
        columns=["run", "arm", "seed", "layer", "step", "active_ratio"],
    )
    if not shown:
        return empty_figure("no run to draw here recorded the share of active neurons"), table
    styles = arm_styles(results)
    layers = max(len(_ratios(result)) for result in shown)
    colours = layer_colours(layers)
    figure, panels = arm_panels(shown, styles, "step")
    panels[0].set_xlim(0, max(result.last_step for result in shown))
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        for layer, name in enumerate(_ratios(runs[0])):
            draw_band(panel, over_seeds(curves_of(runs, name)), ArmStyle(colours[layer], "-"), linewidth=1.3)
        shade_sparse(panel, runs, styles[arm].colour)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panels[0].set_ylabel("active neurons")
    layer_bar(figure, panels, layers)
    tell_left_out(figure, measured, shown)
    return figure, table


def similarity(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of the activation pattern at every check."""
    measured = [result for result in results if _checks(result)]
    shown = select_arms(measured, MOST_PANELS)
    table = pd.DataFrame(
        [
            (result.name, result.arm, result.config.seed, step, value)
            for result in measured
            for stretch in _checks(result)
            for step, value in stretch
        ],
        columns=["run", "arm", "seed", "step", "similarity"],
    )
    if not shown:
        return empty_figure("no run to draw here measured the similarity of its activation pattern"), table
    styles = arm_styles(results)
    figure, panels = arm_panels(shown, styles, "step")
    panels[0].set_xlim(0, max(result.last_step for result in shown))
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        for result in runs:
            for stretch in _checks(result):
                steps, values = zip(*stretch, strict=True)
                panel.plot(steps, values, color=styles[arm].colour, marker="o", markersize=3, linewidth=1.2)
            for record in result.chain[1:]:
                panel.axvline(record.first_step, color=GREY, linewidth=0.5, alpha=0.6)
        shade_sparse(panel, runs, styles[arm].colour)
        if runs[0].config.method == "ssd" and runs[0].config.switching.switch_points is None:
            _mark_tau(panel, runs[0].config.switching.tau)
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.02)
    panels[0].set_ylabel("similarity (adjusted Rand index)")
    tell_left_out(figure, measured, shown)
    return figure, table


def _ratios(result: RunResult) -> list[str]:
    """The names of the run's curves of active neurons, layer by layer."""
    return sorted(name for name in result.points if name.startswith(RATIO))


def _checks(result: RunResult) -> list[Points]:
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
