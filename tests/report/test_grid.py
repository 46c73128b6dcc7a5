import math

import pytest

from ssd_lit.report.figures.grid import grid as draw
from ssd_lit.report.grid import QUANTITIES, grids, page, table
from ssd_lit.report.results import load_results
from tests.report.conftest import FINAL


def mean(arm, mode, seeds=(0, 1)):
    """Mean perplexity of an arm: losses move by 0.004 from seed to seed."""
    return sum(math.exp(FINAL[arm][mode] + 0.004 * seed) for seed in seeds) / len(seeds)


def grid_of(tree, name):
    return next(grid for grid in grids(tree.experiment, load_results(tree.exp_dir, tree.runs)) if grid.name == name)


def test_cells_stand_in_the_order_of_the_yaml(many):
    tau, square = grid_of(many, "tau"), grid_of(many, "square")
    assert tau.keys == ("switching.tau",)
    assert [cell.values for cell in tau.cells] == [("0.9",), ("0.6",), ("0.75",)]
    assert [cell.arm.name for cell in tau.cells] == ["tau.tau_0.9", "tau.tau_0.6", "tau.tau_0.75"]
    assert square.values == (("4", "6", "8"), ("kmeans", "random"))
    assert square.ordered == (True, False)
    assert [cell.values for cell in square.cells] == [(k, how) for k in ("4", "6", "8") for how in ("kmeans", "random")]
    assert [cell.arm.config.moe.top_k for cell in square.cells] == [4, 4, 6, 6, 8, 8]


def test_page_tells_means_and_ranges_beside_the_dense_arm(many):
    rows = page(grid_of(many, "tau"))
    assert [arm.name for arm, _, _ in rows] == ["dense", "tau.tau_0.9", "tau.tau_0.6", "tau.tau_0.75"]
    titles = [quantity.title for quantity in QUANTITIES]
    dense = dict(zip(titles, rows[0][2], strict=True))
    assert dense["perplexity, sparse mode"] == dense["routing recall"] == "-"
    assert dense["FLOPs, relative to dense"] == "100.0%"
    told = dict(zip(titles, rows[1][2], strict=True))
    low, high = math.exp(3.47), math.exp(3.474)
    assert told["perplexity, sparse mode"] == f"{mean('tau.tau_0.9', 1):.2f} ({low:.2f} to {high:.2f})"
    # 160 of 400 steps at 2.2 instead of 3.0 MFLOP a token.
    assert told["sparse steps"] == "40.0%"
    assert told["FLOPs, relative to dense"] == f"{100 * (240 * 3.0 + 160 * 2.2) / 1200:.1f}%"
    assert told["routing recall"] == "80.0%"


def test_csv_has_a_row_a_run(many):
    rows = table(grid_of(many, "square"))
    assert len(rows) == 6 * 2 + 2
    one = rows[rows["run"] == "square.top_k_8.construction_random-seed1"].iloc[0]
    assert (one["moe.top_k"], one["moe.construction"], one["seed"], one["top_k"]) == ("8", "random", 1, 8)
    assert one["perplexity_sparse"] == pytest.approx(math.exp(3.42 + 0.004))
    dense = rows[rows["arm"] == "dense"]
    assert dense["perplexity_sparse"].isna().all()
    assert dense["relative_flops"].tolist() == [1.0, 1.0]


def test_figure_draws_the_means_along_the_first_key(many):
    figure, _ = draw(grid_of(many, "square"))
    dense, sparse, *_ = figure.axes
    for panel, mode in ((dense, 0), (sparse, 1)):
        assert [label.get_text() for label in panel.get_xticklabels()] == ["4", "6", "8"]
        drawn = [list(line.get_ydata()) for line in panel.lines if line.get_linestyle() == "-"]
        assert drawn == [
            pytest.approx([mean(f"square.top_k_{k}.construction_{how}", mode) for k in (4, 6, 8)])
            for how in ("kmeans", "random")
        ]
        reference = [line.get_ydata()[0] for line in panel.lines if line.get_linestyle() == "--"]
        assert reference == pytest.approx([mean("dense", 0)])


def test_a_single_seed_has_no_whiskers(many, make_tree):
    whiskers = [draw(grid_of(tree, "tau"))[0].axes[0].collections for tree in (many, make_tree((0,), ("tau",)))]
    assert [len(one) for one in whiskers] == [3, 0]


def test_without_a_dense_arm_there_is_nothing_to_compare_with(make_tree):
    grid = grid_of(make_tree((0,), ("tau",)), "tau")
    assert grid.reference is None
    rows = page(grid)
    assert len(rows) == 3
    assert all(told[3] == "-" for _, _, told in rows)
    assert table(grid)["relative_flops"].isna().all()
    figure, _ = draw(grid)
    assert not [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]


def test_the_reference_trains_for_all_its_steps_with_the_same_model(make_tree):
    tree = make_tree((0,), ("ssd", "matched", "small", "dense", "tau"))
    assert grid_of(tree, "tau").reference.name == "dense"


def test_ticks_say_where_they_are_however_near_the_cells(many):
    figure, _ = draw(grid_of(many, "tau"))
    recall, neurons = figure.axes[-1], figure.axes[-2]
    for panel, (low, high), unit in ((recall, (0.9805, 0.9815), 0.01), (neurons, (95.2, 95.9), 1.0)):
        panel.set_ylim(low, high)
        figure.canvas.draw()
        told = [float(label.get_text().rstrip("%")) * unit for label in panel.get_yticklabels()]
        assert told == pytest.approx(panel.get_yticks().tolist(), rel=1e-5)
