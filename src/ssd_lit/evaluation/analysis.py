"""The analyses of a run: tables beside its evaluation, and what could not be looked into."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ssd_lit.config import AnalysisConfig, RunConfig
from ssd_lit.evaluation.experts import MIN_COUNT, watch_experts
from ssd_lit.evaluation.pattern import compare_snapshots, fitting_experts
from ssd_lit.files import write_text
from ssd_lit.layout import PhaseRecord, snapshots

PATTERN = ("similarity.csv",)
EXPERTS = ("load.csv", "routing.csv", "tokens.csv")


def analyse_run(
    run_dir: Path,
    config: RunConfig,
    settings: AnalysisConfig,
    chain: Sequence[PhaseRecord],
    tokens_dir: Path,
    tokenizer_dir: Path,
) -> dict[str, Any]:
    """Write the tables of a run into analysis/; returns analysis.json.

    It tells which tables were written, and why others were not; `pattern` says what the pattern was compared with,
    `experts` what the experts of each layer do (both null if left out).
    """
    folder = run_dir / "analysis"
    for name in (*PATTERN, *EXPERTS, "analysis.json"):
        (folder / name).unlink(missing_ok=True)
    missing: dict[str, str] = {}
    pattern: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None

    why = _why_no_pattern(run_dir, config, settings)
    if why is None:
        _write(folder / "similarity.csv", compare_snapshots(run_dir, config, settings, tokens_dir))
        fitting = fitting_experts(settings, config.model.d_ff)
        pattern = {
            "steps": [step for step, _ in snapshots(run_dir)],
            "constructions": list(settings.constructions),
            "experts": fitting,
            "experts_left_out": sorted(set(settings.experts) - set(fitting)),
        }
    else:
        missing |= dict.fromkeys(PATTERN, why)

    if any(record.mode == "moefy" for record in chain):
        watched = watch_experts(run_dir, config, settings, chain, tokens_dir, tokenizer_dir)
        for name, table in zip(EXPERTS, (watched.load, watched.routing, watched.tokens), strict=True):
            _write(folder / name, table)
        experts = {
            "experts": config.moe.experts,
            "top_k": config.moe.top_k,
            "min_count": MIN_COUNT,
            "layers": watched.layers,
        }
    else:
        missing |= dict.fromkeys(EXPERTS, "the final model has no sparse mode")
    written = [name for name in (*PATTERN, *EXPERTS) if name not in missing]
    return {"written": written, "left_out": missing, "pattern": pattern, "experts": experts}


def _why_no_pattern(run_dir: Path, config: RunConfig, settings: AnalysisConfig) -> str | None:
    """Why the pattern of a run cannot be compared over time; None if it can."""
    if config.method == "upcycle":
        return "experts that are copies of one FFN hold every neuron several times"
    if len(snapshots(run_dir)) < 2:
        return "the run has no two snapshots; training.snapshot_every says how often one is taken"
    if not fitting_experts(settings, config.model.d_ff):
        return f"none of analysis.experts {settings.experts} divides d_ff {config.model.d_ff}"
    return None


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
