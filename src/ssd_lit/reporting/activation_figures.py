"""Activation sparsity and pattern similarity through training, one panel an arm."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap
from matplotlib.figure import Figure

from ssd_lit.reporting.curves import curves_of, draw_band, over_seeds
from ssd_lit.reporting.runs import Points, RunResult, by_arm
from ssd_lit.reporting.style import GREY, WIDTH, ArmStyle, arm_styles

RATIO = "activation/active_ratio/layer_"
SIMILARITY = "activation/similarity"


def active_neurons(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Share of active neurons by layer."""
    shown = [result for result in results if _ratios(result)]
    table = pd.DataFrame(
        [
            (result.name, result.arm, result.config.seed, int(name.removeprefix(RATIO)), step, value)
            for result in shown
            for name in _ratios(result)
            for step, value in result.points[name]
        ],
        columns=["run", "arm", "seed", "layer", "step", "active_ratio"],
    )
    if not shown:
        return _empty("no run recorded the share of active neurons"), table
    styles = arm_styles(results)
    layers = max(len(_ratios(result)) for result in shown)
    palette = ListedColormap(colormaps["viridis"](np.linspace(0.0, 0.9, layers)))
    figure, panels = _panels(shown, styles)
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        for layer, name in enumerate(_ratios(runs[0])):
            draw_band(panel, over_seeds(curves_of(runs, name)), ArmStyle(_hex(palette, layer), "-"), linewidth=1.3)
        _shade(panel, runs, styles[arm].colour)
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    panels[0].set_ylabel("active neurons")
    _layer_bar(figure, panels, palette, layers)
    return figure, table


def similarity(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of the activation pattern at every check."""
    shown = [result for result in results if _checks(result)]
    table = pd.DataFrame(
        [
            (result.name, result.arm, result.config.seed, step, value)
            for result in shown
            for stretch in _checks(result)
            for step, value in stretch
        ],
        columns=["run", "arm", "seed", "step", "similarity"],
    )
    if not shown:
        return _empty("no run measured the similarity of its activation pattern"), table
    styles = arm_styles(results)
    figure, panels = _panels(shown, styles)
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        for result in runs:
            for stretch in _checks(result):
                steps, values = zip(*stretch, strict=True)
                panel.plot(steps, values, color=styles[arm].colour, marker="o", markersize=3, linewidth=1.2)
            for record in result.chain[1:]:
                panel.axvline(record.first_step, color=GREY, linewidth=0.5, alpha=0.6)
        _shade(panel, runs, styles[arm].colour)
        if runs[0].config.method == "ssd":
            _mark_tau(panel, runs[0].config.switching.tau)
        panel.set_ylim(min(0.0, panel.get_ylim()[0]), 1.02)
    panels[0].set_ylabel("similarity (adjusted Rand index)")
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


def _panels(shown: Sequence[RunResult], styles: dict[str, ArmStyle]) -> tuple[Figure, list[Axes]]:
    """A panel for each arm, titled with its label, at most three in a row."""
    arms = by_arm(shown)
    columns = min(3, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = Figure(figsize=(WIDTH, 0.3 + 2.6 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel().tolist()
    for unused in grid[len(arms) :]:
        unused.set_axis_off()
    panels = grid[: len(arms)]
    for place, (panel, (arm, runs)) in enumerate(zip(panels, arms.items(), strict=True)):
        panel.set_title(runs[0].label, color=styles[arm].colour)
        panel.set_xlim(0, max(result.total.steps for result in shown))
        if place + columns >= len(arms):
            panel.set_xlabel("step")
            panel.tick_params(labelbottom=True)
    return figure, panels


def _shade(panel: Axes, runs: Sequence[RunResult], colour: str) -> None:
    """Shade the sparse phases; over several seeds the shades add up."""
    for result in runs:
        for first, last in result.sparse_spans():
            panel.axvspan(first, last, color=colour, alpha=0.14 / len(runs), lw=0)


def _mark_tau(panel: Axes, tau: float) -> None:
    panel.axhline(tau, color="black", linestyle="--", linewidth=1)
    panel.annotate(
        f"tau = {tau:g}", (1, tau), xycoords=("axes fraction", "data"), xytext=(-3, 3), textcoords="offset points",
        ha="right", fontsize=8,
    )  # fmt: skip


def _layer_bar(figure: Figure, panels: Sequence[Axes], palette: Colormap, layers: int) -> None:
    scale = ScalarMappable(BoundaryNorm(np.arange(layers + 1) - 0.5, layers), palette)
    bar = figure.colorbar(scale, ax=list(panels), label="layer", ticks=range(0, layers, math.ceil(layers / 12)))
    bar.ax.tick_params(length=0)


def _hex(palette: Colormap, index: int) -> str:
    red, green, blue, _ = palette(index)
    return f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}"


def _empty(why: str) -> Figure:
    figure = Figure(figsize=(WIDTH, 0.6))
    figure.text(0.5, 0.5, why, ha="center", va="center", color=GREY)
    return figure
