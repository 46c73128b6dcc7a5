"""Figures and tables of the analyses, from CSVs made up here."""

import math
from itertools import combinations_with_replacement, pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from ssd_lit.config import AnalysisConfig, load_experiment
from ssd_lit.paths import run_dir
from ssd_lit.report.figures import FIGURES, figures_of, write_figures
from ssd_lit.report.figures.analyses import (
    expert_load,
    main_setting,
    routing,
    similarity_pairs,
    similarity_settings,
)
from ssd_lit.report.page import write_report
from ssd_lit.report.results import RunResult, load_results
from ssd_lit.report.tables import token_tables
from ssd_lit.support.files import sha256, write_json_checked
from tests.conftest import tiny_experiment
from tests.report.conftest import LAYERS, STEPS, Tree, build, experiment

ROOT = Path(__file__).parents[2]
SNAPSHOTS = range(50, STEPS + 1, 50)
CONSTRUCTIONS, COUNTS, EXPERTS, K = ("kmeans", "random"), (8, 16, 32), 16, 6
KS = (1, 2, 4, 6, 8, 16)
OF_ANALYSES = ["similarity_pairs", "similarity_settings", "expert_load", "routing"]


def similarity(construction: str, count: int, layer: int, a: int, b: int, seed: int) -> float:
    if a == b:
        return 1.0
    if construction == "random":
        return 0.01 * math.sin(a + b)
    return math.exp(-(b - a) / (a + b) * (2 + count / 32 + layer / LAYERS + 0.1 * seed))


def loads(layer: int, seed: int) -> list[float]:
    """Adds up to K; the last 1 + layer experts are dead."""
    weights = np.array([(0.9 - 0.03 * seed) ** i if i < EXPERTS - 1 - layer else 0.0 for i in range(EXPERTS)])
    return list(np.random.default_rng(layer).permutation(K * weights / weights.sum()))


def write_tables(tree: Tree) -> None:
    for run in tree.runs:
        folder = run_dir(tree.results, run) / "analysis"
        folder.mkdir()
        if run.method != "posthoc":
            rows = [
                (name, count, layer, a, b, similarity(name, count, layer, a, b, run.seed))
                for name in CONSTRUCTIONS
                for count in COUNTS
                for a, b in combinations_with_replacement(SNAPSHOTS, 2)
                for layer in range(LAYERS)
            ]
            columns = ["construction", "experts", "layer", "step_a", "step_b", "similarity"]
            table = pd.DataFrame(rows, columns=columns)
            mean = table.groupby([one for one in columns if one not in ("layer", "similarity")], as_index=False)
            table = pd.concat([table, mean["similarity"].mean().assign(layer="mean")[columns]])
            table.to_csv(folder / "similarity.csv", index=False)
        if run.method != "dense":
            rows = [(layer, e, load) for layer in range(LAYERS) for e, load in enumerate(loads(layer, run.seed))]
            pd.DataFrame(rows, columns=["layer", "expert", "load"]).to_csv(folder / "load.csv", index=False)
            rows = []
            for layer in range(LAYERS):
                for k in KS:
                    oracle = 1 - (1 - k / EXPERTS) ** (2 + layer)
                    recall = 1 - 0.3 * (1 - k / EXPERTS) / (1 + layer + run.seed)
                    rows.append((layer, k, recall * oracle, oracle, recall))
            columns = ["layer", "top_k", "chosen_share", "oracle_share", "recall"]
            pd.DataFrame(rows, columns=columns).to_csv(folder / "routing.csv", index=False)
            rows = [
                (layer, e, rank, 100 + rank, text, 40, 30 - rank, 2.5 - 0.5 * rank)
                for layer in range(LAYERS)
                for e in np.flatnonzero(loads(layer, run.seed))
                for rank, text in enumerate(("␣the", "NA", "<b>"), start=1)
            ]
            columns = ["layer", "expert", "rank", "token_id", "token", "seen", "count", "lift"]
            pd.DataFrame(rows, columns=columns).to_csv(folder / "tokens.csv", index=False)
        digests = {path.name: sha256(path) for path in folder.iterdir()}
        write_json_checked(folder / "analysis.json", {"digests": digests})


def analysed(root: Path, seeds: tuple[int, ...]) -> Tree:
    settings = AnalysisConfig(experts=list(COUNTS), constructions=list(CONSTRUCTIONS))
    tree = build(root, experiment(seeds).model_copy(update={"analysis": settings}))
    write_tables(tree)
    return tree


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return analysed(tmp_path_factory.mktemp("one"), (0,))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return analysed(tmp_path_factory.mktemp("two"), (0, 1))


def results(tree: Tree) -> list[RunResult]:
    return load_results(tree.exp_dir, tree.runs)


def panels(figure) -> dict[str, object]:
    return {axes.get_title().split("\n")[0]: axes for axes in figure.axes if axes.get_title()}


def test_a_heat_map_an_arm_holds_the_mean_over_seeds_both_ways(two: Tree) -> None:
    figure, table = similarity_pairs(results(two))
    maps = panels(figure)
    assert list(maps) == ["Dense", "SSD", "MoE from scratch"]
    assert set(table["construction"]) == {"kmeans"}
    assert set(table["experts"]) == {EXPERTS}
    for arm, axes in zip(("dense", "ssd", "sparse"), maps.values(), strict=True):
        drawn = axes.collections[0].get_array().reshape(len(SNAPSHOTS), len(SNAPSHOTS))
        mine = table[table["arm"] == arm]
        for i, a in enumerate(SNAPSHOTS):
            assert drawn[i, i] == 1
            for j, b in enumerate(SNAPSHOTS):
                values = mine[(mine["step_a"] == min(a, b)) & (mine["step_b"] == max(a, b))]["similarity"]
                assert len(values) == 2
                assert drawn[i, j] == pytest.approx(values.mean())


def test_bars_beside_a_heat_map_are_the_sparse_phases(one: Tree) -> None:
    loaded = results(one)
    figure, _ = similarity_pairs(loaded)
    spans = next(result for result in loaded if result.arm == "ssd").sparse_spans()
    bars = panels(figure)["SSD"].patches
    above = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars if bar.get_height() == 0.03]
    beside = [(bar.get_y(), bar.get_y() + bar.get_height()) for bar in bars if bar.get_width() == 0.03]
    assert above == beside == [pytest.approx(span) for span in spans]
    assert not panels(figure)["Dense"].patches


def test_successive_snapshots_by_clusters_and_by_construction(one: Tree) -> None:
    figure, table = similarity_settings(results(one))
    assert len(figure.axes) == 2 * 3
    steps = sorted(set(zip(table["step_a"], table["step_b"], strict=True)))
    assert steps == list(pairwise(SNAPSHOTS))
    left, right = figure.axes[2:4]
    assert left.get_title() == "SSD: kmeans"
    assert right.get_title() == f"SSD: E = {EXPERTS}"
    mine = table[table["arm"] == "ssd"]
    expected = [("kmeans", count) for count in COUNTS], [(name, EXPERTS) for name in CONSTRUCTIONS]
    for axes, settings in zip((left, right), expected, strict=True):
        assert len(axes.lines) == len(settings)
        for line, (name, count) in zip(axes.lines, settings, strict=True):
            values = mine[(mine["construction"] == name) & (mine["experts"] == count)]
            assert list(line.get_xdata()) == values["step_b"].tolist()
            assert list(line.get_ydata()) == pytest.approx(values["similarity"].tolist())


def test_the_setting_shown_is_the_nearest_to_the_runs_own(one: Tree) -> None:
    config = one.runs[0]
    table = pd.DataFrame({"construction": ["random", "kmeans", "random"], "experts": [8, 20, 64]})
    assert main_setting(table, config) == ("kmeans", 20)
    assert main_setting(table[table["construction"] == "random"], config) == ("random", 8)


def test_load_falls_from_the_busiest_expert_and_the_dead_are_counted(two: Tree) -> None:
    figure, table = expert_load(results(two))
    arms = panels(figure)
    assert list(arms) == ["SSD", "MoE from scratch", "Post-hoc <MoE>"]
    dead = sum(1 + layer for layer in range(LAYERS))
    for axes in arms.values():
        assert [text.get_text() for text in axes.texts] == [f"{dead} of {LAYERS * EXPERTS} experts dead"]
        curves = axes.lines[:LAYERS]
        for layer, line in enumerate(curves):
            mean = np.mean([sorted(loads(layer, seed), reverse=True) for seed in (0, 1)], axis=0)
            assert list(line.get_ydata()) == pytest.approx(list(mean))
        assert list(axes.lines[LAYERS].get_ydata()) == pytest.approx([K / EXPERTS] * 2)
    for _, rows in table.groupby(["run", "layer"]):
        assert rows["load"].is_monotonic_decreasing
        assert rows["load"].sum() == pytest.approx(K)
        assert sorted(rows["expert"]) == list(range(EXPERTS))


def test_routing_is_the_mean_over_layers_with_their_range(one: Tree) -> None:
    figure, table = routing(results(one))
    arms = panels(figure)
    assert list(arms) == ["SSD", "MoE from scratch", "Post-hoc <MoE>"]
    mine = table[table["arm"] == "ssd"].groupby("top_k")
    curve, ring, chance = arms["SSD"].lines
    assert list(curve.get_xdata()) == list(KS)
    assert list(curve.get_ydata()) == pytest.approx(mine["recall"].mean().tolist())
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (K, pytest.approx(mine["recall"].mean()[K]))
    expected = [np.mean([k / EXPERTS / (1 - (1 - k / EXPERTS) ** (2 + layer)) for layer in range(LAYERS)]) for k in KS]
    assert list(chance.get_ydata()) == pytest.approx(expected)
    corners = arms["SSD"].collections[0].get_paths()[0].vertices
    at_two = [y for x, y in corners if x == 2]
    assert (min(at_two), max(at_two)) == (
        pytest.approx(mine["recall"].min()[2]),
        pytest.approx(mine["recall"].max()[2]),
    )


def test_tokens_of_the_busiest_experts_of_the_first_and_last_layer(two: Tree) -> None:
    tables = token_tables(results(two))
    assert [result.name for result, _ in tables] == ["ssd-seed0", "sparse-seed0", "posthoc-seed0"]
    for _, experts in tables:
        assert [one.layer for one in experts] == [0] * 8 + [LAYERS - 1] * 8
        for layer in (0, LAYERS - 1):
            shares = [one.load for one in experts if one.layer == layer]
            assert shares == pytest.approx(sorted(loads(layer, 0), reverse=True)[:8])
        assert [token.text for token in experts[0].tokens] == ["␣the", "NA", "<b>"]
        assert [token.lift for token in experts[0].tokens] == [2.0, 1.5, 1.0]


def test_the_report_has_figures_and_tokens(two: Tree) -> None:
    write_figures(two.exp_dir, two.experiment)
    html = write_report(two.exp_dir, two.experiment, two.data_dir, {}).read_text()
    for name in OF_ANALYSES:
        assert FIGURES[name].title in html
    assert html.count("<code>NA</code> 1.5") == 3 * 16
    assert "<b></code>" not in html
    assert "&lt;b&gt;" in html
    for arm in ("ssd", "sparse", "posthoc"):
        link = f"runs/{arm}-seed0/analysis/tokens.csv"
        assert f'href="{link}"' in html
        assert (two.exp_dir / link).is_file()


def test_runs_without_tables_are_no_error(make_tree) -> None:
    tree = make_tree((0,), ("dense",))
    for draw in (similarity_pairs, similarity_settings, expert_load, routing):
        figure, table = draw(results(tree))
        assert not figure.axes
        assert len(table) == 0
        assert {"run", "arm", "seed"} <= set(table.columns)
    assert token_tables(results(tree)) == []


def test_only_an_experiment_with_analyses_has_their_figures(tmp_path: Path) -> None:
    plain = load_experiment(tiny_experiment(tmp_path))
    asked = load_experiment(tiny_experiment(tmp_path, analysis={}))
    assert not set(OF_ANALYSES) & set(figures_of(plain))
    assert [name for name in figures_of(asked) if name not in figures_of(plain)] == OF_ANALYSES


def test_the_shipped_analyses_take_a_snapshot_that_divides_training() -> None:
    for run in load_experiment(ROOT / "configs/analysis.yaml").runs():
        assert run.training.snapshot_every is not None
        assert run.training.steps % run.training.snapshot_every == 0
