"""How far arms are above dense training, against losses that are chosen here."""

from math import exp, log2

import pytest

from ssd_lit.paths import run_dir
from ssd_lit.report.figures import figures_of
from ssd_lit.report.figures.gap import above_dense
from ssd_lit.report.results import load_results
from ssd_lit.tracking.metrics_log import MetricsLog
from tests.report.conftest import experiment


def validated(tree, run, losses):
    """Replace a run's validation losses."""
    path = run_dir(tree.results, run) / "metrics.jsonl"
    path.unlink()
    log = MetricsLog(path)
    for step, loss in losses.items():
        log.log(step, {"validation/loss": loss})
    log.close()


def test_each_point_is_compared_with_dense_training_of_its_seed_at_the_same_step(make_tree):
    tree = make_tree((0, 1), ("dense", "ssd"))
    for run in tree.runs:
        dense = {100: 5.0, 200: 4.0, 400: 3.0}  # a line over the logarithm of steps
        shift = run.seed if run.method == "dense" else 0.0
        # In the first dense phase, at its end, in a sparse phase, and at the end of the last dense one.
        losses = dense if run.method == "dense" else {50: 6.0, 120: 5.2 - log2(1.2), 160: 5.2 - log2(1.6), 400: 3.1}
        validated(tree, run, {step: loss + shift for step, loss in losses.items()})
    _, table = above_dense(load_results(tree.exp_dir, tree.runs))
    assert set(table["arm"]) == {"ssd"}
    for seed in (0, 1):
        rows = table[table["seed"] == seed].sort_values("step")
        assert rows["step"].tolist() == [120, 160, 400]  # dense training was not yet validated at step 50
        assert rows["mode"].tolist() == ["dense", "sparse", "dense"]
        assert rows["above_dense"].tolist() == pytest.approx([exp(gap - seed) - 1 for gap in (0.2, 0.2, 0.1)])


def test_runs_of_other_models_or_that_start_from_others_are_not_compared(many):
    _, table = above_dense(load_results(many.exp_dir, many.runs))
    others = {"dense", "small", "upcycle", "posthoc", "posthoc_norm"}
    assert not others & set(table["arm"])
    assert {"ssd", "sparse", "gate", "matched", "tau.tau_0.6"} <= set(table["arm"])


@pytest.mark.parametrize(
    ("arms", "drawn"), [(("dense", "ssd"), True), (("dense", "posthoc"), False), (("ssd",), False)]
)
def test_there_is_a_figure_where_something_was_trained_beside_dense_training(arms, drawn):
    assert ("above_dense" in figures_of(experiment((0,), arms))) is drawn
