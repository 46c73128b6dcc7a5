"""Whether two results folders hold the same outcome of one experiment, but for what a clock measured."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from ssd_lit.support.files import read_json
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.tracking.store import tracking_uri
from ssd_lit.tracking.view import shown_as

TIMED = {
    "seconds",
    "train_seconds",
    *(name for clock in ("train/seconds", "train/tokens_per_second") for name in (clock, shown_as(clock))),
    "train/mfu",
    "written",
    "began",
    "ended",
}
DIGESTS = {"sha256", "weights", "size", "start", "matched"}
"""Of files that hold such figures too."""


def differences(expected: Path, got: Path, experiment: str) -> Iterator[str]:
    """What differs, a line each: data, checkpoints, records, curves, tables and what MLflow holds."""
    for file in _files(expected / "data", "*/tokens/*", "*/documents/*.parquet", "*/tokenizer/*.json"):
        if file.read_bytes() != (got / file.relative_to(expected)).read_bytes():
            yield f"{file.relative_to(expected)}: other bytes"
    for run in sorted((expected / experiment / "runs").iterdir()):
        yield from (f"{run.name}: {what}" for what in run_differences(run, got / run.relative_to(expected)))
    for table in _files(expected / experiment, "summary.csv"):
        if _table(table) != _table(got / table.relative_to(expected)):
            yield f"{table.name}: other rows"
    yield from _mlflow_differences(expected, got, experiment)
    yield from (f"{path.relative_to(got)}: left behind" for path in leftovers(got))


def leftovers(results: Path) -> list[Path]:
    """What was being written when its writer died, and nobody removed."""
    return sorted(path for path in results.rglob("*") if path.name.endswith(".part") or path.name.startswith(".work."))


def run_differences(expected: Path, got: Path) -> Iterator[str]:
    """What differs between two runs, a line each: checkpoints, records, evaluation, curves."""
    for kind in ("phases/*/phase.json", "stages/*.json", "checkpoints/*.ckpt"):
        files = [sorted(path.relative_to(run) for path in run.glob(kind)) for run in (expected, got)]
        if files[0] != files[1]:
            yield f"other {kind}"
            return
        for name in files[0]:
            read = (
                (lambda path: torch.load(path, map_location="cpu", weights_only=True))
                if name.suffix == ".ckpt"
                else read_json
            )
            yield from (f"{name}: {where}" for where in _unequal(read(expected / name), read(got / name)))
    yield from (f"evaluation.json: {x}" for x in _unequal(*(read_json(r / "evaluation.json") for r in (expected, got))))
    a, b = (read_metrics(run / "metrics.jsonl") for run in (expected, got))
    yield from (f"metrics.jsonl: {where}" for where in _unequal(a, b))
    for name, curve in b.items():
        if len(curve) != len(dict(curve)):
            yield f"metrics.jsonl: {name} has a step twice"


def _content(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True) if path.suffix == ".ckpt" else read_json(path)


def _unequal(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """The places where two nested values differ; tensors bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if key not in TIMED | DIGESTS:
                yield from _unequal(a.get(key), b.get(key), f"{where}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _unequal(x, y, f"{where}/{i}")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield where
    elif a != b:
        yield where


def _table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


def _mlflow_differences(expected: Path, got: Path, experiment: str) -> Iterator[str]:
    a, b = (_mlflow(results, experiment) for results in (expected, got))
    if sorted(a) != sorted(b):
        yield f"MLflow: runs {sorted(b)} instead of {sorted(a)}"
    for name in a.keys() & b.keys():
        yield from (f"MLflow: {name}: {where}" for where in _unequal(a[name], b[name]))


def _mlflow(results: Path, experiment: str) -> dict[str, Any]:
    """Name of each run to its status and its curves, every point as often as it is there."""
    client = MlflowClient(tracking_uri(results))
    found: dict[str, Any] = {}
    for run in client.search_runs([client.get_experiment_by_name(experiment).experiment_id]):
        name = str(run.info.run_name)
        while name in found:
            name += " (again)"
        curves = {
            metric: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric))
            for metric in run.data.metrics
            if not metric.startswith("system/")
        }
        found[name] = {"status": run.info.status, "curves": curves}
    return found


def _files(folder: Path, *patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
