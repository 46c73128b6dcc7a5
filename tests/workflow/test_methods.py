"""Every method from its shipped config, through the workflow."""

import csv
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.files import read_json
from tests.tiny import tiny
from tests.workflow.running import snakemake

Rows = dict[str, dict[str, str]]

FIXED = {"switch_points": [12, 28]}


def run(shipped: str, folder: Path, **changes: Any) -> tuple[Path, Rows]:
    """The experiment's folder and its summary by arm."""
    snakemake(tiny(shipped, folder, **changes), folder / "results")
    here = folder / "results/tiny"
    with (here / "summary.csv").open() as file:
        return here, {row["arm"]: row for row in csv.DictReader(file)}


def evaluation(here: Path, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(here / "runs" / f"{arm}-seed0" / "evaluation.json")
    return found


def test_every_method_keeps_its_promise(tmp_path: Path) -> None:
    half = {"training": {"steps": 20}}
    arms = {
        "ssd_fixed": {"switching": FIXED}, "from_dense": half, "upcycled": half, "dense_half": half,
        "smoe_dropout": {"moe": {"k_schedule": {"start": 1, "end": 4}}}, "dense_smaller": {"model": {"d_ff": 16}},
    }  # fmt: skip
    here, rows = run("methods", tmp_path, arms=arms)
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
