import csv
import json
import math

import pytest

from ssd_lit.paths import run_dir
from ssd_lit.report.summary import write_summary
from ssd_lit.support.files import write_json_checked

COLUMNS = (
    "experiment,arm,method,model,seed,steps,tokens,sparse_fraction,train_flops,train_seconds,val_loss_dense,"
    "val_loss_sparse,val_ppl_dense,val_ppl_sparse,experts,top_k,active_neurons"
)


def test_columns_and_values(two_seeds):
    path = write_summary(two_seeds.exp_dir, two_seeds.runs)
    assert path == two_seeds.exp_dir / "summary.csv"
    assert path.read_text().splitlines()[0] == COLUMNS
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
    assert row[COLUMNS.split(",").index("val_ppl_dense")] == "inf"
