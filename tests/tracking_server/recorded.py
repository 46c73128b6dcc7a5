"""What MLflow holds of a run, against the run's own files."""

import time
from collections.abc import Callable
from pathlib import Path

from mlflow import MlflowClient
from mlflow.entities import Run as MlflowRun

from ssd_lit.support.files import read_json
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.tracking.view import shown_as
from tests.conftest import Bench
from tests.forked import Forked
from tests.tracking_server.servers import MlflowServer, Postgres


def active_runs(bench: Bench) -> list[MlflowRun]:
    """The runs of the experiment that are nobody's children, as the current user sees them."""
    return [run for run in _all_runs(bench) if "mlflow.parentRunId" not in run.data.tags]


def report_of(bench: Bench) -> MlflowRun:
    """The run that holds the experiment's report."""
    (report,) = [run for run in _all_runs(bench) if run.info.run_name == "report"]
    return report


def _all_runs(bench: Bench) -> list[MlflowRun]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(bench.runs["ssd"].experiment)
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def assert_recorded_once(bench: Bench, server: MlflowServer, postgres: Postgres) -> MlflowRun:
    """One run, all its points once, its tags, its data's digest, a child for each stage, all FINISHED."""
    (run,) = active_runs(bench)
    ours, run_id = bench.open("ssd"), run.info.run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "ssd-seed0")
    expected = {"experiment": ours.config.experiment, "arm": "ssd", "method": "ssd", "seed": "0"}
    assert expected.items() <= run.data.tags.items()
    assert run.data.tags["git_commit"]
    assert run.data.params["training.steps"] == str(ours.config.training.steps)
    assert [data.dataset.digest for data in run.inputs.dataset_inputs] == [ours.tokens_digest[:36]]

    client = MlflowClient()
    for name, curve in read_metrics(ours.folder / "metrics.jsonl").items():
        assert sorted((m.step, m.value) for m in client.get_metric_history(run_id, shown_as(name))) == curve, name
    ((rows, distinct),) = postgres.execute(
        f"SELECT count(*), count(DISTINCT (key, step)) FROM metrics WHERE run_uuid = '{run_id}' "
        "AND key NOT LIKE 'system/%'", server.database,
    )  # fmt: skip
    assert rows == distinct > 0

    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    done = {stage for stage in ours.stages if ours.is_done(stage)}
    assert sorted(child.data.tags["stage"] for child in children) == sorted(done)
    assert {child.info.status for child in children} == {"FINISHED"}
    return run


def wait_for(reached: Callable[[], bool], process: Forked) -> None:
    """Wait for something to happen in MLflow or a run's files while a process trains."""
    deadline = time.monotonic() + 120
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_sent_points(run: Path) -> bool:
    """Whether the first points of a run's training have arrived at MLflow."""
    path = run / "mlflow.json"
    return path.exists() and read_json(path)["sent"] > 0
