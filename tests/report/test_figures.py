import pytest
from matplotlib import image
from matplotlib.text import Text

from ssd_lit.paths import run_dir
from ssd_lit.records import read_chain
from ssd_lit.report import router_figure
from ssd_lit.report.activation_figures import active_neurons
from ssd_lit.report.arms import arms_of
from ssd_lit.report.curves import over_seeds
from ssd_lit.report.figures import write_figures
from ssd_lit.report.loss_figures import over_flops, over_seconds, over_steps
from ssd_lit.report.names import figure_names
from ssd_lit.report.perplexity_figure import over_k
from ssd_lit.report.runs import by_arm, load_results
from ssd_lit.report.style import arm_styles, save
from ssd_lit.report.view import MOST_CURVES, MOST_PANELS, select_arms
from tests.report.conftest import ARMS, OTHERS, THRESHOLDS


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


def test_a_label_is_drawn_as_it_stands(make_tree, monkeypatch):
    """Of half a formula matplotlib says nothing but that it cannot be parsed; and no axis is left with formulas."""
    drawn = []

    def kept(figure, stem):
        written = save(figure, stem)
        drawn.extend(text.get_text() for text in figure.findobj(Text))
        return written

    monkeypatch.setattr("ssd_lit.report.figures.save", kept)
    label = r"5 $ or \frac{1}$"
    monkeypatch.setitem(ARMS, "ssd", {"method": "ssd", "label": label})
    tree = make_tree((0,))
    write_figures(tree.exp_dir, tree.experiment)
    assert label in drawn
    assert not [text for text in drawn if "mathdefault" in text]


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
        over_seconds: [(phase.total.seconds - phase.seconds, phase.total.seconds) for phase in sparse],
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


def test_time_is_that_of_the_whole_training(many):
    """Against the phase records, for a run that starts from another."""
    results = load_results(many.exp_dir, many.runs)
    _, table = over_seconds(results)
    loss = table[(table["run"] == "upcycle-seed0") & (table["what"] == "validation/loss")]
    result = next(one for one in results if one.name == "upcycle-seed0")
    start = next(one for one in results if one.name == "dense-seed0").total.seconds
    moefy, sparse = result.chain
    assert loss["seconds"].iloc[-1] == pytest.approx(result.total.seconds)
    steps = loss["step"] / sparse.steps
    assert loss["seconds"].tolist() == pytest.approx((start + moefy.seconds + steps * sparse.seconds).tolist())


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
    assert len(write_figures(tree.exp_dir, tree.experiment)) == 3 * len(figure_names(tree.experiment))


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


def test_router_table_holds_own_router_oracle_and_dynamic_k(many):
    results = {result.name: result for result in load_results(many.exp_dir, many.runs)}
    _, table = router_figure.over_k(list(results.values()))
    rows = table[table["run"] == "ssd_mass-seed1"].set_index("choice")
    assert set(rows["router"]) == {"mass_mlp"}
    at_k = rows[rows["k"] == 6]
    assert at_k.loc["own", "perplexity"] == pytest.approx(results["ssd_mass-seed1"].ppl_sparse)
    assert at_k.loc["oracle", "perplexity"] == pytest.approx(results["ssd_mass-seed1"].ppl_oracle)
    # The weights are those of the arm without the trained router.
    assert at_k.loc["oracle", "perplexity"] == pytest.approx(results["ssd-seed1"].ppl_oracle)
    assert rows.loc["dynamic", ["threshold", "k"]].to_numpy().tolist() == [list(point) for point in THRESHOLDS]
    assert set(table.loc[table["arm"] == "upcycle", "choice"]) == {"own"}
    assert set(table["arm"]) == {result.arm for result in results.values() if result.evaluation.curve}


def test_arms_that_differ_in_their_router_only_stand_together_on_one_scale(make_tree):
    tree = make_tree((0,), (*ARMS, *OTHERS))
    results = load_results(tree.exp_dir, tree.runs)
    groups = [[arm.name for arm in group] for group in router_figure.by_router(arms_of(results))]
    assert ["ssd", "ssd_mass"] in groups
    assert ["sparse", "gate"] in groups
    assert ["posthoc", "posthoc_norm"] in groups
    assert ["dropout"] in groups
    figure, _ = router_figure.over_k(results)
    panels = {axes.get_title().splitlines()[0]: axes.get_ylim() for axes in figure.axes if axes.get_title()}
    assert panels["SSD"] == panels["SSD, mass router"]
    assert panels["SSD"] != panels["SSD, fixed switches"]


def test_a_model_without_a_dense_mode_has_no_dashed_line(make_tree):
    tree = make_tree((0,), ("dense", "upcycle", "gate"))
    figure, table = over_k(load_results(tree.exp_dir, tree.runs))
    dashed = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    dense = table[(table["mode"] == "dense") & (table["arm"] == "dense")]["perplexity"].item()
    assert dashed == [dense]


def test_with_many_arms_the_cells_of_grids_are_left_out_of_the_figures_but_not_of_their_data(many):
    results = load_results(many.exp_dir, many.runs)
    alone = set(by_arm(results)) - {"tau", "square"}
    shown = {result.arm for result in select_arms(results, MOST_CURVES)}
    assert shown == {*ARMS, *OTHERS}
    for draw in (over_steps, over_k, active_neurons, router_figure.over_k):
        figure, table = draw(results)
        assert "9 cells of grids are not drawn here" in figure.get_supxlabel()
        assert {"tau.tau_0.6", "square.top_k_4.construction_random"} <= set(table["arm"]) <= alone


def test_with_few_arms_cells_are_drawn_in_a_ramp_of_their_own(make_tree):
    tree = make_tree((0,), ("dense", "tau"))
    results = load_results(tree.exp_dir, tree.runs)
    assert select_arms(results, MOST_PANELS) == results
    styles = arm_styles(results)
    assert styles["dense"] == arm_styles(results[:1])["dense"]
    assert len({style.colour for style in styles.values()}) == 4
    figure, _ = active_neurons(results)
    assert figure.get_supxlabel() == ""
