"""summary.csv: one row a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ssd_lit.config import ModelConfig, RunConfig
from ssd_lit.report.runs import RunResult, load_results
from ssd_lit.support.files import write_text

COLUMNS = (
    "experiment", "arm", "method", "model", "seed", "steps", "tokens", "sparse_fraction", "train_flops",
    "train_seconds", "val_loss_dense", "val_loss_sparse", "val_ppl_dense", "val_ppl_sparse", "experts", "top_k",
    "active_neurons",
)  # fmt: skip


def write_summary(exp_dir: Path, runs: Sequence[RunConfig]) -> Path:
    """Write summary.csv for the finished runs; a cell that does not apply stays empty."""
    path = exp_dir / "summary.csv"
    write_text(path, _table(exp_dir, runs))
    return path


def check_summary(exp_dir: Path, runs: Sequence[RunConfig]) -> None:
    """Raise ValueError if the rows of these runs in summary.csv are not what their own files give."""
    path = exp_dir / "summary.csv"
    if not path.is_file():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    there = path.read_bytes().decode("utf-8", "replace").splitlines()
    missing = [row for row in _table(exp_dir, runs).splitlines() if row not in there]
    if missing:
        raise ValueError(f"{path}: has no row {missing[0]!r}, which the runs' files give; delete it and run again")


def _table(exp_dir: Path, runs: Sequence[RunConfig]) -> str:
    rows = [summary_row(result) for result in load_results(exp_dir, runs)]
    # Object columns keep a whole number whole where another row has none.
    return pd.DataFrame(rows, columns=list(COLUMNS), dtype=object).to_csv(index=False, lineterminator="\n")


def summary_row(result: RunResult) -> dict[str, Any]:
    """One run's row; steps, tokens, FLOPs and seconds include those of the run it started from."""
    config, total, evaluation = result.config, result.total, result.evaluation
    has_experts = config.method != "dense"
    return {
        "experiment": config.experiment,
        "arm": config.arm,
        "method": config.method,
        "model": model_name(config.model),
        "seed": config.seed,
        "steps": total.steps,
        "tokens": total.tokens,
        "sparse_fraction": result.sparse_fraction,
        "train_flops": total.flops,
        "train_seconds": total.seconds,
        "val_loss_dense": evaluation.loss_dense,
        "val_loss_sparse": evaluation.loss_sparse,
        "val_ppl_dense": result.ppl_dense,
        "val_ppl_sparse": result.ppl_sparse,
        "experts": config.moe.experts if has_experts else None,
        "top_k": config.moe.top_k if has_experts else None,
        "active_neurons": evaluation.active_neurons,
    }


def model_name(model: ModelConfig) -> str:
    """The backbone and its shape in one word."""
    return f"{model.family}-L{model.layers}-D{model.d_model}-F{model.d_ff}"
