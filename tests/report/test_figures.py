import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from jinja2 import Template
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Text

from ssd_lit.paths import run_dir
from ssd_lit.records import read_chain
from ssd_lit.report.arms import arms_of
from ssd_lit.report.figures import FIGURES, drawing, figures_of, write_figures
from ssd_lit.report.figures.sparse_mode import by_router, perplexity_over_k, router_over_k
from ssd_lit.report.figures.style import (
    MOST_ARMS,
    MOST_CURVES,
    MOST_PANELS,
    arm_label,
    arm_styles,
    note_left_out,
    over_seeds,
    save,
    select_arms,
)
from ssd_lit.report.figures.training import active_neurons, loss_over_flops, loss_over_seconds, loss_over_steps
from ssd_lit.report.results import by_arm, load_results
from tests.report import conftest
from tests.report.conftest import ARMS, OTHERS, THRESHOLDS


def test_every_figure_with_its_data_and_the_same_bytes_twice(two_seeds):
    written = write_figures(two_seeds.exp_dir, two_seeds.experiment)
    names = [f"{name}{suffix}" for name in figures_of(two_seeds.experiment) for suffix in (".svg", ".png", ".csv")]
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

    monkeypatch.setattr("ssd_lit.report.figures.style.save", kept)
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
        loss_over_steps: [(phase.first_step, phase.last_step) for phase in sparse],
        loss_over_flops: [(phase.total.flops - phase.flops, phase.total.flops) for phase in sparse],
        loss_over_seconds: [(phase.total.seconds - phase.seconds, phase.total.seconds) for phase in sparse],
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
    _, table = loss_over_flops(results)
    last = table[(table["run"] == "ssd-seed0") & (table["what"] == "validation/loss")].iloc[-1]
    result = next(one for one in results if one.name == "ssd-seed0")
    assert (last["step"], last["value"]) == result.points["validation/loss"][-1]
    assert last["flops"] == pytest.approx(result.total.flops)
    begins = table[table["what"] == "phase 02-sparse begins"]
    assert begins["step"].tolist() == [120]


def test_time_is_that_of_the_whole_training(many):
    """Against the phase records, for a run that starts from another."""
    results = load_results(many.exp_dir, many.runs)
    _, table = loss_over_seconds(results)
    loss = table[(table["run"] == "upcycle-seed0") & (table["what"] == "validation/loss")]
    result = next(one for one in results if one.name == "upcycle-seed0")
    start = next(one for one in results if one.name == "dense-seed0").total.seconds
    moefy, sparse = result.chain
    assert loss["seconds"].iloc[-1] == pytest.approx(result.total.seconds)
    steps = loss["step"] / sparse.steps
    assert loss["seconds"].tolist() == pytest.approx((start + moefy.seconds + steps * sparse.seconds).tolist())


def test_perplexity_table_holds_the_curve(tree):
    results = load_results(tree.exp_dir, tree.runs)
    _, table = perplexity_over_k(results)
    assert set(table.loc[table["mode"] == "sparse", "arm"]) == {"ssd", "sparse", "posthoc"}
    result = next(one for one in results if one.name == "ssd-seed0")
    at_k = table[(table["run"] == "ssd-seed0") & (table["k"] == 6)]["perplexity"].item()
    assert at_k == pytest.approx(result.ppl_sparse)


@pytest.mark.parametrize("arms", [("ssd",), ("dense", "posthoc")])
def test_missing_arms_are_no_error(make_tree, arms):
    tree = make_tree((0,), arms)
    assert len(write_figures(tree.exp_dir, tree.experiment)) == 3 * len(figures_of(tree.experiment))


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
    _, table = router_over_k(list(results.values()))
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
    groups = [[arm.name for arm in group] for group in by_router(arms_of(results))]
    assert ["ssd", "ssd_mass"] in groups
    assert ["sparse", "gate"] in groups
    assert ["posthoc", "posthoc_norm"] in groups
    assert ["dropout"] in groups
    figure, _ = router_over_k(results)
    panels = {axes.get_title().splitlines()[0]: axes.get_ylim() for axes in figure.axes if axes.get_title()}
    assert panels["SSD"] == panels["SSD, mass router"]
    assert panels["SSD"] != panels["SSD, fixed switches"]


def test_a_model_without_a_dense_mode_has_no_level_line(make_tree):
    tree = make_tree((0,), ("dense", "upcycle", "gate"))
    figure, table = perplexity_over_k(load_results(tree.exp_dir, tree.runs))
    level = [line.get_ydata() for line in figure.axes[0].lines if list(line.get_xdata()) == [0, 1]]
    dense = table[(table["mode"] == "dense") & (table["arm"] == "dense")]["perplexity"].item()
    assert {values[0] for values in level} == {dense}


def test_with_many_arms_the_cells_of_grids_are_left_out_of_the_figures_but_not_of_their_data(many):
    results = load_results(many.exp_dir, many.runs)
    alone = set(by_arm(results)) - {"tau", "square"}
    shown = {result.arm for result in select_arms(results, MOST_CURVES)}
    assert shown == {*ARMS, *OTHERS}
    for draw in (loss_over_steps, perplexity_over_k, active_neurons, router_over_k):
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


def test_no_two_arms_of_a_figure_share_a_colour_and_a_line(make_tree, monkeypatch):
    """Of 30 arms as many as a figure draws stand in its legend, each in a look of its own."""
    labels = {f"arm{i:02d}": f"An arm with a label that is too long for a legend, the {i}th" for i in range(30)}
    for i, (name, label) in enumerate(labels.items()):
        monkeypatch.setitem(conftest.OTHERS, name, {"method": "dense" if i % 3 else "ssd", "label": label})
        monkeypatch.setitem(conftest.FINAL, name, (3.3, None if i % 3 else 3.4))
    tree = make_tree((0,), tuple(labels))
    results = load_results(tree.exp_dir, tree.runs)
    styles = arm_styles(results)
    assert len({(style.colour, style.line) for style in styles.values()}) == 30
    shown = {arm_label(result) for result in results}
    for draw in (loss_over_steps, perplexity_over_k):
        figure, _ = draw(results)
        (legend,) = figure.legends
        keys = [
            (line.get_color(), str(line._dash_pattern))
            for line, text in zip(legend.legend_handles, legend.get_texts(), strict=True)
            if text.get_text() in shown
        ]
        assert len(keys) == len(set(keys)) == MOST_ARMS


def test_lanes_and_legend_have_the_same_labels(make_tree, monkeypatch):
    label = "Dense training that goes on for as long as all the others"
    monkeypatch.setitem(ARMS, "dense", {"method": "dense", "label": label})
    tree = make_tree((0,))
    results = load_results(tree.exp_dir, tree.runs)
    figure, _ = loss_over_steps(results)
    lanes = [text.get_text() for text in figure.axes[2].get_yticklabels()]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert lanes == legend[: len(lanes)]
    assert len(lanes) == 3
    assert len(lanes[0]) == 30


def test_figures_of_every_experiment_then_those_of_its_grids(tree, many):
    assert list(figures_of(many.experiment)) == [*figures_of(tree.experiment), "grid_tau", "grid_square"]


def test_every_figure_can_be_drawn_and_its_caption_is_filled_in(many):
    for name, kind in (FIGURES | figures_of(many.experiment)).items():
        assert callable(drawing(kind)), name
    kinds = figures_of(many.experiment)
    for kind in kinds.values():
        assert kind.caption.endswith(".")
        assert "{" not in kind.title + kind.caption
    blocks = many.runs[0].training.validation_blocks
    for axis in ("steps", "flops", "seconds"):
        assert f"on {blocks} validation blocks" in kinds[f"loss_over_{axis}"].caption
    assert kinds["grid_square"].title == "Grid: SSD over k and construction"
    assert "moe.top_k and moe.construction" in kinds["grid_square"].caption


def test_snakemake_finds_the_caption_of_each_figure(many):
    template = Template((Path(__file__).parents[2] / "workflow/report/figure.rst").read_text())
    captions = {name: kind.caption for name, kind in figures_of(many.experiment).items()}
    for name, caption in captions.items():
        job = SimpleNamespace(params=SimpleNamespace(captions=captions), wildcards=SimpleNamespace(figure=name))
        assert template.render(snakemake=job) == caption


def test_the_workflow_needs_no_figure_library_to_name_them():
    code = "import sys, ssd_lit.report.figures; print(sorted({'matplotlib', 'pandas', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dot_in_an_arm_s_name_stays_in_its_figure_s_name(make_tree, monkeypatch):
    monkeypatch.setitem(conftest.GRIDS, "sweep.one", conftest.GRIDS["tau"])
    for value in (0.9, 0.6, 0.75):
        monkeypatch.setitem(conftest.FINAL, f"sweep.one.tau_{value}", (3.3, 3.4))
    tree = make_tree((0,), ("dense", "sweep.one"))
    written = [path.name for path in write_figures(tree.exp_dir, tree.experiment)]
    assert written[-3:] == ["grid_sweep.one.svg", "grid_sweep.one.png", "grid_sweep.one.csv"]


def made_up(count, *, cells=0):
    """So many arms with two seeds each, the last of them cells of a grid."""
    return [SimpleNamespace(arm=f"arm{i}", is_cell=i >= count - cells) for i in range(count) for _ in range(2)]


def remark(results, drawn):
    figure = Figure()
    note_left_out(figure, results, drawn)
    return figure.get_supxlabel()


def test_of_very_many_arms_the_first_are_drawn_and_the_others_are_told():
    results = made_up(100)
    drawn = select_arms(results, most=9)
    assert drawn == results[: 2 * MOST_ARMS]
    assert remark(results, drawn) == f"{100 - MOST_ARMS} more arms are not drawn here: see the CSV of this figure."


def test_cells_of_grids_leave_room_for_the_arms_beside_them():
    results = made_up(100, cells=96)
    drawn = select_arms(results, most=9)
    assert drawn == results[:8]
    assert remark(results, drawn).startswith("96 cells of grids are not drawn here")
    assert select_arms(results[:12], most=9) == results[:12]
