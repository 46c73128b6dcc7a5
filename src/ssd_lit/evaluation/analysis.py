"""The analyses of a run: tables of its activation pattern and of its experts."""

from pathlib import Path
from typing import Any

import pandas as pd

from ssd_lit.config import AnalysisConfig
from ssd_lit.evaluation.experts import MIN_COUNT, watch_experts
from ssd_lit.evaluation.snapshots import compare_snapshots, fitting_experts
from ssd_lit.paths import snapshots
from ssd_lit.run import Run
from ssd_lit.support.files import write_text

PATTERN = ("similarity.csv",)
EXPERTS = ("load.csv", "routing.csv", "tokens.csv")


def analyse_run(run: Run, settings: AnalysisConfig) -> dict[str, Any]:
    """Write the tables of a run into analysis/; returns analysis.json.

    It lists the tables that were written and the reasons why others were not. `pattern` holds the compared steps and
    settings, `experts` a summary of every layer's experts (null where left out).
    """
    config, folder = run.config, run.folder / "analysis"
    for name in (*PATTERN, *EXPERTS, "analysis.json"):
        (folder / name).unlink(missing_ok=True)
    missing: dict[str, str] = {}
    pattern: dict[str, Any] | None = None
    experts: dict[str, Any] | None = None

    reason = _why_no_pattern(run, settings)
    if reason is None:
        _write(folder / "similarity.csv", compare_snapshots(run, settings))
        fitting = fitting_experts(settings, config.model.d_ff)
        pattern = {
            "steps": [step for step, _ in snapshots(run.folder)],
            "constructions": list(settings.constructions),
            "experts": fitting,
            "experts_left_out": sorted(set(settings.experts) - set(fitting)),
        }
    else:
        missing |= dict.fromkeys(PATTERN, reason)

    if run.has_experts:
        watched = watch_experts(run, settings)
        for name, table in zip(EXPERTS, (watched.load, watched.routing, watched.tokens), strict=True):
            _write(folder / name, table)
        moe = config.moe
        experts = {"experts": moe.experts, "top_k": moe.top_k, "min_count": MIN_COUNT, "layers": watched.layers}
    else:
        missing |= dict.fromkeys(EXPERTS, "the final model has no sparse mode")
    written = [name for name in (*PATTERN, *EXPERTS) if name not in missing]
    return {"written": written, "left_out": missing, "pattern": pattern, "experts": experts}


def _why_no_pattern(run: Run, settings: AnalysisConfig) -> str | None:
    """Why the pattern of a run cannot be compared over time; None if it can."""
    if not run.has_dense_mode:
        return "experts that are copies of one FFN hold every neuron several times"
    if len(snapshots(run.folder)) < 2:
        return "the run has fewer than two snapshots; training.snapshot_every sets how often one is taken"
    if not fitting_experts(settings, run.config.model.d_ff):
        return f"none of analysis.experts {settings.experts} divides d_ff {run.config.model.d_ff}"
    return None


def _write(path: Path, table: pd.DataFrame) -> None:
    write_text(path, table.to_csv(index=False, lineterminator="\n"))
