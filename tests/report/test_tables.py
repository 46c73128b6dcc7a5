"""summary.csv and arms.csv against the files of the runs."""

import csv
import json
import math

import pandas as pd
import pytest

from ssd_lit.paths import run_dir
from ssd_lit.report.results import load_results
from ssd_lit.report.tables import ARMS_COLUMNS, write_arms, write_summary
from ssd_lit.support.files import write_json_checked
from tests.report.conftest import Tree

SUMMARY_COLUMNS = (
    "experiment,arm,method,model,seed,steps,tokens,sparse_fraction,train_flops,train_seconds,val_loss_dense,"
    "val_loss_sparse,val_ppl_dense,val_ppl_sparse,experts,top_k,active_neurons"
)


def test_columns_and_values(two_seeds):
    path = write_summary(two_seeds.exp_dir, two_seeds.runs)
    assert path == two_seeds.exp_dir / "summary.csv"
    assert path.read_text().splitlines()[0] == SUMMARY_COLUMNS
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], int(row["seed"])) for row in rows] == [(run.arm, run.seed) for run in two_seeds.runs]
    for row, run in zip(rows, two_seeds.runs, strict=True):
        folder = run_dir(two_seeds.results, run)
        evaluation = json.loads((folder / "evaluation.json").read_text())
        phases = [json.loads(path.read_text()) for path in sorted(folder.glob("phases/*/phase.json"))]
        if run.method == "posthoc":
            start = run_dir(two_seeds.results, run).parent / run.parent_run
            phases = [json.loads(path.read_text()) for path in start.glob("phases/*/phase.json")] + phases
        steps = sum(phase["steps"] for phase in phases)
        assert int(row["steps"]) == steps == 400
        assert int(row["tokens"]) == sum(phase["tokens"] for phase in phases)
        sparse = sum(phase["steps"] for phase in phases if phase["mode"] == "sparse")
        assert float(row["sparse_fraction"]) == pytest.approx(sparse / steps)
        assert float(row["train_flops"]) == pytest.approx(sum(phase["flops"] for phase in phases))
        assert float(row["train_seconds"]) == pytest.approx(sum(phase["seconds"] for phase in phases))
        assert float(row["val_loss_dense"]) == evaluation["loss_dense"]
        assert float(row["val_ppl_dense"]) == pytest.approx(math.exp(evaluation["loss_dense"]))
        assert float(row["active_neurons"]) == pytest.approx(evaluation["active_neurons"])
        assert row["model"] == "gpt2-L3-D16-F64"
        if run.method == "dense":
            assert row["val_loss_sparse"] == row["val_ppl_sparse"] == row["experts"] == row["top_k"] == ""
        else:
            assert float(row["val_loss_sparse"]) == evaluation["loss_sparse"]
            assert float(row["val_ppl_sparse"]) == pytest.approx(math.exp(evaluation["loss_sparse"]))
            assert (row["experts"], row["top_k"]) == ("16", "6")


@pytest.mark.parametrize("name", ["evaluation.json", "metrics.jsonl", "phases/00-dense/phase.json"])
def test_missing_file_is_named(make_tree, name):
    tree = make_tree((0,), ("dense",))
    missing = run_dir(tree.results, tree.runs[0]) / name
    missing.unlink()
    with pytest.raises(ValueError, match="not found") as error:
        write_summary(tree.exp_dir, tree.runs)
    assert str(missing) in str(error.value)


def test_evaluation_of_another_shape_is_named(make_tree):
    tree = make_tree((0,), ("dense",))
    path = run_dir(tree.results, tree.runs[0]) / "evaluation.json"
    write_json_checked(path, {"loss_dense": 3.0})
    with pytest.raises(ValueError, match=r"evaluation\.json: not an evaluation"):
        write_summary(tree.exp_dir, tree.runs)


def test_loss_beyond_floats_is_infinite(make_tree):
    tree = make_tree((0,), ("dense",), losses={"dense": (1e4, None)})
    row = write_summary(tree.exp_dir, tree.runs).read_text().splitlines()[1].split(",")
    assert row[SUMMARY_COLUMNS.split(",").index("val_ppl_dense")] == "inf"


def rows_of(tree: Tree) -> pd.DataFrame:
    path = write_arms(tree.exp_dir, tree.runs)
    assert path == tree.exp_dir / "arms.csv"
    table = pd.read_csv(path, keep_default_na=False)
    assert list(table.columns) == ARMS_COLUMNS
    assert not table.duplicated(["arm", "text", "mode", "measure"]).any()
    return table


def one(table: pd.DataFrame, arm: str, text: str, mode: str, measure: str) -> tuple[float, float, float, int]:
    found = table[(table.arm == arm) & (table.text == text) & (table["mode"] == mode) & (table.measure == measure)]
    row = found.iloc[0]
    assert len(found) == 1
    return row["mean"], row.lowest, row.highest, row.seeds


def test_mean_and_range_over_seeds_are_those_of_the_runs(two_seeds):
    table = rows_of(two_seeds)
    results = load_results(two_seeds.exp_dir, two_seeds.runs)
    assert list(table.arm.unique()) == list(dict.fromkeys(run.arm for run in two_seeds.runs))
    for arm in table.arm.unique():
        runs = [run for run in results if run.arm == arm]
        values = [math.exp(run.evaluation.loss_dense) for run in runs]
        assert one(table, arm, "validation", "dense", "perplexity") == pytest.approx(
            (sum(values) / 2, min(values), max(values), 2)
        )
        assert one(table, arm, "", "", "flops")[0] == pytest.approx(sum(run.total.flops for run in runs) / 2)
        assert one(table, arm, "", "", "sparse_fraction")[0] == pytest.approx(
            sum(run.sparse_fraction for run in runs) / 2
        )
        speeds = [run.total.tokens / run.total.seconds for run in runs]
        assert one(table, arm, "", "", "tokens_per_second")[:2] == pytest.approx((sum(speeds) / 2, min(speeds)))


def test_relative_numbers_compare_the_same_seed(two_seeds):
    table = rows_of(two_seeds)
    results = {run.name: run for run in load_results(two_seeds.exp_dir, two_seeds.runs)}

    def perplexity(name: str, k: int | None = None) -> float:
        found = results[name].evaluation
        return math.exp(found.loss_dense if k is None else dict(found.curve)[k])

    over_dense = [perplexity(f"ssd-seed{seed}") / perplexity(f"dense-seed{seed}") - 1 for seed in (0, 1)]
    assert one(table, "ssd", "validation", "dense", "over_dense_arm")[1:3] == pytest.approx(
        (min(over_dense), max(over_dense))
    )
    own = [perplexity(f"ssd-seed{seed}", 6) / perplexity(f"ssd-seed{seed}") - 1 for seed in (0, 1)]
    assert one(table, "ssd", "validation", "sparse, k 6", "over_dense_mode")[0] == pytest.approx(sum(own) / 2)
    assert one(table, "dense", "validation", "dense", "over_dense_arm")[:3] == (0.0, 0.0, 0.0)


def test_what_a_model_lacks_has_no_row(make_tree):
    tree = make_tree((0,), ("dense",))
    table = rows_of(tree)
    assert set(table["mode"]) == {"", "dense"}
