"""What choosing experts costs: sparse mode with an arm's own router against the oracle, one panel an arm."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from ssd_lit.report.arms import Arm, arms_of, dynamic_k
from ssd_lit.report.curves import draw_band, over_seeds
from ssd_lit.report.formatting import shortened
from ssd_lit.report.panels import empty_figure
from ssd_lit.report.perplexity_figure import label_experts, perplexities, ring
from ssd_lit.report.runs import RunResult, perplexity
from ssd_lit.report.settings import ROUTER, alike_but
from ssd_lit.report.style import GREY, WIDTH, ArmStyle, arm_styles, scale_perplexities
from ssd_lit.report.view import MOST_PANELS, select_arms, tell_left_out

COLUMNS = 4
ORACLE = ArmStyle(GREY, ":")


def over_k(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """A panel for each arm with a sparse mode; those that differ in their router only stand together, on one scale."""
    scored = [result for result in results if result.evaluation.curve]
    drawn = select_arms(scored, MOST_PANELS)
    if not drawn:
        return empty_figure("no run to draw here was scored in sparse mode"), _table(scored)
    styles, groups = arm_styles(results), by_router(arms_of(drawn))
    count = sum(map(len, groups))
    columns = min(COLUMNS, count)
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
    figure.legend(handles=_legend(drawn), loc="outside upper center", ncols=5)
    tell_left_out(figure, scored, drawn)
    return figure, _table(scored)


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
    dense = arm.measure(lambda run: run.ppl_dense)
    if dense is not None and arm.runs[0].serves_densely:
        panel.axhline(dense.mean, color="black", linestyle="--", linewidth=0.9)
    if _has_oracle(arm):
        oracle = over_seeds([perplexities(run.evaluation.oracle_curve) for run in arm.runs])
        draw_band(panel, oracle, ORACLE, marker="o", markersize=3, markerfacecolor="white")
    band = over_seeds([perplexities(run.evaluation.curve) for run in arm.runs])
    draw_band(panel, band, style, marker=style.marker, markersize=3.5)
    ring(panel, arm.runs, list(zip(band.x, band.mean, strict=True)), style.colour)
    for k, value in dynamic_k(arm):
        panel.plot(k.mean, value.mean, marker="X", markersize=6, color=style.colour, markeredgecolor="white", zorder=4)
    label_experts(panel, arm.runs)
    panel.set_xlabel("k")
    panel.set_title(f"{shortened(arm.label, 30)}\n{arm.runs[0].evaluation.router} router", color=style.colour)


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


def _has_oracle(arm: Arm) -> bool:
    return arm.measure(lambda run: run.ppl_oracle) is not None


def _legend(results: Sequence[RunResult]) -> list[Line2D]:
    entries = [
        Line2D([], [], color="black", marker="o", markersize=3.5, label="own router"),
        Line2D([], [], color=GREY, linestyle=":", marker="o", markerfacecolor="white", markersize=3, label="oracle"),
        Line2D([], [], color="black", linestyle="--", linewidth=0.9, label="own dense mode"),
    ]
    if any(result.evaluation.threshold_curve for result in results):
        entries.append(
            Line2D(
                [], [], color="black", linestyle="none", marker="X", markeredgecolor="white", markersize=6,
                label="own router, dynamic k (mean)",
            )
        )  # fmt: skip
    return entries


def _table(results: Sequence[RunResult]) -> pd.DataFrame:
    """Every point drawn; k is a mean over tokens where it is dynamic."""
    rows: list[tuple[object, ...]] = []
    for result in results:
        evaluation = result.evaluation
        run = (result.name, result.arm, result.config.seed, evaluation.router)
        rows += [(*run, "own", k, None, value) for k, value in perplexities(evaluation.curve)]
        if result.ppl_oracle is not None:
            rows += [(*run, "oracle", k, None, value) for k, value in perplexities(evaluation.oracle_curve)]
        rows += [(*run, "dynamic", k, share, perplexity(loss)) for share, k, loss in evaluation.threshold_curve]
    return pd.DataFrame(rows, columns=["run", "arm", "seed", "router", "choice", "k", "threshold", "perplexity"])
