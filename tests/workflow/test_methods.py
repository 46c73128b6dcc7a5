"""Every method from its shipped config: what it promises, and what it waits for in the workflow."""

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.support.files import read_json
from tests.conftest import Bench
from tests.stress.same_results import differences
from tests.tiny import tiny
from tests.workflow.running import snakemake

pytestmark = pytest.mark.whole_run

FIXED = {"switch_points": [12, 28]}
HALF = {"training": {"steps": 20}}
ARMS = {
    "ssd_fixed": {"switching": FIXED}, "from_dense": HALF, "upcycled": HALF, "dense_half": HALF,
    "smoe_dropout": {"moe": {"k_schedule": {"start": 1, "end": 4}}}, "dense_smaller": {"model": {"d_ff": 16}},
}  # fmt: skip


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the experiment and its results, as the command line alone leaves them; changed as a copy only."""
    folder = tmp_path_factory.mktemp("methods")
    bench = Bench(folder, config=tiny("methods", folder, arms=ARMS))
    waiting = {run.name: run for run in bench.runs.values()}
    while waiting:
        for name, run in list(waiting.items()):
            if not {run.parent_run, run.matches, run.shares_warmup} & waiting.keys():
                bench.stage("train", bench.dir(run.arm))
                del waiting[name]
    for stage in ("summarise", "figures", "report"):
        bench.stage(stage, bench.results / "tiny")
    (bench.results / ".mlflow-ready").touch()  # a file of the workflow's own
    return folder


def evaluation(here: Path, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(here / "runs" / f"{arm}-seed0" / "evaluation.json")
    return found


def test_every_method_keeps_its_promise(methods: Path) -> None:
    here = methods / "results/tiny"
    with (here / "summary.csv").open() as file:
        rows = {row["arm"]: row for row in csv.DictReader(file)}
    steps = {arm: int(row["steps"]) for arm, row in rows.items()}
    flops = {arm: float(row["train_flops"]) for arm, row in rows.items()}
    share = {arm: float(row["sparse_fraction"]) for arm, row in rows.items()}
    dense = {arm: row["val_loss_dense"] for arm, row in rows.items()}

    assert steps["dense"] == steps["ssd"] == steps["smoe_dropout"] == steps["from_dense"] == steps["upcycled"] == 40
    assert share["ssd"] == share["ssd_fixed"] == 0.4
    assert share["from_dense"] == share["upcycled"] == 0.5
    assert share["sparse_gate"] == 1
    # Half the experts always cost less than a number that grows to all of them, and that less than all of them.
    assert flops["sparse_centers"] < flops["smoe_dropout"] < 1.1 * flops["dense"]
    assert flops["sparse_centers"] < flops["ssd"] < flops["dense"] < flops["upcycled"]
    for arm in ("dense_stopped", "dense_smaller"):
        assert 0.9 * flops["ssd"] < flops[arm] <= flops["ssd"]
    assert steps["dense_stopped"] < steps["ssd"] < steps["dense_smaller"]
    # Making experts, and training a router for them, leaves the dense function as it was.
    for arm, source in (
        ("posthoc", "dense"),
        ("posthoc_mass", "dense"),
        ("posthoc_norm", "dense"),
        ("ssd_mass", "ssd"),
    ):
        assert float(dense[arm]) == pytest.approx(float(dense[source]), rel=1e-5)
    assert dense["upcycled"] == ""
    # With all experts on, sparse mode is the dense function where outputs are added as they are.
    for arm in ("ssd", "ssd_fixed", "ssd_mass", "sparse_centers", "smoe_dropout", "posthoc", "posthoc_norm"):
        found = evaluation(here, arm)
        assert found["curve"][-1]["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)
        assert found["oracle_curve"][-1]["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)
    assert len(evaluation(here, "posthoc_norm")["threshold_curve"]) == 4
    html = (here / "report.html").read_text(encoding="utf-8")
    assert all(f"{arm}-seed0" in html for arm in rows)


def test_the_workflow_of_stages_finds_all_of_it_done_and_trains_a_router_that_is_not(
    methods: Path, tmp_path: Path
) -> None:
    experiment, results = methods / "experiment.yaml", tmp_path / "results"
    shutil.copytree(methods / "results", results)
    assert "Nothing to be done" in snakemake(experiment, results, "-n")
    run_dir = results / "tiny/runs/posthoc_mass-seed0"
    for lost in ("phases/01-router/phase.json", "stages/route.json", "checkpoints/route.ckpt", "evaluation.json"):
        (run_dir / lost).unlink()
    told = snakemake(experiment, results, str(run_dir / "evaluation.json"))
    assert set(re.findall(r"^(?:local)?rule (\w+):", told, re.MULTILINE)) == {"route", "evaluate"}
    assert list(differences(methods / "results", results, "tiny")) == []


@pytest.mark.parametrize("jobs", ["stages", "runs"])
def test_a_run_waits_for_the_one_that_it_builds_on(methods: Path, tmp_path: Path, jobs: str) -> None:
    arms = ("dense_stopped", "upcycled")
    asked = [str(tmp_path / f"tiny/runs/{arm}-seed0/evaluation.json") for arm in arms]
    planned = snakemake(methods / "experiment.yaml", tmp_path, "-n", *asked, jobs=jobs)
    assert set(re.findall(r"wildcards: run=(\w+)-seed0", planned)) == {*arms, "ssd", "dense_half"}
