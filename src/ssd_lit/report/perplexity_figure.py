"""Perplexity in sparse mode against the number of experts computed."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ssd_lit.report.curves import draw_band, over_seeds
from ssd_lit.report.formatting import shortened
from ssd_lit.report.panels import empty_figure
from ssd_lit.report.runs import Points, RunResult, by_arm, perplexity
from ssd_lit.report.style import GREY, PALETTE, WIDTH, ArmStyle, arm_styles, legend_columns, scale_perplexities
from ssd_lit.report.view import MOST_CURVES, select_arms, tell_left_out

ENLARGED = 1.3
"""The enlarged panel reaches up to this multiple of the lowest perplexity."""


def over_k(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Curves of the arms with experts, and dense-mode perplexities as lines."""
    styles = arm_styles(results)
    drawn = select_arms(results, MOST_CURVES)
    if not drawn:
        return empty_figure("only cells of grids were run: see their own figures"), _table(results)
    handles = _legend(drawn, styles)
    columns = legend_columns(handles)
    figure = Figure(figsize=(WIDTH, 3.5 + 0.15 * math.ceil(len(handles) / columns)), layout="constrained")
    whole, enlarged = figure.subplots(1, 2)
    for axes in (whole, enlarged):
        _draw_dense(axes, drawn, styles)
        _draw_curves(axes, drawn, styles)
        label_experts(axes, drawn)
    values = [value for result in drawn for _, value in perplexities(result.evaluation.curve)]
    values += [result.ppl_dense for result in _with_dense_line(drawn) if result.ppl_dense is not None]
    values = [value for value in values if math.isfinite(value)]
    if values:
        scale_perplexities(whole, values)
        enlarged.set_ylim(0.98 * min(values), ENLARGED * min(values))
    enlarged.set_title(f"up to {ENLARGED:g} times the lowest", color=GREY)
    whole.set_ylabel("validation perplexity")
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    tell_left_out(figure, results, drawn)
    return figure, _table(results)


def perplexities(curve: Sequence[tuple[int, float]]) -> Points:
    """(k, perplexity) of a curve of losses over k."""
    return [(k, perplexity(loss)) for k, loss in curve]


def label_experts(axes: Axes, results: Sequence[RunResult]) -> None:
    """An x axis of numbers of experts, each doubling as wide as the one before."""
    ks = sorted({k for result in results for k, _ in result.evaluation.curve})
    if ks:
        axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("experts computed for a token, k")
    else:
        axes.set_xticks([])
        axes.set_xlabel("no run was scored in sparse mode")


def ring(axes: Axes, runs: Sequence[RunResult], points: Sequence[tuple[float, float]], colour: str) -> None:
    """A ring around the point at the k that the arm is set to."""
    for at, value in points:
        if at == runs[0].config.moe.top_k:
            axes.plot(at, value, marker="o", markersize=9, markerfacecolor="none", color=colour)


def _draw_curves(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    for arm, runs in by_arm([result for result in results if result.evaluation.curve]).items():
        band = over_seeds([perplexities(result.evaluation.curve) for result in runs])
        draw_band(axes, band, styles[arm], marker=styles[arm].marker, markersize=3.5)
        ring(axes, runs, list(zip(band.x, band.mean, strict=True)), styles[arm].colour)


def _draw_dense(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    for arm, runs in by_arm(_with_dense_line(results)).items():
        values = [result.ppl_dense for result in runs if result.ppl_dense is not None]
        if values:
            axes.axhline(sum(values) / len(values), color=styles[arm].colour, linestyle="--", linewidth=1)


def _with_dense_line(results: Sequence[RunResult]) -> list[RunResult]:
    """The runs whose dense mode is drawn; with many arms only those that have no other.

    Post-hoc MoEfication has the dense mode of the run it starts from.
    """
    crowded = len(by_arm(results)) > len(PALETTE)
    return [
        result
        for result in results
        if result.serves_densely
        and (result.config.method != "posthoc" or result.config.parent_arm is None)
        and not (crowded and result.evaluation.curve)
    ]


def _legend(results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> list[Line2D]:
    """A curve for each arm that has one, and what dashes mean; the dense arm is a dashed line itself."""
    entries = []
    for arm, runs in by_arm(results).items():
        style, label = styles[arm], shortened(runs[0].label)
        if runs[0].evaluation.curve:
            entries.append(
                Line2D(
                    [], [], color=style.colour, linestyle=style.line, marker=style.marker, markersize=3.5,
                    label=f"{label}, k of {runs[0].config.moe.experts}",
                )
            )  # fmt: skip
        else:
            entries.append(Line2D([], [], color=style.colour, linestyle="--", linewidth=1, label=label))
    return [*entries, Line2D([], [], color=GREY, linestyle="--", linewidth=1, label="in dense mode")]


def _table(results: Sequence[RunResult]) -> pd.DataFrame:
    rows: list[tuple[object, ...]] = []
    for result in results:
        run = (result.name, result.arm, result.config.seed)
        if result.ppl_dense is not None:
            rows.append((*run, "dense", None, result.ppl_dense))
        rows += [(*run, "sparse", k, value) for k, value in perplexities(result.evaluation.curve)]
    table = pd.DataFrame(rows, columns=["run", "arm", "seed", "mode", "k", "perplexity"])
    return table.astype({"k": "Int64"})
