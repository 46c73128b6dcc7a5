"""An experiment of many runs is planned whole. (benchmarks/load.py measures 500 of them.)"""

import re
from pathlib import Path

import pytest

from tests.tiny import tiny
from tests.workflow.running import snakemake

pytestmark = pytest.mark.whole_run


def test_the_workflow_plans_sixty_runs(tmp_path: Path) -> None:
    grid = {"switching.tau": [0.6, 0.7, 0.8, 0.9], "moe.top_k": [1, 2]}
    # Beside the four arms that the quick experiment has.
    arms = {"square": {"method": "ssd", "grid": grid}}
    experiment = tiny("quick", tmp_path, seeds=[0, 1, 2, 3, 4], arms=arms)
    told = snakemake(experiment, tmp_path / "results", "-n")
    assert re.search(r"^evaluate +60$", told, re.MULTILINE)
