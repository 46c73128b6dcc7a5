"""Perplexity in sparse mode against the number of experts computed."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from ssd_lit.reporting.curves import draw_band, over_seeds
from ssd_lit.reporting.runs import Points, RunResult, by_arm, perplexity
from ssd_lit.reporting.style import GREY, WIDTH, ArmStyle, arm_styles

LOG_RATIO = 3.0
"""Perplexities further apart than this factor are drawn on a log scale."""
ENLARGED = 1.3
"""The enlarged panel reaches up to this multiple of the lowest perplexity."""


def over_k(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Curves of the arms with experts, and dense-mode perplexities as lines."""
    styles = arm_styles(results)
    table = _table(results)
    figure = Figure(figsize=(WIDTH, 3.8), layout="constrained")
    whole, enlarged = figure.subplots(1, 2)
    for axes in (whole, enlarged):
        _draw_dense(axes, results, styles)
        _draw_curves(axes, results, styles)
        _label_experts(axes, results)
    finite = [value for value in table["perplexity"] if math.isfinite(value)]
    if finite:
        _scale(whole, finite)
        enlarged.set_ylim(0.98 * min(finite), ENLARGED * min(finite))
    enlarged.set_title(f"up to {ENLARGED:g} times the lowest", color=GREY)
    whole.set_ylabel("validation perplexity")
    figure.legend(handles=_legend(results, styles), loc="outside upper center", ncols=5 if len(styles) < 5 else 4)
    return figure, table


def curve(result: RunResult) -> Points:
    """(k, perplexity) of the run in sparse mode."""
    return [(k, value) for k, loss in result.evaluation.curve if (value := perplexity(loss)) is not None]


def _draw_curves(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    for arm, runs in by_arm([result for result in results if result.evaluation.curve]).items():
        band = over_seeds([curve(result) for result in runs])
        draw_band(axes, band, styles[arm], marker="o", markersize=3.5)
        for at, value in zip(band.x, band.mean, strict=True):
            if at == runs[0].config.moe.top_k:
                axes.plot(at, value, marker="o", markersize=9, markerfacecolor="none", color=styles[arm].colour)


def _draw_dense(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    """Dense-mode perplexity; post-hoc MoEfication has that of the run it starts from."""
    for arm, runs in by_arm([result for result in results if result.config.method != "posthoc"]).items():
        values = [result.ppl_dense for result in runs if result.ppl_dense is not None]
        if values:
            axes.axhline(sum(values) / len(values), color=styles[arm].colour, linestyle="--", linewidth=1)


def _label_experts(axes: Axes, results: Sequence[RunResult]) -> None:
    ks = sorted({k for result in results for k, _ in result.evaluation.curve})
    if ks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("experts computed for a token, k")
    else:
        axes.set_xticks([])
        axes.set_xlabel("no run was scored in sparse mode")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    if max(values) > LOG_RATIO * min(values):
        axes.set_yscale("log")
        # Perplexities span one or two decades: label 20 and 50 too, in plain numbers.
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> list[Line2D]:
    """A curve for each arm that has one, and what dashes mean; the dense arm is a dashed line itself."""
    entries = []
    for arm, runs in by_arm(results).items():
        style = styles[arm]
        if runs[0].evaluation.curve:
            label = f"{runs[0].label}, k of {runs[0].config.moe.experts}"
            entries.append(
                Line2D([], [], color=style.colour, linestyle=style.line, marker="o", markersize=3.5, label=label)
            )
        else:
            entries.append(Line2D([], [], color=style.colour, linestyle="--", linewidth=1, label=runs[0].label))
    return [*entries, Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="in dense mode")]


def _table(results: Sequence[RunResult]) -> pd.DataFrame:
    rows: list[tuple[object, ...]] = []
    for result in results:
        run = (result.name, result.arm, result.config.seed)
        if result.ppl_dense is not None:
            rows.append((*run, "dense", None, result.ppl_dense))
        rows += [(*run, "sparse", k, value) for k, value in curve(result)]
    table = pd.DataFrame(rows, columns=["run", "arm", "seed", "mode", "k", "perplexity"])
    return table.astype({"k": "Int64"})
