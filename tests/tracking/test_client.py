"""MLflow through a real store: one run for each run, every point once, whatever happens."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient, set_tracking_uri

from ssd_lit.config import RunConfig, dump, load_experiment
from ssd_lit.support.files import write_text
from ssd_lit.tracking.client import RunTracker
from ssd_lit.tracking.delivery import send_report, send_runs, try_for
from ssd_lit.tracking.spool import Spool
from ssd_lit.tracking.store import ensure_store, masked, store_name, tracking_uri
from tests.conftest import empty_store
from tests.faulty_server import FaultyServer
from tests.forked import SERVER

pytestmark = pytest.mark.whole_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("results")
    ensure_store(results)
    return results


def run_config() -> RunConfig:
    return load_experiment(ROOT / "configs/quick.yaml").runs()[0]


def tracker(run_dir: Path, results: Path, stage: str = "warmup", resume_step: int | None = None) -> RunTracker:
    return RunTracker(
        run_dir, run_config(), results, stage=stage, data_digest="d1", commit="abc", resume_step=resume_step
    )


def history(results: Path, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in MlflowClient(tracking_uri(results)).get_metric_history(run_id, name))


def active_runs(results: Path, run_dir: Path) -> list[str]:
    """Ids of the runs, children left out, that carry the key of that folder."""
    key = json.loads((run_dir / "mlflow.json").read_text())["key"]
    client = MlflowClient(tracking_uri(results))
    ids = [e.experiment_id for e in client.search_experiments()]
    return [r.info.run_id for r in client.search_runs(ids, f"tags.`ssd_lit.key` = '{key}'")]


def test_stages_of_a_run_share_one_run_with_params_tags_data_and_children(store: Path, tmp_path: Path) -> None:
    for stage, steps in (("warmup", range(1, 4)), ("sparse_phases", range(4, 6))):
        with tracker(tmp_path, store, stage) as t:
            for step in steps:
                t.log(step, {"train/loss": 10.0 - step})
            t.outcome({"seconds": 2.0}, {"ended_by": "stable"})
    (run_id,) = active_runs(store, tmp_path)
    assert history(store, run_id, "train/loss") == [(s, 10.0 - s) for s in range(1, 6)]
    client = MlflowClient(tracking_uri(store))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["stage"] == "sparse_phases"
    assert run.data.tags["git_commit"] == "abc"
    assert run.data.params["model.d_ff"] == "256"
    assert [d.dataset.digest for d in run.inputs.dataset_inputs] == ["d1"]
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert sorted(c.data.tags["stage"] for c in children) == ["sparse_phases", "warmup"]
    assert {c.data.tags["ended_by"] for c in children} == {"stable"}


def test_artifacts_go_where_the_results_lie_now(tmp_path: Path) -> None:
    first, copy, moved = (tmp_path / name for name in ("first", "a copy", "moved"))
    ensure_store(first)
    report = tmp_path / "report.html"

    def sent(results: Path, text: str) -> Path:
        report.write_text(text)
        # In a process of its own: MLflow remembers where a run's artifacts were.
        process = SERVER.Process(target=send_report, args=(results, "quick", {None: [report]}))
        process.start()
        process.join()
        (found,) = (results / "mlartifacts").rglob("report.html")
        assert found.read_text() == text
        return found

    original = sent(first, "one")
    shutil.copytree(first, copy)
    sent(copy, "two")
    assert original.read_text() == "one"
    first.rename(moved)
    sent(moved, "three")
    assert not first.exists()


KILLED = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
import ssd_lit.tracking.client as tracking
tracking.SEND_SECONDS = 0.05
from tests.tracking.test_client import tracker
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
    for stage, step in (("warmup", 1), ("moefy", 1), ("sparse_phases", 2), ("evaluate", 2)):
        with tracker(tmp_path, store, stage) as t:
            t.log(step, {"train/loss": 1.0})
    with tracker(tmp_path, store, "sparse_phases", resume_step=1):
        pass
    (new,) = active_runs(store, tmp_path)
    client = MlflowClient(tracking_uri(store))
    children = client.search_runs([client.get_run(new).info.experiment_id], f"tags.`mlflow.parentRunId` = '{new}'")
    assert sorted(c.data.tags["stage"] for c in children) == ["moefy", "sparse_phases", "warmup"]


@pytest.fixture(scope="module")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyServer]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_MLFLOW_SERVER_FILE_STORE", "_MLFLOW_SERVER_ARTIFACT_ROOT"):
            patch.setenv(name, "")  # given back at the end
        folder = tmp_path_factory.mktemp("server")
        ensure_store(folder)
        server = FaultyServer(folder, seconds=0.4)
        server.start()
        yield server
        server.stop()
        set_tracking_uri(None)  # MLflow's application makes its store that of the whole process


@pytest.fixture
def server(running_server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    import ssd_lit.tracking.client

    monkeypatch.setattr(ssd_lit.tracking.client, "CLOSE_SECONDS", 1.0)
    monkeypatch.setattr(ssd_lit.tracking.client, "SEND_SECONDS", 0.1)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", running_server.uri)
    yield running_server
    running_server.fault = None


STEPS = list(range(1, 500))


def train(run_dir: Path, results: Path, stage: str = "warmup") -> float:
    """A stage that logs its points; returns the seconds that it took to end."""
    write_text(run_dir / "config.yaml", dump(run_config()))
    with tracker(run_dir, results, stage) as t:
        for step in STEPS:
            t.log(step, {"train/loss": float(step)})
        t.outcome({"seconds": 2.0}, {"ended_by": "stable"}, run_step=STEPS[-1])
        began = time.monotonic()
    return time.monotonic() - began


@pytest.fixture(autouse=True)
def others() -> set[threading.Thread]:
    """The threads of earlier tests, some of which play stages that were killed."""
    return set(threading.enumerate())


def end_of_process(others: set[threading.Thread]) -> None:
    """What is still being sent ends with the process of a stage; in a test it must come to its own end."""
    for thread in set(threading.enumerate()) - others:
        if thread.name == "mlflow":
            thread.join(60)
            assert not thread.is_alive()


def assert_all_arrived_once(run_dir: Path, results: Path, stages: int) -> None:
    (run_id,) = active_runs(results, run_dir)
    client = MlflowClient(tracking_uri(results))
    assert history(results, run_id, "train/loss") == [(s, float(s)) for s in STEPS]
    assert history(results, run_id, "seconds") == [(STEPS[-1], 2.0)]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert len(children) == stages
    assert all(c.info.status == "FINISHED" and c.data.tags["ended_by"] == "stable" for c in children)


def test_a_store_is_made_where_there_is_none_and_filled_again(tmp_path: Path, others: set[threading.Thread]) -> None:
    train(tmp_path / "run", tmp_path)
    end_of_process(others)
    send_runs(tmp_path, [tmp_path / "run"])  # on a busy machine the stage may have left it for later
    assert_all_arrived_once(tmp_path / "run", tmp_path, stages=1)
    assert send_runs(tmp_path, [tmp_path / "run"]) == 0
    other = tmp_path / "other"  # another place, since MLflow holds a file open that it read
    shutil.copytree(tmp_path / "run", other / "run")
    assert send_runs(other, [other / "run"]) == 1
    assert_all_arrived_once(other / "run", other, stages=1)
    MlflowClient(tracking_uri(other)).delete_run(active_runs(other, other / "run")[0])
    assert send_runs(other, [other / "run"]) == 0


def test_a_stage_whose_results_find_no_room_waits_for_what_is_being_sent(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: set[threading.Thread]
) -> None:
    written = threading.Event()

    def slow(spool: Spool, *_: object) -> None:
        time.sleep(0.5)
        written.set()

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Spool, "attach", slow)
    monkeypatch.setattr(Spool, "end", no_room)
    with pytest.raises(OSError, match="No space left"), tracker(tmp_path, store):
        pass
    assert written.is_set()
    assert not {thread for thread in set(threading.enumerate()) - others if thread.name == "mlflow"}


def test_versions_of_packages_can_be_asked_for_while_mlflow_is_imported(tmp_path: Path) -> None:
    """Transformers asks while it is imported, beside the thread that imports MLflow and with it importlib_metadata."""
    code = f"""
import sys
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.metadata import version
from pathlib import Path

from ssd_lit.config import load_experiment
from ssd_lit.tracking.client import RunTracker

class Slow(SourceFileLoader):
    def get_code(self, name):
        last = b"\\nclass PathDistribution"
        source = self.get_data(self.path).replace(last, b"\\n__import__('time').sleep(0.3)" + last)
        return self.source_to_code(source, self.path)

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "importlib_metadata":
            spec = PathFinder.find_spec(name, path)
            spec.loader = Slow(name, spec.origin)
            return spec

sys.meta_path.insert(0, Finder)
RunTracker._send_all = lambda self: __import__("importlib_metadata")
config, folder = load_experiment(Path("configs/quick.yaml")).runs()[0], Path({str(tmp_path)!r})
with RunTracker(folder / "run", config, folder, stage="warmup", data_digest="", commit="abc"):
    while not hasattr(sys.modules.get("importlib_metadata"), "PathDistribution"):
        version("numpy")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


@pytest.mark.parametrize("fault", ["refused", "500", "silent", "slow"])
def test_a_server_that_is_away_does_not_hold_a_stage_and_gets_every_point_once_it_is_back(
    fault: str,
    server: FaultyServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    others: set[threading.Thread],
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        if fault == "silent":
            other.listen()
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        if fault in ("silent", "refused"):
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{other.getsockname()[1]}")
        server.fault = fault
        took = train(tmp_path, tmp_path.parent)
    assert took < 5  # bounded by CLOSE_SECONDS, here 1
    assert f"ssd-lit send {tmp_path}" in caplog.text
    end_of_process(others)
    server.fault = None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    assert send_runs(tmp_path.parent, [tmp_path]) in ((0, 1) if fault == "slow" else (1,))
    assert_all_arrived_once(tmp_path, tmp_path.parent, stages=1)


def test_a_later_stage_brings_what_earlier_ones_could_not(
    server: FaultyServer, tmp_path: Path, others: set[threading.Thread]
) -> None:
    server.stop()
    train(tmp_path, tmp_path.parent)
    server.start()
    train(tmp_path, tmp_path.parent, "sparse_phases")
    end_of_process(others)
    send_runs(tmp_path.parent, [tmp_path])
    assert_all_arrived_once(tmp_path, tmp_path.parent, stages=2)


def test_a_server_that_comes_back_during_a_stage_gets_the_points_in_that_stage(
    server: FaultyServer, tmp_path: Path, others: set[threading.Thread]
) -> None:
    server.fault = "500"
    with tracker(tmp_path, tmp_path.parent) as t:
        t.log(1, {"train/loss": 1.0})
        asked = server.requests
        while server.requests == asked:
            time.sleep(0.05)
        server.fault = None
        while json.loads((tmp_path / "mlflow.json").read_text())["sent"] == 0:
            time.sleep(0.05)
    end_of_process(others)
    (run_id,) = active_runs(tmp_path.parent, tmp_path)
    assert history(tmp_path.parent, run_id, "train/loss") == [(1, 1.0)]


def test_answers_that_are_lost_double_neither_runs_nor_points(
    server: FaultyServer, tmp_path: Path, others: set[threading.Thread]
) -> None:
    server.fault = "lost"
    train(tmp_path, tmp_path.parent)
    end_of_process(others)
    while Spool(tmp_path).waiting(store_name()):
        with suppress(ValueError):
            send_runs(tmp_path.parent, [tmp_path])
    server.fault = None
    assert_all_arrived_once(tmp_path, tmp_path.parent, stages=1)


def test_another_store_gets_all_of_a_run_once(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: set[threading.Thread]
) -> None:
    train(tmp_path, store)
    end_of_process(others)
    send_runs(store, [tmp_path])
    (tmp_path / "other.db").write_bytes(empty_store())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'other.db'}")
    assert send_runs(store, [tmp_path]) == 1
    assert_all_arrived_once(tmp_path, store, stages=1)
    assert send_runs(store, [tmp_path]) == 0


def test_sending_to_a_server_that_is_away_fails_in_one_line(
    server: FaultyServer, tmp_path: Path, others: set[threading.Thread]
) -> None:
    server.fault = "500"
    train(tmp_path, tmp_path.parent)
    end_of_process(others)
    with pytest.raises(ValueError, match="MLflow at http://127"):
        send_runs(tmp_path.parent, [tmp_path])


def test_the_report_does_not_wait_for_a_slow_server() -> None:
    asked = threading.Event()
    assert try_for(0.1, asked.wait) == "MLflow takes more than 0 s"
    asked.set()


def _first_use(results: Path, begin: "multiprocessing.synchronize.Barrier") -> None:
    folder = results / f"run{os.getpid()}"
    write_text(folder / "config.yaml", dump(run_config()))
    begin.wait()
    with tracker(folder, results) as t:
        t.log(1, {"a": 1.0})


def test_four_runs_may_start_at_once_on_a_fresh_store(tmp_path: Path) -> None:
    (tmp_path / ".mlflow.db.abc.part").touch()  # of one who was killed while making it
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(4)
    workers = [context.Process(target=_first_use, args=(tmp_path, begin)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert not list(tmp_path.glob("*.part"))
    client = MlflowClient(tracking_uri(tmp_path))
    (experiment,) = [e for e in client.search_experiments() if e.name == "quick"]
    send_runs(tmp_path, tmp_path.glob("run*"))  # on a busy machine a stage may have left its points for later
    runs = client.search_runs([experiment.experiment_id])
    runs = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert len(runs) == 4
    assert all(r.data.metrics["a"] == 1.0 for r in runs)


def test_the_report_is_kept_once(store: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>found</p>")
    for _ in range(2):
        send_report(store, "quick", {None: [tmp_path / "report.html"]})
    client = MlflowClient(tracking_uri(store))
    (experiment,) = [e for e in client.search_experiments() if e.name == "quick"]
    (run,) = client.search_runs([experiment.experiment_id], "tags.`ssd_lit.key` = 'report'")
    assert [f.path for f in client.list_artifacts(run.info.run_id)] == ["report.html"]


def test_passwords_are_not_shown() -> None:
    assert masked("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert masked("sqlite:///a/b.db") == "sqlite:///a/b.db"
