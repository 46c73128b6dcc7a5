"""Passwords and permissions on a server with accounts: what is told, what goes on, and where no password may appear."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from ssd_lit.cli import main
from ssd_lit.tracking.metrics_log import read_metrics
from tests.conftest import Bench
from tests.tracking_server.conftest import PASSWORDS, Person
from tests.tracking_server.recorded import active_runs, assert_recorded_once
from tests.tracking_server.servers import MlflowServer, Servers

pytestmark = [pytest.mark.whole_run, pytest.mark.tracking_server]

WRONG = "user or password missing or wrong; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
FORBIDDEN = "this user has no permission there; the experiment's owner or an administrator can grant EDIT"


def lines_about_mlflow(told: str) -> list[str]:
    return [line for line in told.splitlines() if "MLflow at " in line]


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


@pytest.mark.parametrize("password", ["not-the-password", ""])
def test_a_password_that_is_wrong_or_missing_is_told_in_a_line_and_training_goes_on(
    password: str, bench: Bench, person: Person, servers: Servers, server: MlflowServer,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    person.uses(server, "ann", password)
    run = bench.dir("ssd")
    process = person.train(run, "--until", "warmup")
    _, told = process.communicate()
    assert process.returncode == 0, told
    assert lines_about_mlflow(told) == [f"MLflow at {server.uri}: {WRONG}; points wait in files until it takes them"]
    assert f"ssd-lit send {run}" in told
    assert not password or password not in told
    assert read_metrics(run / "metrics.jsonl")["train/loss"]
    assert main(["send", str(run)]) == 1
    (line,) = lines_about_mlflow(capfd.readouterr().err)
    assert line.endswith(f"MLflow at {server.uri}: {WRONG}")
    person.uses(server, "ann")
    bench.stage("send", run)
    assert_recorded_once(bench, server, servers.postgres)


@pytest.mark.parametrize("accepted", [True, False])
def test_a_password_in_the_uri_is_written_nowhere(
    accepted: bool, bench: Bench, person: Person, servers: Servers, server: MlflowServer,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    password = PASSWORDS["ann"] if accepted else "not-the-password"
    person.uses_uri(server.uri.replace("://", f"://ann:{password}@"))
    experiment = bench.dir("ssd").parent.parent
    process = person.train(bench.dir("ssd"))
    _, told = process.communicate()
    assert process.returncode == 0, told
    for stage in ("summarise", "figures", "report"):
        bench.stage(stage, experiment)
    bench.stage("store", bench.results)
    assert main(["send", str(experiment)]) == (0 if accepted else 1)
    assert password not in told + "".join(capfd.readouterr())
    assert files_with(password, bench.results) == []
    assert password not in servers.postgres.dump(server.database)
    person.uses(server)
    bench.stage("send", experiment)
    assert "ssd-seed0" in {found.info.run_name for found in active_runs(bench)}


def test_somebody_without_permission_is_told_so_and_may_send_once_it_is_granted(
    bench: Bench, person: Person, servers: Servers, server: MlflowServer, capfd: pytest.CaptureFixture[str]
) -> None:
    person.uses(server, "ann")
    experiment_id = MlflowClient().create_experiment(bench.runs["ssd"].experiment)
    person.uses(server, "bob")
    run = bench.dir("ssd")
    process = person.train(run, "--until", "sparse_phases")
    _, told = process.communicate()
    assert process.returncode == 0, told
    expected = f"MLflow at {server.uri}: {FORBIDDEN}"
    assert lines_about_mlflow(told) == [f"{expected}; points wait in files until it takes them"]
    assert main(["send", str(run)]) == 1
    (line,) = lines_about_mlflow(capfd.readouterr().err)
    assert line.endswith(expected)
    server.grant("bob", experiment_id, "EDIT")
    bench.stage("send", run)
    old = assert_recorded_once(bench, server, servers.postgres)

    # A run that is trained anew replaces the old one, which whoever may only edit cannot delete.
    bench.stage("train", run, "--from", "sparse_phases", "--until", "sparse_phases")
    bench.stage("send", run)
    left = {found.info.run_id: found.data.tags.get("superseded_by") for found in active_runs(bench)}
    (new,) = left.keys() - {old.info.run_id}
    assert left == {old.info.run_id: new, new: None}
