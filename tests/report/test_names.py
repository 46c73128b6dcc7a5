import subprocess
import sys
from pathlib import Path

from ssd_lit.report.figures import FIGURES, figure_kinds, write_figures
from ssd_lit.report.names import caption_name, figure_names
from ssd_lit.report.runs import load_results
from tests.report import conftest

CAPTIONS = Path(__file__).parents[2] / "workflow" / "report"


def test_figures_of_every_experiment_then_those_of_its_grids(tree, many):
    assert figure_names(many.experiment) == [*figure_names(tree.experiment), "grid_tau", "grid_square"]


def test_every_figure_named_can_be_drawn_and_has_a_caption(many):
    results = load_results(many.exp_dir, many.runs)
    assert list(figure_kinds(many.experiment, results)) == figure_names(many.experiment)
    for name in (*FIGURES, *figure_names(many.experiment)):
        assert (CAPTIONS / f"{caption_name(name)}.rst").read_text()


def test_the_workflow_needs_no_figure_library_to_name_them():
    code = "import sys, ssd_lit.report.names; print(sorted({'matplotlib', 'pandas', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_dot_in_an_arm_s_name_stays_in_its_figure_s_name(make_tree, monkeypatch):
    monkeypatch.setitem(conftest.GRIDS, "sweep.one", conftest.GRIDS["tau"])
    for value in (0.9, 0.6, 0.75):
        monkeypatch.setitem(conftest.FINAL, f"sweep.one.tau_{value}", (3.3, 3.4))
    tree = make_tree((0,), ("dense", "sweep.one"))
    written = [path.name for path in write_figures(tree.exp_dir, tree.experiment)]
    assert written[-3:] == ["grid_sweep.one.svg", "grid_sweep.one.png", "grid_sweep.one.csv"]
