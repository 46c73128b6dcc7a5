"""The workflow on a real Slurm: runs that are stopped in every way go on, nobody writes twice, Slurm tells the truth.

Each test compares all that a workflow left with what it leaves without Slurm and undisturbed.
"""

import csv
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssd_lit.records import PhaseRecord
from ssd_lit.tracking.metrics_log import read_metrics
from tests.conftest import tiny_experiment
from tests.slurm.cluster import Job, jobs, kill_node, slurm, start_node, wait_for
from tests.stress.same_results import TIMED, differences
from tests.workflow.running import ENVIRONMENT, ROOT, command, snakemake

pytestmark = [pytest.mark.slurm, pytest.mark.whole_run, pytest.mark.usefixtures("cluster")]

# Looks at the queue more often than a profile should.
SUBMIT = (
    "--workflow-profile", "workflow/profiles/slurm", "--slurm-init-seconds-before-status-checks", "2",
    "--seconds-between-status-checks", "2", "--latency-wait", "10", "--default-resources", "runtime=30", "mem_mb=2500",
)  # fmt: skip
STEPS, SHORT = 6000, 600
RUN = "tiny/runs/ssd-seed0"


def by_slurm(experiment: str | Path, results: Path, *arguments: str) -> list[str]:
    words = command(experiment, results, *SUBMIT, "--slurm-logdir", str(results / "slurm"), *arguments, jobs="runs")
    place = words.index("--cores")
    return [*words[:place], *words[place + 2 :]]


@contextmanager
def submitted(experiment: Path, results: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A workflow on Slurm at the point where its run trains; at the end none of it is left."""
    log = (results / "workflow.log").open("a")
    process = subprocess.Popen(
        by_slurm(experiment, results, str(results / "tiny/summary.csv"), *arguments),
        cwd=ROOT, env={**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1"}, stdout=log, stderr=log,
    )  # fmt: skip
    before = len(jobs("run"))
    try:
        wait_for("the run's job", lambda: process.poll() is not None or len(jobs("run")) > before)
        wait_for_steps(results)
        yield process
    finally:
        log.close()
        process.kill()
        process.wait()
        for job in jobs("run"):
            if job.JobState in ("PENDING", "RUNNING"):
                slurm("scancel", job.number)
                wait_for("a job to end", lambda job=job: job.JobState == "CANCELLED")


def wait_for_steps(results: Path) -> None:
    """Until the run has saved its state once more: it is on its way."""
    rolling = results / RUN / "work/rolling.ckpt"
    before = rolling.stat().st_mtime_ns if rolling.exists() else None
    wait_for("a checkpoint", lambda: rolling.exists() and rolling.stat().st_mtime_ns != before)


def only_job() -> Job:
    return jobs("run")[-1]


def check_end(process: subprocess.Popen[bytes], results: Path, undisturbed: Path) -> None:
    """The workflow ends well, the run went on in the middle of a phase, and all is as if nothing had been."""
    assert process.wait(timeout=300) == 0, (results / "workflow.log").read_text()[-4000:]
    records = [PhaseRecord.read(path) for path in sorted((results / RUN).glob("phases/*/phase.json"))]
    # A phase that one process began and another ended has no time at which it began.
    assert [record.mode for record in records if record.provenance["began"] is None] == ["sparse"]
    assert [*differences(undisturbed, results, "tiny")] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the tiny experiment without Slurm. Its sparse phase is long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    config = tiny_experiment(
        folder, arms={"ssd": {"method": "ssd"}},
        training={"steps": STEPS, "batch_size": 4, "log_every": 20, "validate_every": 500, "validation_blocks": 6,
                  "checkpoint_every": 50},
        switching={"switch_points": [12, STEPS - 12], "check_every": 4},
    )  # fmt: skip
    snakemake(config, folder / "results", str(folder / "results/tiny/summary.csv"), jobs="runs")
    return folder / "results"


@pytest.fixture
def results(undisturbed: Path, tmp_path: Path) -> Path:
    """A results folder with the data prepared."""
    shutil.copytree(undisturbed / "data", tmp_path / "results/data")
    return tmp_path / "results"


@pytest.fixture
def experiment(undisturbed: Path) -> Path:
    return undisturbed.parent / "tiny.yaml"


def test_the_quick_experiment_goes_through_the_queue_to_the_same_summary(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    snakemake("quick", here, str(here / "quick/summary.csv"), jobs="runs")
    done = subprocess.run(
        by_slurm("quick", there), cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert (there / "quick/report.html").exists()
    assert table(here, "quick") == table(there, "quick")
    for rule, number in {"prepare": 1, "tokenizer": 1, "encode": 1, "run": 4, "summarise": 0}.items():
        assert [job.JobState for job in jobs(rule)][-4:] == ["COMPLETED"] * number
    gpus = {job.TresPerJob for job in jobs("run")}
    assert gpus == {"gres:gpu:1"}


def table(results: Path, experiment: str) -> list[dict[str, str]]:
    """The rows of summary.csv, without times."""
    with (results / experiment / "summary.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMED} for row in csv.DictReader(file)]


def test_a_cancelled_run_stays_cancelled_and_goes_on_with_the_next_call(
    experiment: Path, results: Path, undisturbed: Path
) -> None:
    with submitted(experiment, results) as process:
        cancelled = only_job()
        slurm("scancel", cancelled.number)
        assert process.wait(timeout=120) == 1
        assert (cancelled.JobState, cancelled.Restarts) == ("CANCELLED", "0")
        assert "stopped by SIGTERM" in (results / RUN / "logs/.run.log").read_text()
    with submitted(experiment, results) as process:
        check_end(process, results, undisturbed)
        assert only_job().JobState == "COMPLETED"


def test_a_run_that_slurm_queues_again_goes_on(experiment: Path, results: Path, undisturbed: Path) -> None:
    with submitted(experiment, results) as process:
        job = only_job()
        slurm("scontrol", "requeue", job.number)
        job.start_now()
        check_end(process, results, undisturbed)
        assert (job.JobState, job.Restarts) == ("COMPLETED", "1")
        assert only_job().number == job.number


def test_a_run_that_reaches_its_time_limit_is_queued_again(experiment: Path, results: Path, undisturbed: Path) -> None:
    limit = ("--set-resources", "run:runtime=2", "run:slurm_extra='--signal=TERM@70 --open-mode=append'")
    with submitted(experiment, results, *limit) as process:
        job = only_job()
        wait_for("the job to be stopped", lambda: job.Restarts == "1")
        slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=30")
        job.start_now()
        assert "which is saved" in (results / RUN / "logs/.run.log").read_text()
        check_end(process, results, undisturbed)
        assert (job.JobState, job.Restarts) == ("COMPLETED", "1")


def test_a_second_workflow_waits_for_the_job_that_a_killed_one_left(
    experiment: Path, results: Path, undisturbed: Path
) -> None:
    with submitted(experiment, results) as killed:
        left = only_job()
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        with submitted(experiment, results) as process:
            assert process.wait(timeout=300) == 0
            assert {left.JobState, only_job().JobState} == {"COMPLETED"}
            assert only_job().number != left.number
    assert [*differences(undisturbed, results, "tiny")] == []


def test_a_run_goes_on_after_its_node_died(experiment: Path, results: Path, undisturbed: Path) -> None:
    with submitted(experiment, results) as process:
        job = only_job()
        node = job.NodeList
        kill_node(node)
        try:
            wait_for("the job to be missed", lambda: job.JobState != "RUNNING")
            job.start_now()
            wait_for("the other node", lambda: job.JobState == "RUNNING" and job.NodeList != node)
        finally:
            start_node(node)
        check_end(process, results, undisturbed)
        assert (job.JobState, job.Restarts) == ("COMPLETED", "1")
        wait_for("the node's return", lambda: "idle" in slurm("sinfo", "-h", "-n", node, "-o", "%T"))


def test_two_nodes_of_two_processes_train_a_run_and_go_on_after_a_signal(experiment: Path, results: Path) -> None:
    # Four processes on two cores are slow, and each draws dropout for its own part of a batch.
    short = (
        f"training: {{steps: {SHORT}, nodes: NODES, devices: NODES}}\n"
        f"switching: {{switch_points: [12, {SHORT - 12}]}}\nmodel: {{dropout: 0.0}}"
    )
    alone, spread = (experiment.with_name(f"{nodes}.yaml") for nodes in (1, 2))
    for nodes, path in enumerate((alone, spread), start=1):
        path.write_text(f"base: {experiment}\n{short.replace('NODES', str(nodes))}\n", encoding="utf-8")
    by_one = results.with_name("alone")
    shutil.copytree(results / "data", by_one / "data")
    snakemake(alone, by_one, str(by_one / "tiny/summary.csv"), jobs="runs")
    with submitted(spread, results) as process:
        job = only_job()
        assert (job.NumNodes, job.NumTasks) == ("2", "4")
        slurm("scancel", "--signal=TERM", job.number)
        wait_for("the job to be stopped", lambda: job.Restarts == "1")
        job.start_now()
        assert process.wait(timeout=300) == 0, (results / "workflow.log").read_text()[-4000:]
        assert (job.JobState, job.Restarts) == ("COMPLETED", "1")
    (sparse,) = (results / RUN).glob("phases/*-sparse/phase.json")
    assert PhaseRecord.read(sparse).provenance["began"] is None
    ours, expected = (read_metrics(there / RUN / "metrics.jsonl")["train/loss"] for there in (results, by_one))
    assert [step for step, _ in ours] == [step for step, _ in expected]
    for (step, loss), (_, by_one_process) in zip(ours, expected, strict=True):
        # Sums round differently, which grows from step to step: 4e-4 at step 100, 2 % at step 180.
        assert loss == pytest.approx(by_one_process, rel=1e-4 if step <= 60 else 0.05), step
