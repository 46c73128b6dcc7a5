"""How the activation pattern changes through training: pairs of snapshots, by number of clusters and by clustering."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ssd_lit.config import RunConfig
from ssd_lit.report.analyses import has_table, joined, read_table
from ssd_lit.report.curves import Array, draw_band, over_seeds
from ssd_lit.report.panels import arm_panels, empty_figure, shade_sparse
from ssd_lit.report.runs import Points, RunResult, by_arm
from ssd_lit.report.style import GREY, WIDTH, ArmStyle, arm_styles, ramp
from ssd_lit.report.view import MOST_PANELS, select_arms, tell_left_out

TABLE = "similarity"
COLUMNS = ["construction", "experts", "step_a", "step_b", "similarity"]
NOTHING = "no run to draw here kept snapshots to compare"

# Neither an arm's colours nor in an order; markers tell them apart without colour.
CONSTRUCTIONS = {
    "kmeans": ArmStyle("#1b9e77", "-", "o"),
    "kmeans_activations": ArmStyle("#d95f02", "-", "s"),
    "coactivation": ArmStyle("#7570b3", "-", "^"),
    "contiguous": ArmStyle("#a6761d", "-", "D"),
    "random": ArmStyle(GREY, "-", "x"),
}


def similarity_pairs(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of all pairs of snapshots as heat maps, averaged over layers and seeds."""
    tables = _tables(results)
    able = [result for result, _ in tables]
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(NOTHING), joined(tables, COLUMNS)
    chosen = [(result, _of(table, *main_setting(table, result.config))) for result, table in tables]
    styles = arm_styles(results)
    figure, panels = arm_panels(shown, styles, "step", row_height=3.1)
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        mean = pd.concat([table for result, table in chosen if result.arm == arm])
        construction, experts = mean["construction"].iloc[0], mean["experts"].iloc[0]
        panel.set_title(f"{runs[0].label}\n{construction}, E = {experts}", color=styles[arm].colour, pad=13)
        steps, matrix = _matrix(mean)
        edges = _edges(steps)
        image = panel.pcolormesh(edges, edges, matrix, vmin=0, vmax=1, cmap="viridis")
        panel.set_aspect("equal")
        panel.grid(False)
        for result in runs:
            _mark_sparse(panel, result, edges, styles[arm].colour, 1 / len(runs))
    panels[0].set_ylabel("step")
    figure.colorbar(image, ax=panels, label="similarity (adjusted Rand index)")
    tell_left_out(figure, able, shown)
    return figure, joined(chosen, COLUMNS)


def similarity_settings(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of successive snapshots: a row an arm, left by number of clusters, right by construction."""
    tables = [(result, _successive(table)) for result, table in _tables(results)]
    able = [result for result, _ in tables]
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(NOTHING), joined(tables, COLUMNS)
    arms, styles = by_arm(shown), arm_styles(results)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), 2, sharex=True, sharey=True, squeeze=False)
    counts = sorted({int(experts) for _, table in tables for experts in table["experts"]})
    by_count = {
        count: ArmStyle(colour, "-") for count, colour in zip(counts, ramp(len(counts), "viridis"), strict=True)
    }
    names = dict.fromkeys(str(name) for _, table in tables for name in table["construction"])
    for (left, right), (arm, runs) in zip(grid, arms.items(), strict=True):
        mine = [table for result, table in tables if result.arm == arm]
        construction, experts = main_setting(mine[0], runs[0].config)
        for count in sorted(set(mine[0]["experts"])):
            _draw_line(left, mine, (construction, count), by_count[count])
        for name in dict.fromkeys(mine[0]["construction"]):
            _draw_line(right, mine, (name, experts), CONSTRUCTIONS[name])
        left.set_title(f"{runs[0].label}: {construction}", color=styles[arm].colour)
        right.set_title(f"{runs[0].label}: E = {experts}", color=styles[arm].colour)
        for panel in (left, right):
            shade_sparse(panel, runs, styles[arm].colour)
        left.set_ylabel("similarity (ARI)")
    grid[0, 0].set_xlim(0, max(result.last_step for result in shown))
    for panel in grid[-1]:
        panel.set_xlabel("step")
    left_key = _key({f"E = {count}": look for count, look in by_count.items()})
    figure.legend(handles=left_key, loc="outside upper left", ncols=4)
    right_key = _key({name: CONSTRUCTIONS[name] for name in names})
    figure.legend(handles=right_key, loc="outside upper right", ncols=3)
    tell_left_out(figure, able, shown)
    return figure, joined(tables, COLUMNS)


def main_setting(table: pd.DataFrame, config: RunConfig) -> tuple[str, int]:
    """The construction and number of clusters to show of several: k-means if it is there, and the E nearest the run's.

    k-means is what the run itself decides by.
    """
    names = list(dict.fromkeys(table["construction"]))
    counts = sorted({int(experts) for experts in table["experts"]})
    nearest = min(counts, key=lambda count: abs(count - config.moe.experts))
    return "kmeans" if "kmeans" in names else names[0], nearest


def _tables(results: Sequence[RunResult]) -> list[tuple[RunResult, pd.DataFrame]]:
    """Runs with their similarities, averaged over layers."""
    found = [(result, read_table(result, TABLE)) for result in results if has_table(result, TABLE)]
    return [(result, table[table["layer"] == "mean"]) for result, table in found]


def _of(table: pd.DataFrame, construction: str, experts: int) -> pd.DataFrame:
    return table[(table["construction"] == construction) & (table["experts"] == experts)]


def _successive(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that compare a snapshot with the next one."""
    steps = sorted(set(table["step_a"]) | set(table["step_b"]))
    following = dict(pairwise(steps))
    return table[table["step_a"].map(following) == table["step_b"]]


def _key(looks: Mapping[str, ArmStyle]) -> list[Line2D]:
    return [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=3.5, label=label)
        for label, look in looks.items()
    ]


def _draw_line(panel: Axes, tables: Sequence[pd.DataFrame], setting: tuple[str, int], look: ArmStyle) -> None:
    """Similarity over the later snapshot's step: the mean of several seeds and their range."""
    mine = [_of(table, *setting) for table in tables]
    curves: list[Points] = [
        [(int(step), float(value)) for step, value in zip(table["step_b"], table["similarity"], strict=True)]
        for table in mine
    ]
    draw_band(panel, over_seeds(curves), look, marker=look.marker, markersize=3.5)


def _matrix(table: pd.DataFrame) -> tuple[Array, Array]:
    """Steps [N] and the similarity [N, N] of every two of them, averaged over seeds."""
    turned = table.rename(columns={"step_a": "step_b", "step_b": "step_a"})
    both = pd.concat([table, turned[turned["step_a"] != turned["step_b"]]])
    square = both.pivot_table(index="step_a", columns="step_b", values="similarity", aggfunc="mean")
    return square.index.to_numpy(dtype=np.float64), square.to_numpy(dtype=np.float64)


def _edges(steps: Array) -> Array:
    """Borders [N + 1] of cells around the steps [N], N at least 2."""
    middles = (steps[:-1] + steps[1:]) / 2
    return np.concatenate([[2 * steps[0] - middles[0]], middles, [2 * steps[-1] - middles[-1]]])


def _mark_sparse(panel: Axes, result: RunResult, edges: Array, colour: str, alpha: float) -> None:
    """Bars above and right of the map along the sparse phases."""
    for first, last in result.sparse_spans():
        low, high = max(first, edges[0]), min(last, edges[-1])
        if low >= high:
            continue
        along_x, along_y = panel.get_xaxis_transform(), panel.get_yaxis_transform()
        above = Rectangle((low, 1.015), high - low, 0.03, transform=along_x)
        beside = Rectangle((1.015, low), 0.03, high - low, transform=along_y)
        for bar in (above, beside):
            bar.set(facecolor=colour, alpha=alpha, linewidth=0, clip_on=False)
            panel.add_patch(bar)
