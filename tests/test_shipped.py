"""Every family, construction, router and analysis from its shipped config, at a tiny size, from text to report."""

import csv
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.run import Run
from ssd_lit.support.files import archive_digest, read_json
from tests.conftest import Bench
from tests.tiny import tiny

pytestmark = pytest.mark.whole_run

Rows = dict[str, dict[str, str]]

FIXED = {"switch_points": [12, 28]}


def run(shipped: str, folder: Path, **changes: Any) -> tuple[Path, Rows]:
    """Takes the experiment to its report; returns its folder and its summary by arm."""
    bench = Bench(folder, config=tiny(shipped, folder, **changes))
    for arm in bench.runs:
        bench.stage("train", bench.dir(arm))
    here = bench.results / "tiny"
    for stage in ("summarise", "figures", "report"):
        bench.stage(stage, here)
    with (here / "summary.csv").open() as file:
        return here, {row["arm"]: row for row in csv.DictReader(file)}


def evaluation(here: Path, arm: str) -> dict[str, Any]:
    found: dict[str, Any] = read_json(here / "runs" / f"{arm}-seed0" / "evaluation.json")
    return found


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
    here, rows = run(
        "ablations/construction",
        tmp_path,
        arms={"ssd": {"switching": FIXED, "grid": {"moe.construction": ["kmeans", "random"]}}},
    )
    cells = [arm for arm in rows if arm.startswith("posthoc.")]
    assert [arm.partition("construction_")[2] for arm in cells] == [
        "kmeans", "kmeans_activations", "coactivation", "random", "contiguous",
    ]  # fmt: skip
    for arm in cells:
        assert float(rows[arm]["val_loss_dense"]) == pytest.approx(float(rows["dense"]["val_loss_dense"]), rel=1e-5)
    # Other groups of neurons, another function with half of them.
    assert len({rows[arm]["val_loss_sparse"] for arm in cells}) == len(cells)
    # Their first dense phase is one and the same: trained once, and counted by both.
    trained, adopted = (here / "runs" / f"{arm}-seed0" for arm in rows if arm.startswith("ssd."))
    assert Run.open(adopted).checkpoint("warmup") == trained / "checkpoints/warmup.ckpt"
    assert not (adopted / "checkpoints/warmup.ckpt").exists()
    firsts = [read_json(folder / "stages/warmup.json") for folder in (trained, adopted)]
    assert firsts[0]["weights"] == firsts[1]["weights"] == archive_digest(trained / "checkpoints/warmup.ckpt")
    assert [read_json(folder / "phases/00-dense/phase.json")["steps"] for folder in (trained, adopted)] == [12, 12]
    for arm in ("ssd", "posthoc"):
        assert {path.suffix for path in (here / "figures").glob(f"grid_{arm}.*")} == {".csv", ".png", ".svg"}


def test_every_router_chooses_otherwise_and_none_changes_the_model(tmp_path: Path) -> None:
    here, rows = run("ablations/router", tmp_path, arms={"ssd": {"switching": FIXED}})
    for source in ("ssd", "dense"):
        cells = [arm for arm in rows if arm.startswith("ssd_" if source == "ssd" else "posthoc")]
        assert len(cells) == 5
        for arm in cells:
            assert float(rows[arm]["val_loss_dense"]) == pytest.approx(float(rows[source]["val_loss_dense"]), rel=1e-5)
        found = [evaluation(here, arm) for arm in cells]
        assert {one["router"] for one in found} == {"center", "mass_mlp", "norm_mlp", "centers", "random"}
        assert len({one["loss_sparse"] for one in found}) == 5
        # The oracle's choice is the model's, whatever the router.
        bounds = [one["oracle_curve"][0]["loss"] for one in found]
        assert bounds == pytest.approx([bounds[0]] * 5, rel=1e-5)


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
