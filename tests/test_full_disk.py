"""A disk that is full at every write of every stage: one line, nothing torn, and on it goes once there is room."""

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ssd_lit.cli import main
from ssd_lit.tracking.metrics_log import read_metrics
from ssd_lit.training.checkpoint import read_checkpoint
from tests.conftest import Bench, tiny_experiment
from tests.tracking.test_client import end_of_process

ARMS = {"sparse": {"method": "sparse"}}
TRAINING = {"steps": 12, "batch_size": 4, "log_every": 3, "validate_every": 6, "validation_blocks": 4,
            "checkpoint_every": 4, "snapshot_every": 6}  # fmt: skip
ROOM = (0, 4, 12, 64, 160, 256, 512, 16_000)
"""Kilobytes that are left, from one attempt to the next."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_told_and_the_run_goes_on_once_there_is_room(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, results, failed = tiny_experiment(tmp_path, arms=ARMS, training=TRAINING), disk / "results", []
    others = set(threading.enumerate())

    def stage(name: str, *arguments: object) -> None:
        for kilobytes in ROOM:
            fill(disk, kilobytes)
            capsys.readouterr()
            status = main([name, *map(str, arguments)])
            end_of_process(others)
            (disk / "ballast").unlink()
            if status == 0:
                return
            told = [line for line in capsys.readouterr().err.splitlines() if "failed:" in line]
            assert len(told) == 1
            assert "No space left" in told[0] or "disk is full" in told[0]
            assert str(results) in told[0].partition("failed:")[2]
            assert not [path for path in results.rglob("*.part*") if path.is_file()]
            failed.append(name)
        raise AssertionError(f"{name}: no room was enough")

    stage("configs", config, "--results", results)
    data, run = next((results / "data").iterdir()), results / "tiny/runs/sparse-seed0"
    for name in ("prepare", "tokenizer", "encode"):
        stage(name, data)
    stage("store", results)
    stage("train", run, "--until", "moefy")
    stage("train", run, "--until", "sparse_phases")
    stage("evaluate", run)
    stage("summarise", results / "tiny")
    assert set(failed) >= {"configs", "prepare", "tokenizer", "encode", "store", "train", "summarise"}
    assert main(["verify", str(results / "tiny")]) == 0

    (tmp_path / "whole").mkdir()
    whole = Bench(tmp_path / "whole", arms=ARMS, training=TRAINING)
    a = read_checkpoint(whole.checkpoint("sparse"))["state_dict"]
    b = read_checkpoint(run / "checkpoints/sparse_phases.ckpt")["state_dict"]
    assert all(torch.equal(a[name], b[name]) for name in a)
    losses = [read_metrics(folder / "metrics.jsonl")["train/loss"] for folder in (run, whole.dir("sparse"))]
    assert losses[0] == losses[1]


def fill(disk: Path, kilobytes: int) -> None:
    """Leave so much room and no more; tries again where MLflow's samples of the stage before are still written."""
    with (disk / "ballast").open("wb") as file:
        for _ in range(100):
            free = os.statvfs(disk)
            try:
                os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_bsize - 1024 * kilobytes))
                return
            except OSError:
                time.sleep(0.1)
    raise AssertionError("the disk does not come to rest")
