"""Other tasks are in the DAG only where the experiment asks for them; tests/workflow/test_analyses.py asks for none."""

from pathlib import Path

import pytest

from ssd_lit.config import load_experiment
from tests.conftest import tiny_experiment
from tests.labelled import write_blimp
from tests.workflow.running import snakemake

pytestmark = pytest.mark.whole_run


def test_tables_and_figures_wait_for_every_run_to_be_tried(tmp_path: Path) -> None:
    archive = write_blimp(tmp_path / "BLiMP.zip", {"one": ("syntax", [("a b", "b a")])})
    config = tiny_experiment(tmp_path, downstream={"blimp": {"file": str(archive)}})
    planned = snakemake(config, tmp_path / "results", "-n")
    assert "rule downstream:" in planned
    for rule, output in (("summarise", "downstream.csv"), ("figures", "/figures")):
        inputs, outputs = planned.partition(f"rule {rule}:")[2].splitlines()[1:3]
        assert output in outputs
        for run in load_experiment(config).runs():
            assert f"runs/{run.name}/downstream/downstream.json" in inputs


def test_a_run_of_an_arm_that_is_left_out_is_not_tried(tmp_path: Path) -> None:
    archive = write_blimp(tmp_path / "BLiMP.zip", {"one": ("syntax", [("a b", "b a")])})
    arms = {"dense": {"method": "dense"}, "ssd": {"method": "ssd", "downstream": False}}
    config = tiny_experiment(tmp_path, downstream={"blimp": {"file": str(archive)}}, arms=arms)
    planned = snakemake(config, tmp_path / "results", "-n")
    assert "runs/dense-seed0/downstream/downstream.json" in planned
    assert "runs/ssd-seed0/downstream/downstream.json" not in planned
    assert "runs/ssd-seed0/evaluation.json" in planned
