"""A workflow that is killed on its way, and runs that share their warm-up, a job each."""

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from ssd_lit.tracking.store import tracking_uri
from tests.conftest import Bench, tiny_experiment
from tests.workflow.running import ENVIRONMENT, ROOT, command, snakemake

pytestmark = pytest.mark.whole_run


def test_a_workflow_killed_in_a_sparse_phase_ends_with_the_same_weights(tmp_path: Path) -> None:
    """First all its processes die at once, as when a machine goes down; then snakemake alone, and its job works on.

    The long form, for every stage and signal, is tests/stress/kills.py.
    """
    training = {"steps": 120, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
                "checkpoint_every": 4}  # fmt: skip
    switching = {"tau": 0.9, "check_every": 4, "sparse_fraction": 0.5, "warmup_min_steps": 4, "warmup_max_steps": 8,
                 "sparse_steps": 60, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8}  # fmt: skip
    changes = {"training": training, "switching": switching, "arms": {"ssd": {"method": "ssd"}}}
    killed = Bench(tmp_path, **changes)
    config, results, run = tmp_path / "tiny.yaml", killed.results, killed.dir("ssd")
    rolling, holder = run / "work/rolling.ckpt", run / ".holder"

    def kill_when(reached: Callable[[], bool], kill: Callable[[int, int], None]) -> None:
        # First on one core, in the end on two: their number decides nothing.
        process = subprocess.Popen(
            command(config, results, str(trained), "--cores", "1"), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while not reached():
            assert process.poll() is None
            time.sleep(0.005)
        kill(process.pid, signal.SIGKILL)
        process.wait()

    trained, moefied = run / "stages/sparse_phases.json", run / "stages/moefy.json"
    kill_when(lambda: moefied.exists() and rolling.exists(), os.killpg)
    dead = holder.read_text()
    assert dead.startswith("train to ")
    kill_when(lambda: holder.exists() and holder.read_text() not in ("", dead), os.kill)
    snakemake(config, results, str(trained))
    assert not [path for path in results.rglob("*") if path.name.endswith(".part") or path == holder]

    (tmp_path / "whole").mkdir()
    shutil.copy(tmp_path / "text.txt", tmp_path / "whole")
    whole = Bench(tmp_path / "whole", **changes)
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
