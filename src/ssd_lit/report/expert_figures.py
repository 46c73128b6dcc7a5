"""What the experts of the final models do: how evenly they are used, and how well they are chosen."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from ssd_lit.report.analyses import has_table, joined, read_table
from ssd_lit.report.curves import draw_band, over_seeds
from ssd_lit.report.panels import arm_panels, empty_figure, layer_bar, layer_colours
from ssd_lit.report.runs import Points, RunResult, by_arm
from ssd_lit.report.style import GREY, ArmStyle, arm_styles
from ssd_lit.report.view import MOST_PANELS, select_arms, tell_left_out

LOAD_COLUMNS = ["layer", "rank", "expert", "load", "even_load"]
ROUTING_COLUMNS = ["layer", "top_k", "chosen_share", "oracle_share", "recall", "chance"]
NOTHING = "no run to draw here has experts to watch"


def expert_load(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of the tokens that choose each expert, from the busiest to the idlest, one line a layer."""
    tables = [(result, _ranked(result)) for result in results if has_table(result, "load")]
    able = [result for result, _ in tables]
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(NOTHING), joined(tables, LOAD_COLUMNS)
    figure, panels = arm_panels(shown, arm_styles(results), "expert, busiest first")
    layers = max(len(set(table["layer"])) for _, table in tables)
    colours = layer_colours(layers)
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        mine = [table for result, table in tables if result.arm == arm]
        for layer in sorted(set(mine[0]["layer"])):
            curves = [_points(table[table["layer"] == layer], "rank", "load") for table in mine]
            draw_band(panel, over_seeds(curves), ArmStyle(colours[layer], "-"), linewidth=1.3, marker="o", markersize=2)
        moe = runs[0].config.moe
        panel.axhline(moe.top_k / moe.experts, color="black", linestyle="--", linewidth=1)
        panel.annotate(
            _dead(mine), (1, 1), xycoords="axes fraction", xytext=(-4, -4), textcoords="offset points",
            ha="right", va="top", fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    panels[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("share of tokens")
    layer_bar(figure, panels, layers)
    even = Line2D([], [], color="black", linestyle="--", linewidth=1, label="even load, k / E")
    figure.legend(handles=[even], loc="outside upper center")
    tell_left_out(figure, able, shown)
    return figure, joined(tables, LOAD_COLUMNS)


def routing(results: Sequence[RunResult]) -> tuple[Figure, pd.DataFrame]:
    """Fraction of the oracle's activation mass over k: the mean over layers, and the range over them."""
    tables = [(result, _routes(result)) for result in results if has_table(result, "routing")]
    able = [result for result, _ in tables]
    shown = select_arms(able, MOST_PANELS)
    if not shown:
        return empty_figure(NOTHING), joined(tables, ROUTING_COLUMNS)
    styles = arm_styles(results)
    figure, panels = arm_panels(shown, styles, "experts chosen for a token, k")
    for panel, (arm, runs) in zip(panels, by_arm(shown).items(), strict=True):
        mine = pd.concat([table for result, table in tables if result.arm == arm])
        by_k = mine.groupby("top_k")
        recall, colour, k = by_k["recall"].mean(), styles[arm].colour, runs[0].config.moe.top_k
        panel.fill_between(recall.index, by_k["recall"].min(), by_k["recall"].max(), color=colour, alpha=0.2, lw=0)
        panel.plot(recall.index, recall, color=colour, marker="o", markersize=3.5)
        panel.plot(k, recall[k], marker="o", markersize=9, markerfacecolor="none", color=colour)
        panel.plot(recall.index, by_k["chance"].mean(), color="black", linestyle="--", linewidth=1)
    ks = sorted({int(k) for _, table in tables for k in table["top_k"]})
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(ks, [str(k) for k in ks])
    panels[0].xaxis.set_minor_locator(NullLocator())
    panels[0].set_ylim(0, 1.04)
    panels[0].set_ylabel("share of the oracle's mass")
    chance = Line2D([], [], color="black", linestyle="--", linewidth=1, label="experts chosen at random")
    ring = Line2D([], [], color=GREY, marker="o", markersize=9, markerfacecolor="none", lw=0, label="the arm's own k")
    figure.legend(handles=[ring, chance], loc="outside upper center", ncols=2)
    tell_left_out(figure, able, shown)
    return figure, joined(tables, ROUTING_COLUMNS)


def _ranked(result: RunResult) -> pd.DataFrame:
    """The load of a run's experts with their rank in the layer, 1 for the busiest."""
    table = read_table(result, "load").astype({"layer": int})
    table = table.sort_values(["layer", "load", "expert"], ascending=[True, False, True])
    moe = result.config.moe
    return table.assign(rank=table.groupby("layer").cumcount() + 1, even_load=moe.top_k / moe.experts)


def _routes(result: RunResult) -> pd.DataFrame:
    """The routing of a run, and what share of the oracle's mass k experts chosen at random hold on average."""
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
