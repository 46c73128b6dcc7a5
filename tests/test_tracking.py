"""MLflow through a real store: one run for each run, every point once, whatever happens."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ssd_lit.config import RunConfig, load_experiment
from ssd_lit.tracking import RunTracker, ensure_store, log_report, masked, tracking_uri

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    ensure_store(results)
    return results


def run_config() -> RunConfig:
    return load_experiment(ROOT / "configs/quick.yaml").runs()[0]


def tracker(run_dir: Path, results: Path, stage: str = "00-dense", resume_step: int | None = None) -> RunTracker:
    return RunTracker(
        run_dir, run_config(), results, stage=stage, data_digest="d1", commit="abc", resume_step=resume_step
    )


def history(results: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri(results)).get_metric_history(run_id, name))


def active_runs(results: Path, run_dir: Path) -> list[str]:
    """Ids of the runs, children left out, that carry the key of that folder."""
    import json

    key = json.loads((run_dir / "mlflow.json").read_text())["key"]
    client = MlflowClient(tracking_uri(results))
    ids = [e.experiment_id for e in client.search_experiments()]
    return [r.info.run_id for r in client.search_runs(ids, f"tags.`ssd_lit.key` = '{key}'")]


def test_stages_of_a_run_share_one_run_with_params_tags_data_and_children(store: Path, tmp_path: Path) -> None:
    for stage, steps in (("00-dense", range(1, 4)), ("01-sparse", range(4, 6))):
        with tracker(tmp_path, store, stage) as t:
            for step in steps:
                t.log(step, {"train/loss": 10.0 - step})
            t.outcome({"seconds": 2.0}, {"ended_by": "stable"})
    (run_id,) = active_runs(store, tmp_path)
    assert history(store, run_id, "train/loss") == [(s, 10.0 - s) for s in range(1, 6)]
    client = MlflowClient(tracking_uri(store))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["phase"] == "01-sparse"
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.params["model.d_ff"] == "256"
    assert [d.dataset.digest for d in run.inputs.dataset_inputs] == ["d1"]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert sorted(c.data.tags["stage"] for c in children) == ["00-dense", "01-sparse"]
    assert {c.data.tags["ended_by"] for c in children} == {"stable"}


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import ssd_lit.tracking as tracking
tracking.SEND_SECONDS = 0.05
from tests.test_tracking import tracker
with tracker(Path({run!r}), Path({results!r})) as t:
    for step in range(1, 10**6):
        t.log(step, {{"train/loss": float(step)}})
        time.sleep(0.002)
"""


def test_a_run_killed_while_sending_goes_on_as_the_same_run_without_duplicates(store: Path, tmp_path: Path) -> None:
    program = KILLED.format(root=str(ROOT), run=str(tmp_path), results=str(store))
    process = subprocess.Popen([sys.executable, "-c", program])
    while '"sent": 0' in (tmp_path / "mlflow.json").read_text() if (tmp_path / "mlflow.json").exists() else True:
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with tracker(tmp_path, store) as t:
        for step in range(1, 2000):
            t.log(step, {"train/loss": float(step)})
    (run_id,) = active_runs(store, tmp_path)
    found = history(store, run_id, "train/loss")
    assert found[:1999] == [(s, float(s)) for s in range(1, 2000)]
    assert len(found) == len(set(found))


def test_steps_trained_anew_replace_the_old_run(store: Path, tmp_path: Path) -> None:
    with tracker(tmp_path, store) as t:
        for step in range(1, 6):
            t.log(step, {"train/loss": 1.0})
    (old,) = active_runs(store, tmp_path)
    with tracker(tmp_path, store, resume_step=3) as t:
        for step in (4, 5):
            t.log(step, {"train/loss": 2.0})
    (new,) = active_runs(store, tmp_path)
    assert history(store, new, "train/loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0)]
    replaced = MlflowClient(tracking_uri(store)).get_run(old)
    assert replaced.info.lifecycle_stage == "deleted"
    assert replaced.data.tags["superseded_by"] == new


def test_a_new_run_takes_over_the_stages_before_the_one_that_is_run_anew(store: Path, tmp_path: Path) -> None:
    for stage, step in (("00-dense", 1), ("01-moefy", 1), ("02-sparse", 2), ("evaluate", 2)):
        with tracker(tmp_path, store, stage) as t:
            t.log(step, {"train/loss": 1.0})
    with tracker(tmp_path, store, "02-sparse", resume_step=1):
        pass
    (new,) = active_runs(store, tmp_path)
    client = MlflowClient(tracking_uri(store))
    children = client.search_runs([client.get_run(new).info.experiment_id], f"tags.`mlflow.parentRunId` = '{new}'")
    assert sorted(c.data.tags["stage"] for c in children) == ["00-dense", "01-moefy", "02-sparse"]


@pytest.mark.parametrize("answering", [False, True], ids=["nobody listens", "a server that never answers"])
def test_with_the_server_away_points_wait_and_go_later(
    answering: bool, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ssd_lit.tracking

    monkeypatch.setattr(ssd_lit.tracking, "CLOSE_SECONDS", 2.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answering:
            server.listen()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with tracker(tmp_path, store) as t:
            for step in range(1, 500):
                t.log(step, {"train/loss": float(step)})
    for thread in threading.enumerate():
        if thread.name == "mlflow":  # a process would end here; in a test the sender must
            thread.join()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with tracker(tmp_path, store, "01-sparse"):
        pass
    (run_id,) = active_runs(store, tmp_path)
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in range(1, 500)]


def _first_use(results: Path) -> None:
    ensure_store(results)
    with tracker(results / f"run{os.getpid()}", results) as t:
        t.log(1, {"a": 1.0})


def test_processes_may_make_one_fresh_store_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_first_use, args=(tmp_path,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    client = MlflowClient(tracking_uri(tmp_path))
    (experiment,) = [e for e in client.search_experiments() if e.name == "quick"]
    runs = client.search_runs([experiment.experiment_id])
    assert len([r for r in runs if "mlflow.parentRunId" not in r.data.tags]) == 3


def test_the_report_is_kept_once(store: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>found</p>")
    for _ in range(2):
        log_report(store, "quick", [tmp_path / "report.html"])
    client = MlflowClient(tracking_uri(store))
    (experiment,) = [e for e in client.search_experiments() if e.name == "quick"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ssd_lit.key` = 'report'")
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_passwords_are_not_shown() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("sqlite:///a/b.db") == "sqlite:///a/b.db"
