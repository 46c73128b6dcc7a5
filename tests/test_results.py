"""The numbers in the tables of docs/results.md are those of the files under docs/data that the tables name."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest

DOCS = Path(__file__).parents[1] / "docs"
SPREAD = ["mean", "lowest", "highest"]
Values = list[float]
"""What a cell may show: of several seeds the mean, then the lowest and the highest; fewer may be shown."""
Column = Callable[[str], Values]
"""The values of a row, by its arm."""


@cache
def read(file: str) -> pd.DataFrame:
    frame = pd.read_csv(DOCS / "data" / file)
    if {"val_ppl_dense", "seed"} <= set(frame):
        frame["sparse_percent"] = 100 * frame["sparse_fraction"]
        frame["tera"] = frame["train_flops"] / 1e12
    return frame


def spread(values: pd.Series) -> Values:
    assert len(values), "no such rows"
    return [values.mean(), values.min(), values.max()] if len(values) > 1 else values.tolist()


def runs(file: str, column: str, arm: str = "{}") -> Column:
    """A column of a summary.csv over the seeds of an arm, whose name may be made of the row's."""

    def values(row: str) -> Values:
        frame = read(file.format(row))
        return spread(frame.loc[frame["arm"] == arm.format(row), column])

    return values


def flops_of_dense(file: str, arm: str = "{}") -> Column:
    """Training FLOPs in percent of those of the dense arm."""

    def values(row: str) -> Values:
        flops = read(file.format(row)).set_index("arm")["train_flops"]
        return [100 * flops[arm.format(row)] / flops["dense"]]

    return values


def measured(
    file: str, arm: str, mode: str | None, measure: str = "perplexity", text: str = "validation", scale: float = 1
) -> Values:
    """A measure in an arms.csv: its mean, lowest and highest value."""
    frame = read(file)
    of_mode = frame["mode"].isna() if mode is None else (frame["mode"] == mode) & (frame["text"] == text)
    (found,) = frame.loc[of_mode & (frame["arm"] == arm) & (frame["measure"] == measure), SPREAD].to_numpy().tolist()
    return [scale * value for value in found]


def arms(
    file: str, mode: str | None, measure: str = "perplexity", text: str = "validation", scale: float = 1
) -> Column:
    return lambda arm: measured(file, arm, mode, measure, text, scale)


def of_fraction(mode: str, fraction: float, measure: str = "over_dense_mode") -> Column:
    """A measure of frontier-arms.csv with that fraction of an arm's experts, in percent where it is relative."""

    def values(arm: str) -> Values:
        k = round(fraction * (64 if "e64" in arm else 32))
        return measured(FRONTIER, arm, f"{mode}, k {k}", measure, scale=1 if measure == "perplexity" else 100)

    return values


def totals(file: str, fraction: str = "sparse_share") -> list[Column]:
    """The fraction of sparse steps in percent, and FLOPs in 1e15."""
    return [arms(file, None, fraction, scale=100), arms(file, None, "flops", scale=1e-15)]


def by_router(k: int) -> Column:
    """Perplexity with k experts, and by how many percent that is above dense mode."""
    return lambda row: _above_dense(row, lambda frame: frame["k"] == k)


def dynamic_k() -> Column:
    """Perplexity with every expert above 0.05 of the best one's mass, and its percents above dense mode."""
    return lambda row: _above_dense(row.replace("own", "dynamic"), lambda frame: frame["threshold"] == 0.05)


def mean_fraction() -> Column:
    """The mean fraction of the experts that dynamic k takes."""

    def values(row: str) -> Values:
        frame = _of_router(row.replace("own", "dynamic"))
        return [frame.loc[frame["threshold"] == 0.05, "k"].item() / 32]

    return values


def of_choice(choice: str, k: int) -> Column:
    """Perplexity with k experts that the router of an arm chooses (own) or the oracle."""

    def values(arm: str) -> Values:
        frame = read(ROUTER)
        wanted = (frame["arm"] == arm) & (frame["choice"] == choice) & (frame["k"] == k)
        return frame.loc[wanted, "perplexity"].tolist()

    return values


def of_threshold(file: str, threshold: float, column: str, unit: float = 1) -> Column:
    """The mean k or the perplexity of dynamic k."""

    def values(arm: str) -> Values:
        frame = read(file)
        return spread(frame.loc[(frame["arm"] == arm) & (frame["threshold"] == threshold), column] / unit)

    return values


def of_thresholds(*thresholds: float) -> Column:
    """For every threshold of dynamic k the mean k and the perplexity."""
    columns = [of_threshold(ROUTER, threshold, column) for threshold in thresholds for column in ("k", "perplexity")]
    return lambda arm: [value for column in columns for value in column(arm)]


def mean_recall() -> Column:
    """The recall of the oracle's activation mass of an arm's router, mean over layers."""

    def values(arm: str) -> Values:
        frame = read("ablations/router-recall.csv")
        return [frame.loc[frame["arm"] == arm, "recall"].mean()]

    return values


def recall() -> Column:
    """The lowest and the highest recall of the oracle's activation mass among the layers."""

    def values(row: str) -> Values:
        router, choice = row.split()
        frame = read("h100/routers-recall.csv")
        found = frame.loc[frame["router"] == router, "recall"]
        return [1.0] if choice == "oracle" else [found.min(), found.max()]

    return values


def similarity(step: int) -> Column:
    """Pattern similarity of a snapshot to the one 50 steps before."""

    def values(row: str) -> Values:
        arm, construction, experts = row.split()
        frame = read("analysis-similarity.csv")
        wanted = (frame["arm"] == arm) & (frame["construction"] == construction) & (frame["experts"] == int(experts))
        return frame.loc[wanted & (frame["step_b"] == step), "similarity"].tolist()

    return values


def _of_router(row: str) -> pd.DataFrame:
    router, choice = row.split()
    frame = read("h100/routers-router_over_k.csv")
    return frame[(frame["router"] == router) & (frame["choice"] == choice)]


def _above_dense(row: str, which: Callable[[pd.DataFrame], pd.Series]) -> Values:
    dense = _of_router("center own").query("k == 32")["perplexity"].item()
    frame = _of_router(row)
    perplexity = frame.loc[which(frame), "perplexity"].item()
    return [perplexity, 100 * (perplexity / dense - 1)]


def over(mode: str, measure: str, other: str | None = None) -> Column:
    """How far an arm, or another of its experiment, is above what the measure says, in percent."""

    def values(row: str) -> Values:
        experiment, arm = row.split()
        return measured(f"h100/{experiment}-arms.csv", other or arm, mode, measure, scale=100)

    return values


def flops_of_dense_against(row: str) -> Values:
    """Training FLOPs of an experiment's dense arm over those of another."""
    experiment, arm = row.split()
    dense, other = (measured(f"h100/{experiment}-arms.csv", name, None, "flops")[0] for name in ("dense", arm))
    return [dense / other]


def blimp(file: str, mode: str) -> Column:
    """Mean accuracy over the sets in percent, of every seed."""

    def values(row: str) -> Values:
        frame = read(file)
        frame = frame[(frame["arm"] == row) & (frame["mode"] == mode)]
        return (100 * frame.groupby("seed")["accuracy"].mean()).tolist()

    return values


def glue(task: str, score: str) -> Column:
    """A score of a task in percent, over the seeds of fine-tuning."""

    def values(row: str) -> Values:
        frame = read("h100/bert-downstream.csv")
        arm, mode = row.split()
        return spread(100 * frame.loc[(frame["arm"] == arm) & (frame["mode"] == mode) & (frame["task"] == task), score])

    return values


class Table(NamedTuple):
    rows: Sequence[str] | str
    """The arm of every row, "" for one that no file holds; or a pattern, made of the row's first cell."""
    columns: Sequence[Column | None]
    """Of every column behind the labels; None for one that no file holds."""
    labels: int = 1


def modes(file: str, ks: Sequence[int]) -> list[Column]:
    return [arms(file, "dense"), *(arms(file, f"sparse, k {k}") for k in ks)]


def gaps(file: str) -> list[Column]:
    """What was spent, each mode, and how far it is above dense training or dense mode."""
    return [
        arms(file, None, "sparse_fraction", scale=100), arms(file, None, "flops", scale=1e-12),
        arms(file, "dense"), arms(file, "dense", "over_dense_arm", scale=100),
        arms(file, "sparse, k 4"), arms(file, "sparse, k 4", "over_dense_mode", scale=100),
    ]  # fmt: skip


def of_training(file: str, measure: str = "perplexity", scale: float = 1, **ks: int) -> Column:
    """A measure of sparse mode with the k of an arm's last sparse step, 4 if not told."""
    return lambda arm: measured(file, arm, f"sparse, k {ks.get(arm, 4)}", measure, scale=scale)


def wikitext2(file: str, ks: Sequence[int]) -> list[Column]:
    return [arms(file, mode, text="wikitext2") for mode in ("dense", *(f"sparse, k {k}" for k in ks))]


def grid(name: str, arm: str) -> Table:
    file = f"ablations/{name}.csv"
    columns = [runs(file, column) for column in ("val_ppl_dense", "val_ppl_sparse", "active_neurons")]
    return Table(arm, [runs(file, "sparse_percent"), flops_of_dense(file), *columns])


def medium(name: str, *ssd: str) -> Table:
    file, routers = f"{name}-arms.csv", f"{name}-router_over_k.csv"
    return Table(
        ["dense", *ssd],
        [
            *totals(file, "sparse_fraction"),
            *modes(file, KS),
            of_threshold(routers, 0.05, "k", 32),
            of_threshold(routers, 0.05, "perplexity"),
            *wikitext2(file, (8,)),
            *(blimp(f"{name}-downstream.csv", mode) for mode in ("dense", "sparse")),
        ],
    )


MAIN, FRONTIER, BERT = "h100/main-arms.csv", "h100/frontier-arms.csv", "h100/bert-arms.csv"
SMALL, FINE, T5 = "h100/gpt124m-arms.csv", "h100/gpt124m_fine-arms.csv", "h100/t5-arms.csv"
TIME, OF_TIME = "h100/gpt124m_time-arms.csv", "h100/gpt124m_time-router_over_k.csv"
LARGE = "h100/gpt1b_time-arms.csv"
RIVALS, OF_RIVALS = "h100/gpt124m_rivals-arms.csv", "h100/gpt124m_rivals-router_over_k.csv"
MIXED, OF_MIXED = "h100/interleaved-arms.csv", "h100/interleaved-router_over_k.csv"
LEVERS, INTERLEAVED, OF_K = "levers-arms.csv", "interleaved-arms.csv", "k_of_training-arms.csv"
MIXED_END = "mixed_end-arms.csv"
SHARE = "share.sparse_share_"
DEFAULT = "default-seeds-summary.csv"
KS = (6, 8, 12)
ROUTERS = ("none", "centers", "mass_mlp", "norm_mlp")
ROUTER = "ablations/router-router_over_k.csv"

TABLES = {
    "All models": Table(
        ["main ssd", "gpt124m ssd", "gpt350m_time ssd", "gpt350m_time_seed1 ssd_k8", "gpt1b_time ssd",
         "gpt1b_time ssd_k8", "t5 ssd", "bert ssd", "bert routed"],
        [
            None, flops_of_dense_against, over("dense", "over_dense_arm"), over("sparse, k 8", "over_dense_mode"),
            over("sparse, k 8", "over_dense_mode", "posthoc"), None,
        ],
    ),
    "Methods, three seeds": Table(
        ["dense", "ssd", "ssd_fixed", "dense_stopped", "dense_smaller", "sparse_gate", "sparse_centers", "smoe_dropout",
         "from_dense", "upcycled", "posthoc", "posthoc_mass", "posthoc_norm", "ssd_mass"],
        [runs("methods-summary.csv", column) for column in (
            "sparse_percent", "tera", "val_loss_dense", "val_ppl_dense", "val_loss_sparse", "val_ppl_sparse"
        )],
    ),
    "Levers on the gap, three seeds": Table(
        ["dense", "ssd", "ssd_all8", "ssd_all4", "ssd_fewer", "ssd_falling"],
        gaps(LEVERS),
    ),
    "More sparse steps, and dense ones among them": Table(
        ["dense", "phases45", "phases72", "phases72_all3", "phases83_all4", "phases83_all8"],
        gaps(INTERLEAVED),
    ),
    "More experts a token": Table(
        ["dense", "k4", "k6", "k8", "rising"],
        [
            *gaps(OF_K)[:4], of_training(OF_K, k6=6, k8=8, rising=8),
            of_training(OF_K, "over_dense_mode", 100, k6=6, k8=8, rising=8), arms(OF_K, "sparse, k 4"),
        ],
    ),
    "Sparse steps among the last dense ones": Table(
        ["dense", "none", "every4", "every2", "every2_k8"],
        [
            *gaps(MIXED_END)[:4], of_training(MIXED_END, every2_k8=8),
            of_training(MIXED_END, "over_dense_mode", 100, every2_k8=8),
        ],
    ),
    "25 M parameters, 151 M tokens": Table(
        ["dense", "ssd", "ssd_fixed", "sparse_gate", "smoe_dropout", "posthoc", "dense_stopped", "dense_smaller"],
        [*totals(MAIN), *modes(MAIN, KS), *wikitext2(MAIN, KS)],
    ),
    "Quality against the sparse fraction": Table(
        ["dense", *(f"{SHARE}{share}" for share in (0.25, 0.5, 0.7, 0.85)), "final10", "e64", "e64_final10",
         "dense_relu2", "relu2_e64_final10"],
        [
            *totals(FRONTIER), arms(FRONTIER, "dense"), arms(FRONTIER, "dense", "over_dense_arm", scale=100),
            of_fraction("sparse", 0.25, "perplexity"), of_fraction("sparse", 0.25), of_fraction("sparse", 0.375),
            of_fraction("oracle", 0.25), runs("h100/frontier-summary.csv", "active_neurons"),
        ],
    ),
    "Dense steps among the sparse ones": Table(
        ["dense", "all3", "routed3"],
        [
            *totals(MIXED, "sparse_fraction"), arms(MIXED, "dense"), arms(MIXED, "dense", "over_dense_arm", scale=100),
            arms(MIXED, "sparse, k 8"), arms(MIXED, "sparse, k 8", "over_dense_mode", scale=100),
            arms(MIXED, "sparse, k 12"), of_threshold(OF_MIXED, 0.05, "k", 32),
            of_threshold(OF_MIXED, 0.05, "perplexity"),
        ],
    ),
    "What chooses the experts": Table(
        ["center own", "direction own", "mass own", "center oracle"],
        [recall(), *(by_router(k) for k in KS), mean_fraction(), dynamic_k()],
    ),
    "GPT-2 small, 203 M tokens": Table(
        ["dense", "ssd", "posthoc"],
        [*totals(SMALL), *modes(SMALL, (*KS, 16)), *wikitext2(SMALL, (8,)),
         *(blimp("h100/gpt124m-downstream.csv", mode) for mode in ("dense", "sparse"))],
    ),
    "GPT-2 small, 203 M tokens, 2": Table(
        ["ssd"],
        [*totals(FINE), *modes(FINE, (9, 12, 18, 24)), *wikitext2(FINE, (12,)),
         *(blimp("h100/gpt124m_fine-downstream.csv", mode) for mode in ("dense", "sparse"))],
    ),
    "Time to dense training's loss, and a trained router": Table(
        ["dense", "ssd", "routed"],
        [*totals(TIME, "sparse_fraction"), *modes(TIME, (9, 12, 18)), of_threshold(OF_TIME, 0.05, "k", 48),
         of_threshold(OF_TIME, 0.05, "perplexity"), *wikitext2(TIME, (12,))],
    ),
    "GPT-2 medium, 246 M tokens": medium("h100/gpt350m_time", "ssd", "routed"),
    "GPT-2 medium, 246 M tokens, 2": medium("h100/gpt350m_time_seed1", "ssd_k8", "routed_k8"),
    "Rivals for the same seconds": Table(
        ["dense", "ssd", "routed", "sparse_gate", "smoe_dropout"],
        [runs("h100/gpt124m_rivals-summary.csv", "steps"), arms(RIVALS, None, "seconds"),
         arms(RIVALS, None, "flops", scale=1e-15), *modes(RIVALS, KS), of_threshold(OF_RIVALS, 0.05, "k", 32),
         of_threshold(OF_RIVALS, 0.05, "perplexity")],
    ),
    "The 1.3 B shape, 62 M tokens": Table(
        ["dense", "ssd", "ssd_k8"], [*totals(LARGE, "sparse_fraction"), *modes(LARGE, KS), *wikitext2(LARGE, (8,))]
    ),
    "T5, 102 M tokens": Table(["dense", "ssd", "posthoc"], [*totals(T5), *modes(T5, KS)]),
    "BERT, 151 M tokens": Table(
        ["dense", "ssd", "routed", "posthoc"],
        [*totals(BERT), *modes(BERT, KS), arms(BERT, "oracle, k 8"), *wikitext2(BERT, (8,))],
    ),
    "BERT, 151 M tokens, 2": Table(
        ["", "dense dense", "ssd dense", "ssd dense_to_sparse", "ssd sparse"],
        [glue("sst2", "accuracy"), glue("mrpc", "accuracy"), glue("mrpc", "f1"), glue("rte", "accuracy"),
         glue("stsb", "pearson"), glue("stsb", "spearman")],
        labels=3,
    ),
    "Families, one seed": Table(
        ["bert", "t5", "llama", "swiglu"],
        [
            runs("{}-summary.csv", "val_loss_dense", "dense"),
            *(runs("{}-summary.csv", f"val_loss_{mode}", "ssd") for mode in ("dense", "sparse")),
            runs("{}-summary.csv", "val_loss_sparse", "posthoc"), flops_of_dense("{}-summary.csv", "ssd"),
            runs("{}-summary.csv", "active_neurons", "dense"),
        ],
    ),
    "Threshold of stability, tau": grid("tau", "ssd.tau_{}"),
    "Fraction of sparse steps, r": grid("sparse_fraction", "ssd.sparse_fraction_{}"),
    "Cycle length": grid("cycle_length", "ssd.sparse_steps_{}"),
    "Last dense phase": grid("final_dense", "ssd.final_dense_steps_{}"),
    "First dense phase": grid("warmup", "ssd.warmup_max_steps_{}"),
    "Number of experts, at k/E = 0.25": grid("experts", "ssd.experts_{}"),
    "Experts a token, k of 16": grid("top_k", "ssd.top_k_{}"),
    "Adam's moments at MoEfication": grid("optimizer_state", "ssd.permute_optimizer_{}"),
    "Expert construction": Table(
        "{}",
        [runs("ablations/construction.csv", f"val_ppl_{mode}", f"{arm}.construction_{{}}")
         for arm, mode in (("ssd", "dense"), ("ssd", "sparse"), ("posthoc", "sparse"))],
    ),
    "Router": Table(
        [
            *(f"ssd_routed.posthoc_router_{router}" for router in ROUTERS), "ssd_random",
            *(f"posthoc.posthoc_router_{router}" for router in ROUTERS), "posthoc_random",
        ],
        [
            mean_recall(), *(of_choice(choice, k) for choice in ("own", "oracle") for k in (2, 4, 8)),
            of_thresholds(0.2, 0.4),
        ],
    ),
    "Activation": Table(
        "{}",
        [runs("ablations/activation.csv", column, f"{arm}.activation_{{}}") for arm, column in (
            ("dense", "val_ppl_dense"), ("ssd", "val_ppl_dense"), ("ssd", "val_ppl_sparse"),
            ("dense", "active_neurons"), ("ssd", "active_neurons"))],
    ),
    "Analyses, one seed": Table(
        [
            *(f"dense kmeans {n}" for n in (8, 16, 32)),
            *(f"dense {name} 16" for name in ("kmeans_activations", "coactivation", "random")),
            *(f"ssd kmeans {n}" for n in (8, 16, 32)),
        ],
        [similarity(step) for step in range(100, 401, 50)],
    ),
    "Three seeds": Table(
        ["dense", "ssd", "sparse", "posthoc"],
        [runs(DEFAULT, column) for column in (
            "sparse_percent", "tera", "val_ppl_dense", "val_ppl_sparse")],
    ),
}  # fmt: skip

NOT_OF_FILES = {
    "What ran": "commands and machines",
    "BERT, 151 M tokens, 3": "of two sizes of summary and of curves",
    "Beside the paper's claims": "text",
    "A pretrained checkpoint, MoEfied": "of benchmarks/results/pretrained.json",
}
"""Tables that no CSV is named for, and what they are."""


def tables(page: str) -> dict[str, list[list[str]]]:
    """The cells of every table, without its head, by its heading; the second under a heading has ", 2" behind it."""
    found: dict[str, list[list[str]]] = {}
    heading, inside = "", False
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            if not inside:
                number = sum(
                    name == heading or (name.startswith(f"{heading}, ") and name[-1].isdigit()) for name in found
                )
                rows = found.setdefault(heading if not number else f"{heading}, {number + 1}", [])
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        inside = line.startswith("|")
    return {name: rows[2:] for name, rows in found.items()}


FOUND = tables((DOCS / "results.md").read_text("utf-8"))


def test_every_table_is_compared_or_of_no_file():
    assert set(FOUND) == set(TABLES) | set(NOT_OF_FILES)


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_those_of_the_files(name):
    table, rows = TABLES[name], FOUND[name]
    keys = [table.rows.format(row[0]) for row in rows] if isinstance(table.rows, str) else table.rows
    assert len(keys) == len(rows)
    wrong = []
    for key, row in zip(keys, rows, strict=True):
        for column, cell in zip(table.columns, row[table.labels :], strict=True):
            printed = re.findall(r"-?\d[\d,]*(?:\.\d+)?", cell)
            if key and column is not None and printed:
                values = column(key)
                wrong += [f"{row[0]}: {cell!r}, file {values}"] * (not all(map(rounds_to, values, printed)))
    assert not wrong


def rounds_to(value: float, printed: str) -> bool:
    """Whether the value, rounded to as many digits as are printed, is what is printed."""
    digits = len(printed.partition(".")[2])
    # Half a unit of the last digit, for a value halfway between two.
    return abs(value - float(printed.replace(",", ""))) <= 0.5 * 10**-digits * (1 + 1e-6)


def test_a_wrong_digit_is_seen():
    assert rounds_to(58.734, "58.73")
    assert not rounds_to(58.734, "58.74")
    assert rounds_to(1651.2, "1,651")
