import math

import pandas as pd
import pytest

from ssd_lit.report.arms_table import COLUMNS, write_arms
from ssd_lit.report.runs import load_results
from tests.report.conftest import Tree


def rows_of(tree: Tree) -> pd.DataFrame:
    path = write_arms(tree.exp_dir, tree.runs)
    assert path == tree.exp_dir / "arms.csv"
    table = pd.read_csv(path, keep_default_na=False)
    assert tuple(table.columns) == COLUMNS
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
