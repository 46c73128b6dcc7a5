"""`ssd-lit status`: where runs stand, from the files that they leave."""

import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from ssd_lit.cli import main
from ssd_lit.pipeline import status
from ssd_lit.pipeline.progress import Standing, progress_of
from ssd_lit.support import signals
from ssd_lit.support.locks import exclusive, holder_of
from tests.conftest import Bench, tiny_experiment

Captured = pytest.CaptureFixture[str]
ARMS = {
    "dense": {"method": "dense"}, "ssd": {"method": "ssd", "switching": {"switch_points": [12, 28]}},
    "posthoc": {"method": "posthoc", "parent_arm": "dense"},
}  # fmt: skip


def standings(bench: Bench) -> dict[str, Standing]:
    return {run.run.removesuffix("-seed0"): run for run in progress_of(bench.results / "tiny").runs}


def shown(results: Path, capsys: Captured, *arguments: str) -> list[str]:
    capsys.readouterr()
    assert main(["status", *arguments, "--results", str(results)]) == 0
    return capsys.readouterr().out.splitlines()


def test_before_anything_runs_all_wait_for_the_text(tmp_path: Path, capsys: Captured) -> None:
    results = tmp_path / "results"
    assert main(["status", "--results", str(results)]) == 1
    assert "holds no experiment yet; `ssd-lit list`" in capsys.readouterr().err
    main(["configs", str(tiny_experiment(tmp_path, arms=ARMS)), "--results", str(results)])
    lines = shown(results, capsys)
    assert lines[0] == "tiny: 3 runs: 3 waiting"
    assert lines[1] == "text waiting for its turn: prepare"
    assert [line.split()[0] for line in lines[3:6]] == ["dense-seed0", "posthoc-seed0", "ssd-seed0"]
    assert lines[6] == "waiting for the text: dense-seed0, posthoc-seed0, ssd-seed0"
    (data,) = (results / "data").iterdir()
    with exclusive(data, "prepare"):
        assert f"text running: prepare, process {os.getpid()} on" in shown(results, capsys)[1]
    (data / "logs").mkdir()
    (data / "logs/prepare.log").write_text("begins\n[10:00:00] ssd-lit prepare data: failed: no text\n")
    assert shown(results, capsys)[1] == f"text failed: no text; log: {data}/logs/prepare.log"


def test_a_run_is_followed_from_waiting_to_done(tmp_path: Path, capsys: Captured) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    found = standings(bench)
    assert {arm: (run.state, run.note) for arm, run in found.items()} == {
        "dense": ("waiting", "for its turn: dense"),
        "ssd": ("waiting", "for its turn: warmup"),
        "posthoc": ("waiting", "for dense-seed0"),
    }
    bench.phases("ssd", "warmup")
    ssd = standings(bench)["ssd"]
    assert (ssd.state, ssd.note, ssd.step, ssd.steps) == ("waiting", "for its turn: moefy", 12, 40)
    assert ssd.sparse_fraction == 0
    assert ssd.step_seconds is not None
    with exclusive(bench.dir("ssd"), "train to evaluate"):
        ssd = standings(bench)["ssd"]
        assert (ssd.state, ssd.phase, ssd.sparse_perplexity) == ("running", "01-moefy", None)
        assert ssd.note.startswith("train to evaluate, process ")
        assert ssd.tokens_per_second is not None
        assert ssd.seconds_left == pytest.approx(28 * (ssd.step_seconds or 0))
    for arm in ARMS:
        bench.stage("train", bench.dir(arm))
    found = standings(bench)
    assert [run.state for run in found.values()] == ["done"] * 3
    evaluated = json.loads((bench.dir("ssd") / "evaluation.json").read_text())
    assert found["ssd"].sparse_fraction == 0.4
    assert found["ssd"].perplexity == pytest.approx(2.718281828 ** evaluated["loss_dense"])
    assert found["ssd"].sparse_perplexity == pytest.approx(2.718281828 ** evaluated["loss_sparse"])
    lines = shown(bench.results, capsys, str(bench.results / "tiny"), "--watch")
    assert lines[0] == "tiny: 3 runs: 3 done"
    assert "\x1b" not in "".join(lines)


def test_how_a_run_ended_is_told(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    folder = bench.dir("dense")

    def stop(*_: object) -> None:
        raise signals.Preempted("SIGTERM")

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    for work, state, why in ((stop, "stopped", "SIGTERM"), (fail, "failed", "RuntimeError: CUDA out of memory")):
        with monkeypatch.context() as patched:
            patched.setattr("ssd_lit.pipeline.train._train", work)
            if work is fail:
                (folder / "logs").mkdir()
                (folder / "logs/dense.log").touch()
                with pytest.raises(RuntimeError):
                    main(["train", str(folder)])
            else:
                assert main(["train", str(folder)]) == signals.STATUS
        dense = standings(bench)["dense"]
        assert dense.state == state
        assert dense.note.endswith(why)
    (told,) = [line for line in shown(bench.results, capsys) if line.startswith("dense-seed0 failed")]
    assert told.startswith("dense-seed0 failed: train, ")
    assert told.endswith(f"RuntimeError: CUDA out of memory; log: {folder}/logs/dense.log")
    # A kill -9 frees the lock and leaves the name of its holder.
    (folder / ".holder").write_text("train to dense, process 12 on node7, since 2026-01-01 10:00:00\n")
    assert holder_of(folder) == ("train to dense, process 12 on node7, since 2026-01-01 10:00:00", False)
    dense = standings(bench)["dense"]
    assert (dense.state, dense.note[:45]) == ("stopped", "killed: train to dense, process 12 on node7, ")
    # The next call begins anew, and what was noted is gone.
    bench.stage("train", folder)
    assert standings(bench)["dense"].state == "done"
    assert not (folder / ".ended").exists()


def test_a_job_that_failed_before_it_began_is_told_by_its_log(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    log = bench.dir("ssd") / "logs/warmup.log"
    log.parent.mkdir()
    log.write_text("[10:00:00] ssd-lit train ssd-seed0: begins\n[10:00:01] ssd-lit train ssd-seed0: failed: no disk\n")
    ssd = standings(bench)["ssd"]
    assert (ssd.state, ssd.note, ssd.log) == ("failed", "no disk", log)


def test_the_time_that_a_run_was_stopped_is_not_the_time_of_its_steps(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    begun, points = time.time_ns() // 1_000_000, []
    for step in range(1, 21):
        pause = 3_600_000 if step > 10 else 0
        values = {"train/loss": 5.0 - step / 10, "train/tokens_per_second": 100.0}
        points.append(json.dumps({"step": step, "time": begun + 500 * step + pause, "values": values}))
    (bench.dir("dense") / "metrics.jsonl").write_text("\n".join(points) + '\n{"step": 21, "ti')
    with exclusive(bench.dir("dense"), "train to dense"):
        progress = progress_of(bench.results / "tiny")
        dense = progress.runs[0]
    assert (dense.step, dense.loss, dense.step_seconds) == (20, 3.0, 0.5)
    assert dense.seconds_left == 10
    # SSD's 40 steps are still to come, one run after another.
    assert progress.seconds_left == 30


def test_a_damaged_record_is_told_beside_the_other_runs(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    bench.phases("dense")
    (bench.dir("dense") / "phases/00-dense/phase.json").write_text("{")
    found = standings(bench)
    assert found["dense"].state == "failed"
    assert "delete it and run again" in found["dense"].note
    assert found["ssd"].state == "waiting"


def test_an_experiment_that_cannot_be_read_hides_no_other(tmp_path: Path, capsys: Captured) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    damaged = bench.results / "another"
    damaged.mkdir()
    (damaged / "experiment.yaml").write_text("arms: [")
    assert main(["status", "--results", str(bench.results)]) == 0
    told = capsys.readouterr().out
    assert "another" in told
    assert "tiny: " in told
    assert main(["status", str(damaged)]) == 1


def test_a_terminal_gets_a_table_that_fits_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, arms=ARMS)
    out = Console(width=100, force_terminal=True, record=True, file=(tmp_path / "screen").open("w"))
    out.print(status._shown([progress_of(bench.results / "tiny")]))
    lines = out.export_text().splitlines()
    assert max(map(len, lines)) <= 100
    assert any("posthoc-seed0" in line and "waiting" in line for line in lines)
