"""Runs recorded by a real tracking server: MLflow with accounts, on PostgreSQL and an S3 store.

What holds of the sqlite store holds of this one: one MLflow run for each run and every point once, whatever is killed.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ssd_lit.cli import main
from ssd_lit.config import load_experiment
from ssd_lit.support.files import read_json
from ssd_lit.support.signals import STATUS
from ssd_lit.tracking.client import RunTracker
from ssd_lit.tracking.delivery import send_runs
from tests.conftest import Bench
from tests.tracking_server.conftest import Person
from tests.tracking_server.recorded import active_runs, assert_recorded_once, has_sent_points, report_of, wait_for
from tests.tracking_server.servers import MlflowServer, Servers
from tests.workflow.running import ROOT

pytestmark = [pytest.mark.whole_run, pytest.mark.tracking_server]


def test_a_whole_run_is_recorded_once_with_its_report_in_the_bucket(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer, tmp_path: Path
) -> None:
    person.uses(server)
    run, experiment = bench.dir("ssd"), bench.dir("ssd").parent.parent
    assert person.train(run).wait() == 0
    for stage in ("summarise", "figures", "report", "send"):
        bench.stage(stage, experiment)
    report, (ssd,) = report_of(bench), active_runs(bench)
    assert report.info.status == "FINISHED"
    assert ssd.data.metrics["eval/loss_sparse"] == read_json(run / "evaluation.json")["loss_sparse"]
    assert_stored(report.info.run_id, experiment, servers, "shared", tmp_path / "downloaded")
    MlflowClient().delete_run(report.info.run_id)
    assert_recorded_once(bench, server, servers.postgres)
    assert any(name.startswith("system/") for name in ssd.data.metrics)


def assert_stored(report_id: str, experiment: Path, servers: Servers, name: str, folder: Path) -> None:
    """The report and every figure can be read through MLflow, and lie in the bucket."""
    files = {"report.html": experiment / "report.html", "summary.csv": experiment / "summary.csv"}
    files |= {f"figures/{path.name}": path for path in (experiment / "figures").glob("[!.]*")}
    assert len(files) > 2
    folder.mkdir()
    MlflowClient().download_artifacts(report_id, "", str(folder))
    (folder / "arms.json").unlink(missing_ok=True)  # made from arms.csv
    stored = {key.partition("/artifacts/")[2]: key for key in servers.objects.names() if f"/{report_id}/" in key}
    assert stored.keys() - {"arms.json"} == files.keys()
    for path, file in files.items():
        assert (folder / path).read_bytes() == file.read_bytes()
        assert stored[path].startswith(f"{name}/")
        assert servers.objects.read(stored[path]) == file.read_bytes()


def test_a_run_killed_while_it_sends_goes_on_as_the_same_run(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer
) -> None:
    person.uses(server)
    run = bench.dir("ssd")
    process = person.train(run)
    wait_for(lambda: has_sent_points(run), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = read_json(run / "mlflow.json")
    again = person.train(run)
    assert again.wait() == 0
    bench.stage("send", run)
    assert assert_recorded_once(bench, server, servers.postgres).info.run_id == before["run_id"]


def test_a_run_that_is_stopped_shows_as_killed_then_as_running_then_as_finished(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer
) -> None:
    person.uses(server)
    run = bench.dir("ssd")

    def status() -> str:
        (found,) = active_runs(bench)
        return str(found.info.status)

    process = person.train(run)
    wait_for(lambda: has_sent_points(run), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == STATUS
    bench.stage("send", run)
    assert status() == "KILLED"
    again = person.train(run)
    wait_for(lambda: status() == "RUNNING", again)
    assert again.wait() == 0
    bench.stage("send", run)
    assert_recorded_once(bench, server, servers.postgres)


@pytest.mark.parametrize("gone", ["MLflow", "PostgreSQL"])
def test_a_server_that_dies_during_training_gets_the_rest_by_send(
    gone: str, bench: Bench, person: Person, servers: Servers, server: MlflowServer, capfd: pytest.CaptureFixture[str]
) -> None:
    person.uses(server)
    run = bench.dir("ssd")
    kill: dict[str, Callable[[], None]] = {"MLflow": server.kill, "PostgreSQL": crash(servers)}
    start: dict[str, Callable[[], None]] = {"MLflow": server.start, "PostgreSQL": servers.postgres.start}
    process = person.train(run)
    wait_for(lambda: has_sent_points(run), process)
    kill[gone]()
    try:
        _, told = process.communicate()
        assert process.returncode == 0, told
        assert f"ssd-lit send {run}" in told
        assert main(["send", str(run)]) == 1
        (line,) = capfd.readouterr().err.splitlines()[-1:]
        assert f"MLflow at {server.uri}: " in line
    finally:
        start[gone]()
    bench.stage("send", run)
    assert_recorded_once(bench, server, servers.postgres)


def crash(servers: Servers) -> Callable[[], None]:
    return lambda: servers.postgres.stop(signal.SIGQUIT)


def test_files_that_the_object_store_could_not_take_are_told_and_sent_later(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    person.uses(server)
    experiment = bench.dir("ssd").parent.parent
    assert person.train(bench.dir("ssd")).wait() == 0
    bench.stage("summarise", experiment)
    bench.stage("figures", experiment)
    servers.objects.stop()
    try:
        bench.stage("report", experiment)
        told = capfd.readouterr().out
        assert "report.html cannot be stored: " in told
        assert f"`ssd-lit send {experiment}` sends the report and what else waits" in told
        assert main(["send", str(experiment)]) == 1
    finally:
        servers.objects.start()
    bench.stage("send", experiment)
    report = report_of(bench)
    assert_stored(report.info.run_id, experiment, servers, "shared", tmp_path / "downloaded")


def test_clients_may_write_files_to_the_object_store_themselves(
    bench: Bench, person: Person, servers: Servers, direct_server: MlflowServer, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    person.uses(direct_server)
    experiment = bench.dir("ssd").parent.parent
    assert person.train(bench.dir("ssd")).wait() == 0
    for stage in ("summarise", "figures", "report"):
        bench.stage(stage, experiment)
    assert "config.yaml cannot be stored: Unable to locate credentials" in capfd.readouterr().out
    for name, value in servers.objects.environment.items():
        person.patch.setenv(name, value)
    bench.stage("send", experiment)
    report = report_of(bench)
    assert_stored(report.info.run_id, experiment, servers, "direct", tmp_path / "downloaded")


def test_runs_recorded_in_the_local_store_are_sent_to_a_server_as_a_whole(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer
) -> None:
    run = bench.dir("ssd")
    bench.stage("train", run)
    bench.stage("send", run)
    person.uses(server)
    bench.stage("send", run)
    found = assert_recorded_once(bench, server, servers.postgres)
    assert found.data.metrics["eval/loss_sparse"] == read_json(run / "evaluation.json")["loss_sparse"]
    bench.stage("send", run)
    assert_recorded_once(bench, server, servers.postgres)


def _first_use(folder: Path, begin: "multiprocessing.synchronize.Barrier") -> None:
    config = load_experiment(ROOT / "configs/quick.yaml").runs()[0]
    begin.wait()
    tracker = RunTracker(folder / "run", config, folder.parent, stage="warmup", data_digest="d1", commit="abc")
    with tracker:
        tracker.log(1, {"a": 1.0})


def test_an_experiment_may_be_made_by_several_processes_of_two_machines_at_once(
    person: Person, server: MlflowServer, tmp_path: Path
) -> None:
    person.uses(server)
    context = multiprocessing.get_context("spawn")
    begin = context.Barrier(4)
    folders = [tmp_path / machine / name for machine in ("here", "there") for name in ("one", "other")]
    workers = [context.Process(target=_first_use, args=(folder, begin)) for folder in folders]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    client = MlflowClient()
    experiment = client.get_experiment_by_name("quick")
    for folder in folders:
        (folder / "run/config.yaml").touch()
        send_runs(folder.parent, [folder / "run"])
    runs = client.search_runs([experiment.experiment_id])
    runs = [found for found in runs if "mlflow.parentRunId" not in found.data.tags]
    assert [(found.data.metrics["a"], found.info.status) for found in runs] == [(1.0, "FINISHED")] * 4
