"""Scores on other tasks in the table, the figures and the report, from files made up here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from ssd_lit.config import DownstreamConfig
from ssd_lit.paths import run_dir
from ssd_lit.report.downstream import blimp_table, glue_table, write_downstream
from ssd_lit.report.figures import figures_of, write_figures
from ssd_lit.report.page import write_report
from ssd_lit.report.results import load_results
from ssd_lit.support.files import write_json_checked
from tests.report.conftest import Tree, build, experiment
from tests.report.test_report import Page

FIELDS = {"a": "syntax", "b": "syntax", "c": "morphology"}


def glue_scores(mode: str, seed: int, run_seed: int) -> list[dict[str, Any]]:
    base = 0.80 - 0.02 * (mode == "dense_to_sparse") + 0.01 * seed + 0.04 * run_seed
    mine = {"mode": mode, "seed": seed}
    return [
        {"task": "mrpc", **mine, "accuracy": base - 0.1, "f1": base},
        {"task": "sst2", **mine, "accuracy": base + 0.1},
    ]


def fill(tree: Tree) -> None:
    """The dense arm and SSD are tried on both, MoE from scratch on nothing, post-hoc on BLiMP."""
    for run in tree.runs:
        modes = ["dense"] if run.arm == "dense" else ["dense", "dense_to_sparse", "sparse"]
        scores = [one for mode in modes for seed in (0, 1) for one in glue_scores(mode, seed, run.seed)]
        glue = {
            "examples": {"mrpc": {"train": 60, "dev": 20, "cut": 0}, "sst2": {"train": 20, "dev": 0, "cut": 10}},
            "baseline": {"mrpc": {"accuracy": 0.684, "f1": 0.812}, "sst2": {"accuracy": 0.509}},
            "scores": scores,
        }
        pairs = [
            {"mode": mode, "set": name, "field": field, "pairs": 10, "cut": 0, "accuracy": 0.5 + 0.1 * place}
            for mode in modes[::2]
            for place, (name, field) in enumerate(FIELDS.items())
        ]
        write_json_checked(run_dir(tree.results, run) / "downstream/downstream.json", {
            "glue": None if run.arm in ("sparse", "posthoc") else glue,
            "blimp": None if run.arm == "sparse" else {"scores": pairs},
            "left_out": {"glue": "a reason"} if run.arm == "sparse" else {},
        })  # fmt: skip


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    folder = tmp_path_factory.mktemp("tried")
    asked = DownstreamConfig.model_validate({"glue": {"folder": str(folder)}, "blimp": {"file": str(folder)}})
    tree = build(folder, experiment((0, 1)).model_copy(update={"downstream": asked}))
    fill(tree)
    return tree


def test_the_table_has_a_row_for_every_score(tried: Tree) -> None:
    table = pd.read_csv(write_downstream(tried.exp_dir, tried.runs))
    glue = table[table["benchmark"] == "glue"]
    assert len(glue) == 2 * (1 + 3) * 2 * 2
    (row,) = glue[
        (glue["run"] == "ssd-seed1")
        & (glue["task"] == "mrpc")
        & (glue["mode"] == "sparse")
        & (glue["tuning_seed"] == 1)
    ].to_dict("records")
    assert (row["accuracy"], row["f1"]) == pytest.approx((0.75, 0.85))
    assert row["arm"] == "ssd"
    assert pd.isna(row["pearson"])
    blimp = table[table["benchmark"] == "blimp"]
    assert len(blimp) == 2 * (1 + 2 + 2) * 3
    assert blimp["tuning_seed"].isna().all()


def test_means_and_ranges_are_over_all_seeds(tried: Tree) -> None:
    results = load_results(tried.exp_dir, tried.runs)
    glue = glue_table(results)
    assert glue is not None
    assert list(glue.headings) == ["SST-2, accuracy", "MRPC, accuracy", "MRPC, F1"]
    assert [arm for arm, _ in glue.arms] == ["Commonest class", "Dense", "SSD"]
    rows = dict(glue.arms)
    assert list(rows["Commonest class"][0][1]) == ["50.9", "68.4", "81.2"]
    assert [how for how, _ in rows["SSD"]] == [("dense", "dense"), ("dense", "sparse"), ("sparse", "sparse")]
    # Seeds of two runs by seeds of their fine-tunings: 80, 81, 84, 85.
    assert list(rows["SSD"][0][1])[2] == "82.5 (80.0 to 85.0)"
    assert list(rows["SSD"][1][1])[2] == "80.5 (78.0 to 83.0)"
    assert "10.0% of the examples" in glue.remark

    blimp = blimp_table(results)
    assert blimp is not None
    assert list(blimp.headings) == ["all sets", "syntax", "morphology"]
    assert dict(blimp.arms)["Dense"] == [(("dense",), ["60.0", "55.0", "70.0"])]
    assert [arm for arm, _ in blimp.arms] == ["Dense", "SSD", "Post-hoc <MoE>"]
    assert blimp.remark == ""


def test_figures_and_report_show_them(tried: Tree) -> None:
    write_figures(tried.exp_dir, tried.experiment)
    write_downstream(tried.exp_dir, tried.runs)
    drawn = pd.read_csv(tried.exp_dir / "figures/glue.csv")
    assert set(drawn["arm"]) == {"dense", "ssd"}
    assert (drawn["metric"].value_counts() == [32, 16]).all()
    html = write_report(tried.exp_dir, tried.experiment, tried.data_dir, {}).read_text(encoding="utf-8")
    page = Page(html)
    assert ["SSD", "dense", "dense"] in [row[:3] for row in page.rows]
    assert ["dense", "sparse"] in [row[:2] for row in page.rows]
    assert "82.5 (80.0 to 85.0)" in next(row for row in page.rows if row[:3] == ["SSD", "dense", "dense"])
    assert {"downstream.csv", "figures/glue.csv", "figures/blimp.csv", "#downstream"} <= set(page.links)


def test_an_experiment_that_asks_for_nothing_shows_nothing(make_tree: Callable[..., Tree]) -> None:
    tree = make_tree((0,), ("dense",))
    fill(tree)  # left over from an earlier config
    write_figures(tree.exp_dir, tree.experiment)
    html = write_report(tree.exp_dir, tree.experiment, tree.data_dir, {}).read_text(encoding="utf-8")
    assert 'id="downstream"' not in html
    assert not {"glue", "blimp"} & set(figures_of(tree.experiment))


def test_what_an_arm_scored_before_it_was_left_out_is_shown_no_more(tmp_path: Path) -> None:
    asked = DownstreamConfig.model_validate({"glue": {"folder": str(tmp_path)}})
    whole = experiment((0,), ("dense", "ssd"))
    arms = {**whole.arms, "ssd": whole.arms["ssd"].model_copy(update={"downstream": False})}
    tree = build(tmp_path, whole.model_copy(update={"downstream": asked, "arms": arms}))
    fill(tree)
    table = glue_table(load_results(tree.exp_dir, tree.runs))
    assert table is not None
    assert [name for name, _ in table.arms] == ["Commonest class", "Dense"]
    tried = write_downstream(tree.exp_dir, tree.experiment.downstream_runs())
    assert set(pd.read_csv(tried)["run"]) == {"dense-seed0"}


def test_a_figure_of_a_benchmark_that_nobody_was_tried_on_says_so(tmp_path: Path) -> None:
    asked = DownstreamConfig.model_validate({"glue": {"folder": str(tmp_path)}})
    tree = build(tmp_path, experiment((0,), ("sparse",)).model_copy(update={"downstream": asked}))
    fill(tree)
    write_figures(tree.exp_dir, tree.experiment)
    assert pd.read_csv(tree.exp_dir / "figures/glue.csv").empty
    assert glue_table(load_results(tree.exp_dir, tree.runs)) is None
