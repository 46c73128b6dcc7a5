"""Every method, family, construction, router and analysis from its shipped config, through the workflow."""

import csv
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.files import read_json
from tests.workflow.running import snakemake, tiny

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


@pytest.mark.parametrize(("family", "ffns"), [("bert", 2), ("t5", 4), ("llama", 2)])
def test_every_family_goes_through_all_stages(tmp_path: Path, family: str, ffns: int) -> None:
    here, rows = run(family, tmp_path, arms={"ssd": {"switching": FIXED}})
    assert all(row["model"].startswith(family) for row in rows.values())
    assert float(rows["ssd"]["sparse_fraction"]) == 0.4
    assert float(rows["ssd"]["train_flops"]) < float(rows["dense"]["train_flops"])
    assert float(rows["posthoc"]["val_loss_dense"]) == pytest.approx(float(rows["dense"]["val_loss_dense"]), rel=1e-5)
    for arm in ("ssd", "posthoc"):
        found = evaluation(here, arm)
        assert len(found["active_ratio"]) == len(found["routing_recall"]) == ffns
        assert found["curve"][-1]["loss"] == pytest.approx(found["loss_dense"], rel=1e-5)


def test_every_construction_is_a_cell_of_its_grid(tmp_path: Path) -> None:
    here, rows = run("ablations/construction", tmp_path, arms={"ssd": {"switching": FIXED}})
    cells = [arm for arm in rows if arm.startswith("posthoc.")]
    assert [arm.partition("construction_")[2] for arm in cells] == [
        "kmeans", "kmeans_activations", "coactivation", "random", "contiguous",
    ]  # fmt: skip
    for arm in cells:
        assert float(rows[arm]["val_loss_dense"]) == pytest.approx(float(rows["dense"]["val_loss_dense"]), rel=1e-5)
    # Other groups of neurons, another function with half of them.
    assert len({rows[arm]["val_loss_sparse"] for arm in cells}) == len(cells)
    # Their first dense phase is one and the same.
    firsts = [here / "runs" / f"{arm}-seed0/phases/00-dense/last.ckpt" for arm in rows if arm.startswith("ssd.")]
    assert all(first.samefile(firsts[0]) for first in firsts)
    for arm in ("ssd", "posthoc"):
        assert {path.suffix for path in (here / "figures").glob(f"grid_{arm}.*")} == {".csv", ".png", ".svg"}


def test_every_router_chooses_otherwise_and_none_changes_the_model(tmp_path: Path) -> None:
    here, rows = run("ablations/router", tmp_path, arms={"ssd": {"switching": FIXED}})
    for source in ("ssd", "dense"):
        cells = [arm for arm in rows if arm.startswith("ssd_" if source == "ssd" else "posthoc")]
        assert len(cells) == 4
        for arm in cells:
            assert float(rows[arm]["val_loss_dense"]) == pytest.approx(float(rows[source]["val_loss_dense"]), rel=1e-5)
        found = [evaluation(here, arm) for arm in cells]
        assert {one["router"] for one in found} == {"center", "mass", "norm", "random"}
        assert len({one["loss_sparse"] for one in found}) == 4
        # The oracle's choice is the model's, whatever the router.
        bounds = [one["oracle_curve"][0]["loss"] for one in found]
        assert bounds == pytest.approx([bounds[0]] * 4, rel=1e-5)


def test_analyses_are_made_where_an_experiment_asks_for_them(tmp_path: Path) -> None:
    training = {"snapshot_every": 10}
    analysis = {"blocks": 8, "experts": [2, 4], "constructions": ["kmeans", "random"], "tokens": 3}
    here, rows = run("analysis", tmp_path, training=training, analysis=analysis, arms={"ssd": {"switching": FIXED}})
    for arm in rows:
        assert (here / "runs" / f"{arm}-seed0/analysis/analysis.json").exists()
    with (here / "runs/ssd-seed0/analysis/similarity.csv").open() as file:
        pairs = list(csv.DictReader(file))
    same = [row for row in pairs if row["step_a"] == row["step_b"]]
    assert same
    assert all(float(row["similarity"]) == pytest.approx(1.0) for row in same)
    assert {row["step_a"] for row in pairs} == {"10", "20", "30", "40"}
    with (here / "runs/ssd-seed0/analysis/load.csv").open() as file:
        load = list(csv.DictReader(file))
    assert load
    assert (here / "figures/similarity_pairs.svg").exists()
