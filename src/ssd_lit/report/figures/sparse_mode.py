"""Sparse mode over the number of experts: all arms together, and each arm's router against the oracle."""

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.report.arms import Arm, arms_of
from ssd_lit.report.figures.style import (
    GREY,
    MOST_CURVES,
    MOST_PANELS,
    PALETTE,
    WIDTH,
    ArmStyle,
    Band,
    arm_key,
    arm_label,
    arm_styles,
    axis_of_experts,
    draw_band,
    empty_figure,
    key,
    legend_columns,
    note_left_out,
    over_seeds,
    ring,
    scale_perplexities,
    select_arms,
)
from ssd_lit.report.results import RUN, Points, RunResult, by_arm
from ssd_lit.report.settings import ROUTER, alike_but

ENLARGED = 1.3
"""The enlarged panel reaches up to this multiple of the lowest perplexity."""
IN_A_ROW = 4
"""Panels of routers in a row, at most."""
ORACLE = ArmStyle(GREY, ":")


def perplexity_over_k(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Curves of the arms with experts, and dense-mode perplexities as lines."""
    styles = arm_styles(results)
    drawn = select_arms(results, MOST_CURVES)
    if not drawn:
        return empty_figure("only cells of grids were run: see their own figures"), _perplexity_table(results)
    handles = _perplexity_legend(drawn, styles)
    columns = legend_columns(handles)
    figure = Figure(figsize=(WIDTH, 3.5 + 0.15 * math.ceil(len(handles) / columns)), layout="constrained")
    whole, enlarged = figure.subplots(1, 2)
    for axes in (whole, enlarged):
        _draw_dense(axes, drawn, styles)
        _draw_curves(axes, drawn, styles)
        _label_experts(axes, drawn, "experts computed for a token, k")
    values = [value for result in drawn for _, value in perplexities(result.evaluation.curve)]
    values += [result.ppl_dense for result in _with_dense_line(drawn) if result.ppl_dense is not None]
    values = [value for value in values if math.isfinite(value)]
    if values:
        scale_perplexities(whole, values)
        enlarged.set_ylim(0.98 * min(values), ENLARGED * min(values))
    enlarged.set_title(f"up to {ENLARGED:g} times the lowest", color=GREY)
    whole.set_ylabel("validation perplexity")
    figure.legend(handles=handles, loc="outside upper center", ncols=columns)
    note_left_out(figure, results, drawn)
    return figure, _perplexity_table(results)


def perplexities(curve: Sequence[tuple[int, float]]) -> Points:
    """(k, perplexity) of a curve of losses over k."""
    return [(k, perplexity(loss)) for k, loss in curve]


def _label_experts(axes: Axes, results: Sequence[RunResult], label: str) -> None:
    ks = {k for result in results for k, _ in result.evaluation.curve}
    if ks:
        axis_of_experts(axes, ks, label)
    else:
        axes.set_xticks([])
        axes.set_xlabel("no run was scored in sparse mode")


def _ring(axes: Axes, result: RunResult, band: Band, colour: str) -> None:
    k = result.config.moe.top_k
    ring(axes, k, float(band.mean[list(band.x).index(k)]), colour)


def _draw_curves(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    for arm, runs in by_arm([result for result in results if result.evaluation.curve]).items():
        band = over_seeds([perplexities(result.evaluation.curve) for result in runs])
        draw_band(axes, band, styles[arm], marker=styles[arm].marker, markersize=3.5)
        _ring(axes, runs[0], band, styles[arm].colour)


def _draw_dense(axes: Axes, results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> None:
    """Perplexities in dense mode: in an arm's own line where it has no sparse mode, dashed where it has one."""
    for arm, runs in by_arm(_with_dense_line(results)).items():
        values = [result.ppl_dense for result in runs if result.ppl_dense is not None]
        if values:
            line: dict[str, Any] = {"linestyle": "--", "linewidth": 1} if runs[0].evaluation.curve else {}
            axes.axhline(mean(values), **{"color": styles[arm].colour, "linestyle": styles[arm].line, **line})


def _with_dense_line(results: Sequence[RunResult]) -> list[RunResult]:
    """The runs whose dense mode is drawn; with more arms than colours only those that have no other.

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


def _perplexity_legend(results: Sequence[RunResult], styles: dict[str, ArmStyle]) -> list[Line2D]:
    """A line for each arm, and what dashes mean if there are any."""
    entries = [arm_key(runs[0], styles[arm], bool(runs[0].evaluation.curve)) for arm, runs in by_arm(results).items()]
    if any(result.evaluation.curve for result in _with_dense_line(results)):
        entries.append(key("the same arm in dense mode", color=GREY, linestyle="--", linewidth=1))
    return entries


def _perplexity_table(results: Sequence[RunResult]) -> pd.DataFrame:
    rows: list[tuple[object, ...]] = []
    for result in results:
        run = (result.name, result.arm, result.config.seed)
        if result.ppl_dense is not None:
            rows.append((*run, "dense", None, result.ppl_dense))
        rows += [(*run, "sparse", k, value) for k, value in perplexities(result.evaluation.curve)]
    table = pd.DataFrame(rows, columns=[*RUN, "mode", "k", "perplexity"])
    return table.astype({"k": "Int64"})


def router_over_k(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """A panel for each arm with a sparse mode; those that differ in their router only stand together, on one scale."""
    scored = [result for result in results if result.evaluation.curve]
    drawn = select_arms(scored, MOST_PANELS)
    if not drawn:
        return empty_figure("no run to draw here was scored in sparse mode"), _router_table(scored)
    styles, groups = arm_styles(results), by_router(arms_of(drawn))
    count = sum(map(len, groups))
    columns = min(IN_A_ROW, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, 0.6 + 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for unused in panels[count:]:
        unused.set_axis_off()
    free = iter(panels)
    for group in groups:
        own = [next(free) for _ in group]
        for panel, arm in zip(own, group, strict=True):
            _draw(panel, arm, styles[arm.name])
        _share_scale(own, group)
    figure.supylabel("validation perplexity", fontsize=9)
    figure.legend(handles=_router_legend(drawn), loc="outside upper center", ncols=5)
    note_left_out(figure, scored, drawn)
    return figure, _router_table(scored)


def by_router(arms: Sequence[Arm]) -> list[list[Arm]]:
    """The arms in groups whose members differ in their router or within a grid only, in the order they first appear."""
    groups: list[list[Arm]] = []
    for arm in arms:
        alike = [group for group in groups if _belongs(arm, group)]
        if alike:
            alike[0].append(arm)
        else:
            groups.append([arm])
    return groups


def _belongs(arm: Arm, group: Sequence[Arm]) -> bool:
    first = group[0].config
    return first.grid.keys() == arm.config.grid.keys() and alike_but(first, arm.config, ROUTER | first.grid.keys())


def _draw(panel: Axes, arm: Arm, style: ArmStyle) -> None:
    dense = arm.measure("val_ppl_dense")
    if dense is not None and arm.runs[0].serves_densely:
        panel.axhline(dense.mean, color="black", linestyle="--", linewidth=0.9)
    if _has_oracle(arm):
        oracle = over_seeds([perplexities(run.evaluation.oracle_curve) for run in arm.runs])
        draw_band(panel, oracle, ORACLE, marker="o", markersize=3, markerfacecolor="white")
    band = over_seeds([perplexities(run.evaluation.curve) for run in arm.runs])
    draw_band(panel, band, style, marker=style.marker, markersize=3.5)
    _ring(panel, arm.runs[0], band, style.colour)
    for k, value in _dynamic_k(arm):
        panel.plot(k, value, marker="X", markersize=6, color=style.colour, markeredgecolor="white", zorder=4)
    _label_experts(panel, arm.runs, "k")
    panel.set_title(f"{arm_label(arm.runs[0])}\n{arm.runs[0].evaluation.router} router", color=style.colour)


def _share_scale(panels: Sequence[Axes], group: Sequence[Arm]) -> None:
    """The same y axis for all panels of a group."""
    runs = [run for arm in group for run in arm.runs]
    curves = [run.evaluation.curve for run in runs]
    curves += [run.evaluation.oracle_curve for run in runs if run.ppl_oracle is not None]
    values = [value for curve in curves for _, value in perplexities(curve)]
    values += [run.ppl_dense for run in runs if run.ppl_dense is not None and run.serves_densely]
    values = [value for value in values if math.isfinite(value)]
    for panel in panels:
        scale_perplexities(panel, values)
        if values and panel.get_yscale() == "log":
            panel.set_ylim(min(values) / 1.1, max(values) * 1.1)
        elif values:
            margin = 0.06 * (max(values) - min(values)) or 1.0
            panel.set_ylim(min(values) - margin, max(values) + margin)
        panel.yaxis.set_minor_formatter(NullFormatter())


def _dynamic_k(arm: Arm) -> list[tuple[float, float]]:
    """The mean number of experts and the mean perplexity at each threshold, where tokens take as many as matter."""
    points = zip(*(run.evaluation.threshold_curve for run in arm.runs), strict=True)
    return [(mean(k for _, k, _ in point), mean(perplexity(loss) for _, _, loss in point)) for point in points]


def _has_oracle(arm: Arm) -> bool:
    return arm.measure("val_ppl_oracle") is not None


def _router_legend(results: Sequence[RunResult]) -> list[Line2D]:
    entries = [
        key("own router", color="black", marker="o", markersize=3.5),
        key("oracle", color=GREY, linestyle=":", marker="o", markerfacecolor="white", markersize=3),
        key("own dense mode"),
    ]
    if any(result.evaluation.threshold_curve for result in results):
        cross: dict[str, Any] = {"marker": "X", "markeredgecolor": "white", "markersize": 6}
        entries.append(key("own router, dynamic k (mean)", color="black", linestyle="none", **cross))
    return entries


def _router_table(results: Sequence[RunResult]) -> pd.DataFrame:
    """Every point drawn; k is a mean over tokens where it is dynamic."""
    rows: list[tuple[object, ...]] = []
    for result in results:
        evaluation = result.evaluation
        run = (result.name, result.arm, result.config.seed, evaluation.router)
        rows += [(*run, "own", k, None, value) for k, value in perplexities(evaluation.curve)]
        if result.ppl_oracle is not None:
            rows += [(*run, "oracle", k, None, value) for k, value in perplexities(evaluation.oracle_curve)]
        rows += [(*run, "dynamic", k, share, perplexity(loss)) for share, k, loss in evaluation.threshold_curve]
    return pd.DataFrame(rows, columns=[*RUN, "router", "choice", "k", "threshold", "perplexity"])
