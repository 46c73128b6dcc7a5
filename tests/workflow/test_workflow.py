"""The workflow for real: the shipped quick experiment from text to report, and one that is killed on its way."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from ssd_lit.cli import main
from ssd_lit.config import load_experiment
from ssd_lit.files import read_json
from ssd_lit.reporting.names import figure_names
from ssd_lit.tracking import tracking_uri
from tests.campaigns.same_results import run_differences
from tests.conftest import Bench, tiny_experiment
from tests.workflow.running import ENVIRONMENT, ROOT, command, snakemake


def test_the_quick_experiment_reaches_its_report(quick: Path) -> None:
    here = quick / "quick"
    with (here / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["dense", "ssd", "sparse", "posthoc"]
    assert all(int(row["steps"]) == 120 for row in rows.values())
    assert float(rows["ssd"]["sparse_fraction"]) == pytest.approx(0.4, abs=0.01)
    assert (
        float(rows["sparse"]["train_flops"]) < float(rows["ssd"]["train_flops"]) < float(rows["dense"]["train_flops"])
    )
    # Text, not noise: well below the uniform guess of 512 entries.
    assert all(float(row["val_ppl_dense"]) < 300 for row in rows.values())
    html = (here / "report.html").read_text(encoding="utf-8")
    assert all(f"{arm}-seed0" in html for arm in rows)
    names = figure_names(load_experiment(here / "experiment.yaml"))
    drawn = {path.name for path in (here / "figures").iterdir()}
    assert drawn == {f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv")}
    for run in (here / "runs").iterdir():
        assert list((run / "logs").iterdir())
        assert list((run / "benchmarks").iterdir())


def test_mlflow_holds_one_run_for_each_run_with_all_its_points(quick: Path) -> None:
    client = MlflowClient(tracking_uri(quick))
    experiment = client.get_experiment_by_name("quick")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if "mlflow.parentRunId" not in r.data.tags]
    assert sorted(r.info.run_name for r in runs) == [
        "dense-seed0",
        "posthoc-seed0",
        "report",
        "sparse-seed0",
        "ssd-seed0",
    ]
    (ssd,) = [r for r in runs if r.info.run_name == "ssd-seed0"]
    recorded = [json.loads(line) for line in (quick / "quick/runs/ssd-seed0/metrics.jsonl").read_text().splitlines()]
    expected = sorted((p["step"], p["values"]["train/loss"]) for p in recorded if "train/loss" in p["values"])
    assert sorted((m.step, m.value) for m in client.get_metric_history(ssd.info.run_id, "train/loss")) == expected
    assert expected[-1][0] == 120
    evaluation = read_json(quick / "quick/runs/ssd-seed0/evaluation.json")
    assert ssd.data.metrics["eval/loss_sparse"] == evaluation["loss_sparse"]
    assert any(name.startswith("system/") for name in ssd.data.metrics)


def test_a_second_call_finds_nothing_to_do_and_one_stage_can_be_asked_for(quick: Path) -> None:
    assert "Nothing to be done" in snakemake("quick", quick)
    planned = snakemake("quick", quick, "-n", "--forcerun", "evaluate")
    assert "evaluate" in planned
    assert "rule dense" not in planned
    weights = quick / "quick/runs/dense-seed0/checkpoints/dense.ckpt"
    before = weights.stat().st_mtime_ns
    (quick / "quick/summary.csv").unlink()
    snakemake("quick", quick, str(quick / "quick/summary.csv"))
    assert (quick / "quick/summary.csv").exists()
    assert weights.stat().st_mtime_ns == before


def test_planning_writes_nothing(tmp_path: Path) -> None:
    config, results = tiny_experiment(tmp_path), tmp_path / "results"
    assert "sparse_phases" in snakemake(config, results, "-n")
    assert not results.exists()


def test_what_is_lost_or_of_other_settings_is_planned_and_nothing_else(quick: Path, tmp_path: Path) -> None:
    ssd, dense = (quick / f"quick/runs/{name}-seed0" for name in ("ssd", "dense"))
    weights = ssd / "checkpoints/sparse_phases.ckpt"
    shutil.move(weights, tmp_path / "kept.ckpt")
    assert planned(quick) == {"sparse_phases ssd", "evaluate ssd"}
    shutil.move(tmp_path / "kept.ckpt", weights)
    # Nobody needs what a later stage was made from.
    shutil.move(ssd / "checkpoints/warmup.ckpt", tmp_path / "kept.ckpt")
    assert planned(quick) == set()
    shutil.move(tmp_path / "kept.ckpt", ssd / "checkpoints/warmup.ckpt")
    other = tmp_path / "other.yaml"
    changes = {"arms": {"sparse": {"optim": {"lr": 5e-3}}}}
    other.write_text(yaml.safe_dump({"base": str(ROOT / "configs/quick.yaml"), **changes}), encoding="utf-8")
    assert planned(quick, other) == {"moefy sparse", "sparse_phases sparse", "evaluate sparse"}
    assert planned(quick) == set()
    assert (dense / "evaluation.json").exists()


def planned(results: Path, experiment: str | Path = "quick") -> set[str]:
    """The stages of runs that would be done, as RULE ARM."""
    told = snakemake(experiment, results, "-n")
    return {
        f"{rule} {arm}"
        for rule, arm in re.findall(r"^rule (\w+):\n(?:    .*\n)*?    wildcards: run=(\w+)-seed0", told, re.M)
    }


def test_a_copy_with_other_dates_trains_nothing_and_a_forced_stage_gives_the_same(quick: Path, tmp_path: Path) -> None:
    results = tmp_path / "copy"
    shutil.copytree(quick, results, copy_function=shutil.copyfile)
    checkpoints = sorted(results.rglob("*.ckpt"))
    before = {path: path.stat().st_mtime_ns for path in checkpoints}
    run = results / "quick/runs/ssd-seed0"
    assert "rule sparse_phases" in snakemake("quick", results, str(run / "evaluation.json"))
    assert {path: path.stat().st_mtime_ns for path in checkpoints} == before
    snakemake("quick", results, str(run / "stages/sparse_phases.json"), "--forcerun", "sparse_phases")
    anew = {path for path in checkpoints if path.stat().st_mtime_ns != before[path]}
    assert anew == {run / "checkpoints/sparse_phases.ckpt"}
    a, b = (torch.load(r / "quick/runs/ssd-seed0/checkpoints/sparse_phases.ckpt", weights_only=True)["state_dict"]
            for r in (quick, results))  # fmt: skip
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_by_the_command_line_alone_is_the_one_of_the_workflow(quick: Path, tmp_path: Path) -> None:
    results = tmp_path / "by_hand"
    assert main(["configs", str(ROOT / "configs/quick.yaml"), "--results", str(results)]) == 0
    shutil.copytree(quick / "data", results / "data", dirs_exist_ok=True)
    run = results / "quick/runs/ssd-seed0"
    subprocess.run([sys.executable, "-m", "ssd_lit", "train", str(run)], env=ENVIRONMENT, check=True)
    assert list(run_differences(quick / "quick/runs/ssd-seed0", run)) == []


def test_snakemake_makes_its_own_archive(quick: Path, tmp_path: Path) -> None:
    snakemake("quick", quick, "--report", str(tmp_path / "archive.html"))
    assert "Activation pattern similarity" in (tmp_path / "archive.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("mistake", ["d_ff 32 is not divisible by moe.experts 5", "no text in"])
def test_a_mistake_stops_the_workflow_in_two_lines(tmp_path: Path, mistake: str) -> None:
    if mistake == "no text in":
        config = tiny_experiment(tmp_path)
        (tmp_path / "text.txt").write_text(" \n\n")
    else:
        config = tiny_experiment(tmp_path, moe={"experts": 5, "top_k": 2})
    done = subprocess.run(
        command(config, tmp_path / "results"), cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False
    )
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "profile" not in line]
    assert len(told) <= 2
    assert mistake in done.stderr
    assert not (tmp_path / "results").exists()


def test_a_workflow_killed_in_a_sparse_phase_ends_with_the_same_weights(tmp_path: Path) -> None:
    """First all its processes die at once, as when a machine goes down; then snakemake alone, and its job works on.

    The long form, for every stage and signal, is tests/campaigns/kills.py.
    """
    training = {"steps": 120, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 4}  # fmt: skip
    switching = {"tau": 0.9, "check_every": 4, "sparse_share": 0.5, "warmup_min_steps": 4, "warmup_max_steps": 8,
                 "sparse_steps": 60, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8}  # fmt: skip
    config = tiny_experiment(tmp_path, training=training, switching=switching, arms={"ssd": {"method": "ssd"}})
    results = tmp_path / "killed"
    run = results / "tiny/runs/ssd-seed0"
    rolling, holder = run / "work/rolling.ckpt", run / ".holder"

    def kill_when(reached: Callable[[], bool], kill: Callable[[int, int], None]) -> None:
        # First on one core, in the end on two: their number decides nothing.
        process = subprocess.Popen(
            command(config, results, "--cores", "1"), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not reached():
            assert process.poll() is None
            time.sleep(0.005)
        kill(process.pid, signal.SIGKILL)
        process.wait()

    moefied = run / "stages/moefy.json"
    kill_when(lambda: moefied.exists() and rolling.exists(), os.killpg)
    dead = holder.read_text()
    assert dead.startswith("train to ")
    kill_when(lambda: holder.exists() and holder.read_text() not in ("", dead), os.kill)
    snakemake(config, results)
    assert not [path for path in results.rglob("*") if path.name.endswith(".part") or path == holder]

    (tmp_path / "whole").mkdir()
    shutil.copy(tmp_path / "text.txt", tmp_path / "whole")
    whole = Bench(tmp_path / "whole", training=training, switching=switching, arms={"ssd": {"method": "ssd"}})
    expected = torch.load(whole.checkpoint("ssd"), weights_only=True)["state_dict"]
    got = torch.load(run / "checkpoints/sparse_phases.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(expected[name], got[name]) for name in expected)

    client = MlflowClient(tracking_uri(results))
    experiment = client.get_experiment_by_name("tiny")
    runs = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == "ssd-seed0"]
    assert len(runs) == 1
    steps = [m.step for m in client.get_metric_history(runs[0].info.run_id, "train/loss")]
    assert sorted(steps) == sorted(set(steps))
    assert max(steps) == 120


def test_runs_that_share_their_warm_up_are_done_once_they_are_done(tmp_path: Path) -> None:
    grid = {
        "method": "ssd",
        "grid": {"moe.construction": ["kmeans", "random"]},
        "switching": {"switch_points": [12, 28]},
    }
    config, results = tiny_experiment(tmp_path, arms={"ssd": grid}), tmp_path / "results"
    runs = [results / f"tiny/runs/ssd.construction_{name}-seed0" for name in ("kmeans", "random")]
    measured = [str(run / "evaluation.json") for run in runs]
    told = snakemake(config, results, *measured, jobs="runs")
    jobs = re.findall(r"^(?:local)?rule (\w+):", told, re.M)
    assert sorted(jobs) == ["encode", "prepare", "run", "run", "store", "tokenizer", "warmup"]
    assert [(run / "checkpoints/warmup.ckpt").exists() for run in runs] == [True, False]
    for one in ("runs", "stages"):
        assert "Nothing to be done" in snakemake(config, results, *measured, jobs=one)
