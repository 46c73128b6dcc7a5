"""`ssd-lit run`: an experiment without Snakemake."""

import os
import signal
import time
from pathlib import Path

import yaml

from tests.campaigns.same_results import differences
from tests.tiny import tiny
from tests.workflow.running import ROOT, run, start


def times(results: Path) -> dict[str, float]:
    """When each result of the quick experiment was written."""
    here = results / "quick"
    files = [*here.glob("runs/*/phases/*/phase.json"), *here.glob("runs/*/evaluation.json"), here / "report.html"]
    return {str(path.relative_to(here)): path.stat().st_mtime for path in files}


def test_an_experiment_in_pieces_gives_what_snakemake_gives(quick: Path, tmp_path: Path) -> None:
    experiment, pieces = ROOT / "configs/quick.yaml", tmp_path / "pieces"
    process = start(experiment, pieces)
    deadline = time.monotonic() + 120
    while not list(pieces.rglob("rolling.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "stopped by SIGTERM" in told
    assert not (pieces / "quick/report.html").exists()

    status, told = run(experiment, pieces)
    assert status == 0, told
    assert list(differences(quick, pieces, "quick")) == []

    before = times(pieces)
    status, told = run(experiment, pieces)
    assert (status, times(pieces)) == (0, before)

    # One arm changes, and the measurement of all.
    changes = {"arms": {"sparse": {"optim": {"lr": 5e-3}}}, "evaluation": {"blocks": 32}}
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({"base": str(experiment), **changes}), encoding="utf-8")
    status, told = run(other, pieces)
    assert status == 0, told
    changed = {name for name, when in times(pieces).items() if when != before[name]}
    phases = {f"runs/sparse-seed0/phases/{phase}/phase.json" for phase in ("00-moefy", "01-sparse")}
    evaluations = {name for name in before if name.endswith("evaluation.json")}
    assert changed == phases | evaluations | {"report.html"}


def test_it_stops_at_its_limit_and_a_run_that_fails_leaves_out_what_builds_on_it(tmp_path: Path) -> None:
    # There is no GPU that could run this backend.
    arms = {"dense_stopped": {"method": "dense", "match_flops": "ssd"}, "ssd": {"moe": {"backend": "fused"}}}
    experiment, results = tiny("quick", tmp_path, arms=arms), tmp_path / "results"
    status, told = run(experiment, results, "--minutes", "0.05")
    assert status == 75, told
    assert "its limit of 0.05 minutes" in told

    status, told = run(experiment, results)
    assert status == 1
    assert "dense_stopped-seed0: left out, because ssd-seed0 failed" in told
    assert "needs a CUDA device" in told
    done = {path.parent.name for path in results.glob("tiny/runs/*/evaluation.json")}
    assert done == {"dense-seed0", "posthoc-seed0", "sparse-seed0"}
    assert not (results / "tiny/report.html").exists()
