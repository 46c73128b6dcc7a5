"""The analyses are in the DAG only where the experiment asks for them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_lit.config import load_experiment
from tests.conftest import tiny_experiment

pytestmark = pytest.mark.whole_run

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("asked", [False, True])
def test_figures_wait_for_the_analysis_of_every_run_if_there_is_one(tmp_path: Path, asked: bool) -> None:
    config = tiny_experiment(tmp_path, **({"analysis": {}} if asked else {}))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--cores", "1", "-n",
         "--config", f"experiment={config}", f"results={tmp_path / 'results'}"],
        cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    _, _, job = done.stdout.partition("rule figures:")
    inputs = job.splitlines()[1]
    for run in load_experiment(config).runs():
        assert (f"runs/{run.name}/analysis/analysis.json" in inputs) == asked
        assert f"runs/{run.name}/evaluation.json" in inputs
    assert ("rule analyse:" in done.stdout) == asked
