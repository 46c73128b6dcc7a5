"""The table that leads the report, and which runs had their devices to themselves."""

import math
from dataclasses import replace
from typing import Any

import pytest

from ssd_lit.paths import run_dir
from ssd_lit.records import read_chain
from ssd_lit.report.arms import arms_of, cell, measure_of
from ssd_lit.report.comparison import alone_on_device, comparison
from ssd_lit.report.results import load_results
from ssd_lit.support.files import read_json_checked, write_json_checked
from tests.report.conftest import ARMS, FINAL, OTHERS, Tree, build, experiment


def read(tree: Tree) -> tuple[Any, dict[str, list[Any]]]:
    """The table, and the cells of each arm by its name."""
    table = comparison(arms_of(load_results(tree.exp_dir, tree.runs)))
    return table, {row.arm.name: list(row.cells) for row in table.rows}


def perplexities(arm: str, mode: int, seeds: tuple[int, ...] = (0, 1)) -> list[float]:
    return [math.exp(FINAL[arm][mode] + 0.004 * seed) for seed in seeds]


def test_modes_differences_and_costs_of_an_arm(two_seeds):
    table, cells = read(two_seeds)
    low, high = perplexities("ssd", 0)
    assert cells["ssd"][0].text == f"{(low + high) / 2:.2f} ({low:.2f} to {high:.2f})"
    # Seeds move both losses alike: the difference is one number.
    assert cells["ssd"][1].text == f"{100 * (math.exp(3.33 - 3.30) - 1):+.1f}%"
    assert cells["ssd"][3].text == f"{100 * (math.exp(3.40 - 3.30) - 1):+.1f}%"
    # 160 of 400 steps at 2.2 instead of 3.0 MFLOP a token.
    assert cells["ssd"][5].text == f"{(240 * 3.0 + 160 * 2.2) / 1200:.2f}"
    assert cells["ssd"][6:] == [("40.0%", False, 0.4), ("6/16", False, 0.375)]
    assert cells["dense"][1].text == "0.0%"
    assert [text for text, *_ in cells["dense"][2:4]] == ["-", "-"]
    assert [row.arm.name for row in table.rows if row.is_reference] == ["dense"]
    assert table.measured_on == "24 validation blocks of 32 tokens"
    assert [len(row.cells) for row in table.rows] == [len(table.headings)] * 4


def test_the_lowest_of_a_column_is_marked(two_seeds):
    _, cells = read(two_seeds)
    best = {name: [place for place, one in enumerate(row) if one.best] for name, row in cells.items()}
    # Post-hoc MoEfication keeps the dense arm's dense mode.
    assert best == {"dense": [0, 1], "ssd": [2, 3], "sparse": [4, 5], "posthoc": [0, 1]}


def test_models_that_predict_other_targets_are_not_ranked_together(tmp_path, monkeypatch):
    monkeypatch.setitem(FINAL, "bert", (1.0, None))
    whole = experiment((0,), ("dense", "ssd"))
    tokenizer = whole.data.tokenizer.model_copy(update={"mask_token": True})
    bert = {"bert": whole.arms["dense"].model_copy(update={"label": "BERT", "model": {"family": "bert"}})}
    data = whole.data.model_copy(update={"tokenizer": tokenizer})
    _, cells = read(build(tmp_path, whole.model_copy(update={"data": data, "arms": {**whole.arms, **bert}})))
    assert cells["dense"][0].best
    assert not any(one.best for one in cells["bert"])
    # It is the only arm of its model: compared with itself.
    assert cells["bert"][1].text == "0.0%"


def test_a_smaller_model_is_compared_with_the_dense_arm_of_the_model_it_matches(make_tree):
    _, cells = read(make_tree((0,), (*ARMS, "small")))
    assert cells["small"][1].text == f"{100 * (math.exp(3.38 - 3.30) - 1):+.1f}%"


def test_without_a_dense_arm_nothing_is_compared(make_tree):
    table, cells = read(make_tree((0,), ("ssd",)))
    assert [cells["ssd"][place].text for place in (1, 3, 5)] == ["-"] * 3
    assert not any(one.best for one in cells["ssd"])
    assert not any(row.is_reference for row in table.rows)


def test_with_many_arms_cells_of_grids_are_left_out(many, monkeypatch):
    table, cells = read(many)
    assert (len(cells), table.left_out) == (len(many.experiment.runs()) // 2, 0)
    monkeypatch.setattr("ssd_lit.report.comparison.MOST_ROWS", 15)
    table, cells = read(many)
    assert (set(cells), table.left_out) == ({*ARMS, *OTHERS}, 9)


def place_in_time(tree: Tree, times: dict[str, Any], host: str = "a", device: str = "cpu") -> None:
    """Say that the phases of those runs were done one after another between two times; None for a start: unknown."""
    for run in tree.runs:
        if run.name not in times:
            continue
        began, ended = times[run.name]
        folder = run_dir(tree.results, run)
        chain = read_chain(folder, run.method)
        for place, record in enumerate(chain):
            length = (ended - (began or 0)) / len(chain)
            start = None if began is None else began + place * length
            times_of_phase = {"began": start, "ended": ended - (len(chain) - 1 - place) * length}
            replace(record, provenance={"host": host, "devices": [device], **times_of_phase}).write(folder)
        path = folder / "evaluation.json"
        origin = {"host": host, "devices": [device], "began": ended, "ended": ended + 1}
        write_json_checked(path, {**read_json_checked(path), "provenance": origin})


def alone(tree: Tree) -> set[str]:
    return alone_on_device(load_results(tree.exp_dir, tree.runs))


def test_runs_one_after_another_were_alone(make_tree):
    tree = make_tree((0,))
    place_in_time(
        tree, {"dense-seed0": (0, 10), "ssd-seed0": (11, 20), "sparse-seed0": (21, 30), "posthoc-seed0": (31, 40)}
    )
    assert alone(tree) == {run.name for run in tree.runs}
    table, cells = read(tree)
    assert table.has_seconds
    assert table.headings[6] == "training time"
    assert cells["dense"][6].text == "100.0 s"


@pytest.mark.parametrize(("where", "expected"), [
    ({}, {"ssd-seed0"}),
    ({"device": "GPU-1"}, {"dense-seed0", "ssd-seed0", "sparse-seed0", "posthoc-seed0"}),
    ({"host": "b"}, {"dense-seed0", "ssd-seed0", "sparse-seed0", "posthoc-seed0"}),
])  # fmt: skip
def test_runs_at_once_on_one_device_were_not_alone(make_tree, where, expected):
    """The post-hoc run by itself was, but its seconds hold those of the dense run, which was not."""
    tree = make_tree((0,))
    place_in_time(tree, {"dense-seed0": (0, 10), "ssd-seed0": (21, 30), "posthoc-seed0": (31, 40)})
    place_in_time(tree, {"sparse-seed0": (5, 15)}, **where)
    assert alone(tree) == expected


def test_an_evaluation_disturbs_the_training_beside_it(make_tree):
    tree = make_tree((0,), ("dense", "ssd"))
    place_in_time(tree, {"dense-seed0": (0, 10), "ssd-seed0": (10.5, 20)})
    assert alone(tree) == {"dense-seed0"}


def test_a_first_phase_that_runs_share_is_one_work(make_tree):
    tree = make_tree((0,), ("ssd", "ssd_fixed"))
    place_in_time(tree, {"ssd-seed0": (0, 8), "ssd_fixed-seed0": (20, 30)})
    first, adopting = (run_dir(tree.results, run) for run in tree.runs)
    record = read_chain(first, "ssd")[0]
    replace(read_chain(adopting, "ssd")[0], provenance=record.provenance).write(adopting)
    assert alone(tree) == {"ssd-seed0", "ssd_fixed-seed0"}


def test_what_is_not_on_record_is_not_shown(make_tree):
    tree = make_tree((0,), ("dense", "ssd"))
    assert alone(tree) == set()
    assert not read(tree)[0].has_seconds
    # An interrupted run may have been beside any before its end, but not beside one that came later.
    place_in_time(tree, {"dense-seed0": (None, 10), "ssd-seed0": (11, 20)})
    assert alone(tree) == {"ssd-seed0"}
    place_in_time(tree, {"dense-seed0": (None, 30)})
    assert alone(tree) == set()


def test_a_cell_is_the_mean_and_the_range_where_seeds_differ():
    assert cell(measure_of([1.0, 2.0])) == "1.50 (1.00 to 2.00)"
    assert cell(measure_of([1.001, 1.002])) == "1.00"
    assert cell(measure_of([1.0, None])) == cell(None) == cell(measure_of([])) == "-"
