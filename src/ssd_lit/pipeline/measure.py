"""The measurements of a run's final model: evaluation, analyses, downstream benchmarks."""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ssd_lit.config import load_analysis, load_downstream, load_evaluation
from ssd_lit.pipeline.tracking import tracker_of
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS
from ssd_lit.support.files import sha256, write_json_checked


class Measured(NamedTuple):
    """The result of a measurement."""

    content: dict[str, Any]
    """Content of its JSON file."""
    metrics: Mapping[str, float]
    """Metrics for MLflow, by name."""
    summary: str
    curves: Mapping[str, Sequence[tuple[int, float]]] = {}
    """Curves for MLflow over something that is no training step, by name."""
    tables: Mapping[str, Mapping[str, Sequence[Any]]] = {}
    """Tables for MLflow, by name; each maps columns to their values."""


def measure(run: Run, measurement: str) -> str:
    """Measure the final model and write the JSON file last; returns a one-line summary.

    Raises ValueError if the run is not trained to its end.
    """
    from ssd_lit.support.provenance import stage_provenance, timed

    work = {"evaluate": _evaluate, "analyse": _analyse, "downstream": _downstream}[measurement]
    began = time.time()
    last_step, inputs = run.chain()[-1].last_step, run.measured_from(measurement)
    with tracker_of(run, measurement) as tracker:
        measured = work(run)
        tracker.outcome(measured.metrics, run_step=last_step, curves=measured.curves, tables=measured.tables)
        origin = {"inputs": inputs, "provenance": timed(stage_provenance(run.config.seed, run.tokens_digest), began)}
        write_json_checked(run.folder / MEASUREMENTS[measurement][1], {**measured.content, **origin})
    if measurement == "downstream":
        shutil.rmtree(_partial_results(run), ignore_errors=True)
    return measured.summary


def _evaluate(run: Run) -> Measured:
    from ssd_lit.evaluation.evaluate import curves, evaluate_run, outcome, tables

    content = evaluate_run(run, load_evaluation(run.folder / "evaluation.yaml"))
    metrics = outcome(content)
    perplexities = {mode: metrics.get(f"eval/perplexity_{mode}") for mode in ("dense", "sparse")}
    values = [f"{mode} perplexity {value:.2f}" for mode, value in perplexities.items() if value is not None]
    return Measured(content, metrics, ", ".join(values), curves(content), tables(content))


def _analyse(run: Run) -> Measured:
    from ssd_lit.evaluation.analysis import analyse_run

    content = analyse_run(run, load_analysis(run.folder / "analysis.yaml"))
    layers = content["experts"]["layers"] if content["experts"] else []
    metrics = {
        f"analysis/{name}": sum(layer[name] for layer in layers) / len(layers)
        for name in ("load_entropy", "dead_experts", "routing_recall")
        if layers
    }
    digests = {name: sha256(run.folder / "analysis" / name) for name in content["written"]}
    left_out = "; ".join(sorted(set(content["left_out"].values())))
    summary = ", ".join(content["written"]) or f"nothing to write: {left_out}"
    return Measured({**content, "digests": digests}, metrics, summary)


def _downstream(run: Run) -> Measured:
    """After an interruption it resumes with the fine-tuning that is not done."""
    from ssd_lit.evaluation.downstream import evaluate_downstream, means

    content = evaluate_downstream(run, load_downstream(run.folder / "downstream.yaml"), _partial_results(run))
    metrics = means(content)
    values = [f"{name.removeprefix('downstream/')} {value:.3f}" for name, value in metrics.items()]
    return Measured(content, metrics, ", ".join(values) or "; ".join(content["left_out"].values()))


def _partial_results(run: Run) -> Path:
    return run.folder / "downstream" / "pieces"
