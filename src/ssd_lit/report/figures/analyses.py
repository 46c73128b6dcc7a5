"""Figures of the analyses: how the activation pattern changes, how experts are used, and how they are chosen."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from ssd_lit.config import RunConfig
from ssd_lit.report.figures.style import (
    GREY,
    MOST_PANELS,
    WIDTH,
    ArmStyle,
    arm_label,
    arm_panels,
    arm_styles,
    axis_of_experts,
    draw_band,
    empty_figure,
    key,
    layer_bar,
    layer_colours,
    note_left_out,
    over_seeds,
    ramp,
    ring,
    select_arms,
    shade_sparse,
)
from ssd_lit.report.results import Array, Points, RunResult, by_arm, has_table, joined, read_table

TABLE = "similarity"
PATTERN_COLUMNS = ["construction", "experts", "step_a", "step_b", "similarity"]
LOAD_COLUMNS = ["layer", "rank", "expert", "load", "even_load"]
ROUTING_COLUMNS = ["layer", "top_k", "chosen_share", "oracle_share", "recall", "chance"]
NO_SNAPSHOTS = "no run to draw here kept snapshots to compare"
NO_EXPERTS = "no run to draw here has experts to watch"

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
    tables = [(result, _of(table, *main_setting(table, result.config))) for result, table in _tables(results)]

    def draw(panel: Axes, runs: list[RunResult], style: ArmStyle) -> None:
        mean = pd.concat(_of_runs(tables, runs))
        construction, experts = mean["construction"].iloc[0], mean["experts"].iloc[0]
        panel.set_title(f"{arm_label(runs[0])}\n{construction}, E = {experts}", color=style.colour, pad=13)
        steps, matrix = _matrix(mean)
        edges = _edges(steps)
        panel.pcolormesh(edges, edges, matrix, vmin=0, vmax=1, cmap="viridis")
        panel.set_aspect("equal")
        panel.grid(False)
        for result in runs:
            _mark_sparse(panel, result, edges, style.colour, 1 / len(runs))

    figure, panels = arm_panels(results, [result for result, _ in tables], draw, "step", NO_SNAPSHOTS, 3.1)
    if panels:
        panels[0].set_ylabel("step")
        figure.colorbar(panels[0].collections[0], ax=panels, label="similarity (adjusted Rand index)")
    return figure, joined(tables, PATTERN_COLUMNS)


def similarity_settings(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Similarity of successive snapshots: a row an arm, left by number of clusters, right by construction."""
    tables = [(result, _successive(table)) for result, table in _tables(results)]
    able = [result for result, _ in tables]
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(NO_SNAPSHOTS), joined(tables, PATTERN_COLUMNS)
    arms, styles = by_arm(shown), arm_styles(results)
    figure = Figure(figsize=(WIDTH, 0.8 + 2.1 * len(arms)), layout="constrained")
    grid = figure.subplots(len(arms), 2, sharex=True, sharey=True, squeeze=False)
    counts = sorted({int(experts) for _, table in tables for experts in table["experts"]})
    by_count = {
        count: ArmStyle(colour, "-") for count, colour in zip(counts, ramp(len(counts), "viridis"), strict=True)
    }
    names = dict.fromkeys(str(name) for _, table in tables for name in table["construction"])
    for (left, right), (arm, runs) in zip(grid, arms.items(), strict=True):
        own = _of_runs(tables, runs)
        construction, experts = main_setting(own[0], runs[0].config)
        for count in sorted(set(own[0]["experts"])):
            _draw_line(left, own, (construction, count), by_count[count])
        for name in dict.fromkeys(own[0]["construction"]):
            _draw_line(right, own, (name, experts), CONSTRUCTIONS[name])
        left.set_title(f"{arm_label(runs[0])}: {construction}", color=styles[arm].colour)
        right.set_title(f"{arm_label(runs[0])}: E = {experts}", color=styles[arm].colour)
        for panel in (left, right):
            shade_sparse(panel, runs, styles[arm].colour)
        left.set_ylabel("similarity (ARI)")
    grid[0, 0].set_xlim(0, max(result.last_step for result in shown))
    for panel in grid[-1]:
        panel.set_xlabel("step")
    by_count_keys = [_key(f"E = {count}", look) for count, look in by_count.items()]
    figure.legend(handles=by_count_keys, loc="outside upper left", ncols=4)
    figure.legend(handles=[_key(name, CONSTRUCTIONS[name]) for name in names], loc="outside upper right", ncols=3)
    note_left_out(figure, able, shown)
    return figure, joined(tables, PATTERN_COLUMNS)


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
    tables = [(result, read_table(result, TABLE)) for result in results if has_table(result, TABLE)]
    return [(result, table[table["layer"] == "mean"]) for result, table in tables]


def _of(table: pd.DataFrame, construction: str, experts: int) -> pd.DataFrame:
    return table[(table["construction"] == construction) & (table["experts"] == experts)]


def _successive(table: pd.DataFrame) -> pd.DataFrame:
    """Rows that compare a snapshot with the next one."""
    steps = sorted(set(table["step_a"]) | set(table["step_b"]))
    following = dict(pairwise(steps))
    return table[table["step_a"].map(following) == table["step_b"]]


def _of_runs(tables: Sequence[tuple[RunResult, pd.DataFrame]], runs: Sequence[RunResult]) -> list[pd.DataFrame]:
    return [table for result, table in tables if result in runs]


def _key(label: str, look: ArmStyle) -> Line2D:
    return key(label, color=look.colour, marker=look.marker, markersize=3.5)


def _draw_line(panel: Axes, tables: Sequence[pd.DataFrame], setting: tuple[str, int], look: ArmStyle) -> None:
    """Similarity over the later snapshot's step: the mean of several seeds and their range."""
    curves = [_points(_of(table, *setting), "step_b", "similarity") for table in tables]
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


def expert_load(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of the tokens that choose each expert, from the busiest to the idlest, one line a layer."""
    tables = [(result, _ranked(result)) for result in results if has_table(result, "load")]
    layers = max((len(set(table["layer"])) for _, table in tables), default=0)
    colours = layer_colours(layers)

    def draw(panel: Axes, runs: list[RunResult], style: ArmStyle) -> None:
        own, moe = _of_runs(tables, runs), runs[0].config.moe
        for layer in sorted(set(own[0]["layer"])):
            curves = [_points(table[table["layer"] == layer], "rank", "load") for table in own]
            draw_band(panel, over_seeds(curves), ArmStyle(colours[layer], "-"), linewidth=1.3, marker="o", markersize=2)
        panel.axhline(moe.top_k / moe.experts, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            _dead(own), (1, 1), xycoords="axes fraction", xytext=(-4, -4), textcoords="offset points",
            ha="right", va="top", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip

    able = [result for result, _ in tables]
    figure, panels = arm_panels(results, able, draw, "expert, busiest first", NO_EXPERTS)
    if panels:
        panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("fraction of tokens")
        layer_bar(figure, panels, layers)
        figure.legend(handles=[key("even load, k / E")], loc="outside upper center")
    return figure, joined(tables, LOAD_COLUMNS)


def routing(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of the oracle's activation mass over k: the mean over layers, and the range over them."""
    tables = [(result, _routes(result)) for result in results if has_table(result, "routing")]

    def draw(panel: Axes, runs: list[RunResult], style: ArmStyle) -> None:
        by_k = pd.concat(_of_runs(tables, runs)).groupby("top_k")
        recall, k = by_k["recall"].mean(), runs[0].config.moe.top_k
        low, high = by_k["recall"].min(), by_k["recall"].max()
        panel.fill_between(recall.index, low, high, color=style.colour, alpha=0.2, lw=0)
        panel.plot(recall.index, recall, color=style.colour, marker="o", markersize=3.5)
        ring(panel, k, recall[k], style.colour)
        panel.plot(recall.index, by_k["chance"].mean(), color="black", linestyle="--", linewidth=1)

    label = "experts chosen for a token, k"
    figure, panels = arm_panels(results, [result for result, _ in tables], draw, label, NO_EXPERTS)
    if panels:
        axis_of_experts(panels[0], {int(k) for _, table in tables for k in table["top_k"]}, panels[0].get_xlabel())
        panels[0].set_ylim(0, 1.04)
        panels[0].set_ylabel("fraction of the oracle's mass")
        own_k = key("the arm's own k", color=GREY, marker="o", markersize=9, markerfacecolor="none", lw=0)
        figure.legend(handles=[own_k, key("experts chosen at random")], loc="outside upper center", ncols=2)
    return figure, joined(tables, ROUTING_COLUMNS)


def _ranked(result: RunResult) -> pd.DataFrame:
    """The load of a run's experts with their rank in the layer, 1 for the busiest."""
    table = read_table(result, "load").astype({"layer": int})
    table = table.sort_values(["layer", "load", "expert"], ascending=[True, False, True])
    moe = result.config.moe
    return table.assign(rank=table.groupby("layer").cumcount() + 1, even_load=moe.top_k / moe.experts)


def _routes(result: RunResult) -> pd.DataFrame:
    """The routing of a run, and what fraction of the oracle's mass k experts chosen at random hold on average."""
    table = read_table(result, "routing").astype({"layer": int})
    return table.assign(chance=table["top_k"] / result.config.moe.experts / table["oracle_share"])


def _points(table: pd.DataFrame, x: str, y: str) -> Points:
    return [(int(at), float(value)) for at, value in zip(table[x], table[y], strict=True)]


def _dead(tables: Sequence[pd.DataFrame]) -> str:
    """How many experts no token chose, over all layers; the range over seeds."""
    counts = [int((table["load"] == 0).sum()) for table in tables]
    low, high = min(counts), max(counts)
    if high == 0:
        return "no dead expert"
    return f"{low if low == high else f'{low} to {high}'} of {len(tables[0])} experts dead"
