import pytest
from matplotlib import image

from ssd_lit.layout import read_chain, run_dir
from ssd_lit.reporting.curves import over_seeds
from ssd_lit.reporting.figures import write_figures
from ssd_lit.reporting.loss_figures import over_flops, over_steps
from ssd_lit.reporting.names import figure_names
from ssd_lit.reporting.perplexity_figure import over_k
from ssd_lit.reporting.runs import load_results
from ssd_lit.reporting.style import arm_styles


def test_every_figure_with_its_data_and_the_same_bytes_twice(two_seeds):
    written = write_figures(two_seeds.exp_dir, two_seeds.experiment)
    names = [f"{name}{suffix}" for name in figure_names(two_seeds.experiment) for suffix in (".svg", ".png", ".csv")]
    assert [path.name for path in written] == names
    first = {path: path.read_bytes() for path in written}
    write_figures(two_seeds.exp_dir, two_seeds.experiment)
    assert {path: path.read_bytes() for path in written} == first
    for path in written:
        if path.suffix == ".svg":
            assert b"<dc:date>" not in first[path]
        if path.suffix == ".png":
            assert image.imread(path).shape[1] > 1200


def test_shaded_stretches_are_the_sparse_phases(tree):
    """What is drawn in the plot and in the lanes, against the phase records."""
    ssd = next(run for run in tree.runs if run.method == "ssd")
    chain = read_chain(run_dir(tree.results, ssd), "dense")
    sparse = [phase for phase in chain if phase.mode == "sparse"]
    assert len(sparse) == 2
    results = load_results(tree.exp_dir, tree.runs)
    ends = {
        over_steps: [(phase.first_step, phase.last_step) for phase in sparse],
        over_flops: [(phase.total.flops - phase.flops, phase.total.flops) for phase in sparse],
    }
    for draw, expected in ends.items():
        figure, _ = draw(results)
        plot, _, lanes, _ = figure.axes
        shaded = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in plot.patches]
        assert shaded == [pytest.approx(span) for span in expected]
        # In the lane of the SSD run, the second of three, sparse phases are opaque.
        filled = [bar for bar in lanes.patches if round(bar.get_y() + 0.35) == 1 and bar.get_alpha() == 1.0]
        assert [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in filled] == shaded


def test_data_of_the_loss_figure(tree):
    results = load_results(tree.exp_dir, tree.runs)
    _, table = over_flops(results)
    last = table[(table["run"] == "ssd-seed0") & (table["what"] == "validation/loss")].iloc[-1]
    result = next(one for one in results if one.name == "ssd-seed0")
    assert (last["step"], last["value"]) == result.points["validation/loss"][-1]
    assert last["flops"] == pytest.approx(result.total.flops)
    begins = table[table["what"] == "phase 02-sparse begins"]
    assert begins["step"].tolist() == [120]


def test_perplexity_table_holds_the_curve(tree):
    results = load_results(tree.exp_dir, tree.runs)
    _, table = over_k(results)
    assert set(table.loc[table["mode"] == "sparse", "arm"]) == {"ssd", "sparse", "posthoc"}
    result = next(one for one in results if one.name == "ssd-seed0")
    at_k = table[(table["run"] == "ssd-seed0") & (table["k"] == 6)]["perplexity"].item()
    assert at_k == pytest.approx(result.ppl_sparse)


@pytest.mark.parametrize("arms", [("ssd",), ("dense", "posthoc")])
def test_missing_arms_are_no_error(make_tree, arms):
    tree = make_tree((0,), arms)
    assert len(write_figures(tree.exp_dir, tree.experiment)) == 3 * len(FIGURES)


def test_band_is_the_range_over_seeds():
    band = over_seeds([[(0, 1.0), (10, 3.0)], [(0, 3.0), (5, 2.0), (20, 0.0)]])
    assert band.x.tolist() == [0, 5, 10]
    assert band.mean.tolist() == pytest.approx([2.0, 2.0, (3 + 4 / 3) / 2])
    assert band.low.tolist() == pytest.approx([1.0, 2.0, 4 / 3])
    assert band.high.tolist() == pytest.approx([3.0, 2.0, 3.0])


def test_an_arm_has_one_colour_whatever_the_seeds(tree, two_seeds):
    one, two = (arm_styles(load_results(each.exp_dir, each.runs)) for each in (tree, two_seeds))
    assert one == two
    assert len({style.colour for style in one.values()}) == 4
