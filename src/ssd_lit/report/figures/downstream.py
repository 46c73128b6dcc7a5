"""What the final models are worth on other tasks, as dots."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ssd_lit.report.downstream import METRICS, baselines, measure, part_name, parts, scores
from ssd_lit.report.figures.style import (
    GREY,
    MOST_CURVES,
    WIDTH,
    ArmStyle,
    arm_label,
    arm_styles,
    empty_figure,
    key,
    note_left_out,
    select_arms,
)
from ssd_lit.report.results import RunResult, by_arm

COLUMNS = ["run", "arm", "seed", "part", "mode", "metric", "value"]
MARKS = {
    "dense": {"marker": "o"},
    "dense_to_sparse": {"marker": "o", "markerfacecolor": "white"},
    "sparse": {"marker": "s"},
}
LEGENDS = {
    "glue": {
        "dense": "tuned and scored in dense mode", "dense_to_sparse": "tuned in dense, scored in sparse mode",
        "sparse": "tuned and scored in sparse mode",
    },
    "blimp": {"dense": "dense mode", "sparse": "sparse mode"},
}  # fmt: skip
OFFSETS = {"dense": -0.22, "dense_to_sparse": 0.0, "sparse": 0.22}
CHANCE = 0.5
"""Of finding the better of two sentences."""


def glue(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """One panel a task, by the last of its metrics, one row an arm."""
    table = scores(results, "glue")
    last = dict(parts(table))
    return _dots(results, table, list(last.items()), baselines(results), "glue")


def blimp(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """All sets and every field of BLiMP, one row an arm."""
    table = scores(results, "blimp")
    shown = parts(table)
    return _dots(results, table, shown, dict.fromkeys(shown, CHANCE), "blimp")


def _dots(
    results: Sequence[RunResult],
    table: pd.DataFrame,
    shown: Sequence[tuple[str, str]],
    reference: Mapping[tuple[str, str], float],
    benchmark: str,
) -> tuple[Figure, pd.DataFrame]:
    able = [result for result in results if result.arm in set(table["arm"])]
    drawn = select_arms(able, MOST_CURVES)
    if not drawn:
        return empty_figure("no run to draw here was tried on it"), table[COLUMNS]
    arms, styles = by_arm(drawn), arm_styles(results)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0].tolist()
    for panel, (part, metric) in zip(panels, shown, strict=True):
        panel.set_title(part_name(part))
        panel.set_xlabel(f"{METRICS[metric]}, %")
        panel.axvline(100 * reference[part, metric], color=GREY, linestyle="--", linewidth=1)
        for place, arm in enumerate(arms):
            for mode in LEGENDS[benchmark]:
                _dot(panel, table, arm, mode, (part, metric), place + OFFSETS[mode], styles[arm])
    panels[0].set_yticks(range(len(arms)), [arm_label(runs[0]) for runs in arms.values()])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    marks = [
        key(label, color=GREY, lw=0, markersize=5, **MARKS[mode])
        for mode, label in LEGENDS[benchmark].items()
        if mode in set(table["mode"])
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks))
    note_left_out(figure, able, drawn)
    return figure, table[COLUMNS]


def _dot(
    panel: Axes, table: pd.DataFrame, arm: str, mode: str, column: tuple[str, str], at: float, style: ArmStyle
) -> None:
    score = measure(table, arm, mode, *column)
    if score is not None:
        panel.plot(
            [100 * score.low, 100 * score.high], [at, at], color=style.colour, linestyle=style.line, linewidth=1.2
        )
        panel.plot(100 * score.mean, at, color=style.colour, markersize=5, **MARKS[mode])  # type: ignore[arg-type]
