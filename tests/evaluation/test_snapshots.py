"""Snapshots written by hand, whose clusters are known, and those of a real run."""

from itertools import combinations_with_replacement
from pathlib import Path

import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from ssd_lit.config import AnalysisConfig
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.evaluation.snapshots import COLUMNS, compare_snapshots, fitting_experts
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.permutation import permute_neurons
from ssd_lit.paths import snapshot_path, snapshots
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import build_model, load_beside_routers, read_checkpoint, weights_of
from tests.conftest import Bench

LAYERS, D_FF, EXPERTS, STEPS = 2, 32, 4, (10, 20, 40)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("pattern"))


@pytest.fixture(scope="module")
def model(bench: Bench) -> LanguageModel:
    return build_model(bench.runs["ssd"], VocabInfo.of(load_index(bench.data / "tokens")))


def balanced_labels(seed: int, experts: int = EXPERTS) -> Tensor:
    return (torch.arange(D_FF) % experts)[torch.randperm(D_FF, generator=torch.Generator().manual_seed(seed))]


def save(model: LanguageModel, run_dir: Path, step: int) -> None:
    path = snapshot_path(run_dir, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": weights_of(model)}, path)


@torch.no_grad()
def write_clusters(model: LanguageModel, run_dir: Path, step: int, labels: list[Tensor]) -> None:
    """A snapshot whose neurons point to one of EXPERTS directions each, by the labels of their ids."""
    for ffn, of_id in zip(model.ffns, labels, strict=True):
        ffn.w_in.copy_(0.01 * torch.randn_like(ffn.w_in))
        ffn.w_in[torch.arange(D_FF), of_id[ffn.neuron_ids]] += 1
    save(model, run_dir, step)


@torch.no_grad()
def shuffle(model: LanguageModel) -> None:
    for ffn in model.ffns:
        permute_neurons(ffn, torch.randperm(D_FF))


def compare(bench: Bench, run_dir: Path, **settings: object) -> pd.DataFrame:
    chosen = AnalysisConfig.model_validate({"experts": [EXPERTS], "constructions": ["kmeans"], **settings})
    return compare_snapshots(Run(run_dir, bench.results, bench.runs["ssd"]), chosen)


def of(table: pd.DataFrame, construction: str, a: int, b: int, layer: int | str = "mean") -> float:
    at = (table["construction"] == construction) & (table["step_a"] == a) & (table["step_b"] == b)
    return float(table[at & (table["layer"] == layer)]["similarity"].item())


def test_known_clusters_give_their_adjusted_rand_index(bench: Bench, model: LanguageModel, tmp_path: Path) -> None:
    labels = {step: [balanced_labels(step + layer) for layer in range(LAYERS)] for step in STEPS}
    for step in STEPS:
        shuffle(model)
        write_clusters(model, tmp_path, step, labels[step])
    table = compare(bench, tmp_path)
    assert list(table.columns) == COLUMNS
    for a, b in combinations_with_replacement(STEPS, 2):
        expected = [adjusted_rand_score(x, y) for x, y in zip(labels[a], labels[b], strict=True)]
        assert [of(table, "kmeans", a, b, layer) for layer in range(LAYERS)] == pytest.approx(expected)
        assert of(table, "kmeans", a, b) == pytest.approx(sum(expected) / LAYERS)
    assert len(table) == 6 * (LAYERS + 1)


def test_the_order_of_neurons_does_not_matter(bench: Bench, model: LanguageModel, tmp_path: Path) -> None:
    for folder in ("plain", "moved"):
        for step in STEPS:
            torch.manual_seed(step)
            with torch.no_grad():
                for ffn in model.ffns:
                    ffn.neuron_ids.copy_(torch.arange(D_FF))
                    for parameter in ffn.neuron_parameters():
                        parameter.copy_(torch.randn_like(parameter))
            if folder == "moved":
                shuffle(model)
            save(model, tmp_path / folder, step)
    names = ["kmeans", "kmeans_activations", "coactivation", "random"]
    plain, moved = (compare(bench, tmp_path / folder, constructions=names) for folder in ("plain", "moved"))
    pd.testing.assert_frame_equal(plain, moved)
    assert {of(plain, name, step, step) for name in names for step in STEPS} == {1.0}
    # Weights drawn anew have nothing in common, and random clusters never have.
    assert all(abs(of(plain, name, 10, 20)) < 0.25 for name in names)


def test_contiguous_clusters_are_those_in_which_neurons_stand(
    bench: Bench, model: LanguageModel, tmp_path: Path
) -> None:
    expert: dict[int, list[Tensor]] = {}
    for step in STEPS:
        if step != 20:
            shuffle(model)
        save(model, tmp_path, step)
        expert[step] = [(ffn.neuron_ids.argsort() // (D_FF // EXPERTS)).clone() for ffn in model.ffns]
    table = compare(bench, tmp_path, constructions=["contiguous"])
    for a, b in combinations_with_replacement(STEPS, 2):
        for layer in range(LAYERS):
            expected = adjusted_rand_score(expert[a][layer], expert[b][layer])
            assert of(table, "contiguous", a, b, layer) == pytest.approx(expected)
    assert of(table, "contiguous", 10, 20) == 1.0


def test_a_snapshot_compared_with_itself_and_with_what_became_of_it(tmp_path: Path) -> None:
    training = {"steps": 20, "batch_size": 4, "validate_every": 20, "validation_blocks": 2, "snapshot_every": 5}
    bench = Bench(tmp_path, training=training, arms={"dense": {"method": "dense"}})
    bench.phases("dense")
    settings = AnalysisConfig(experts=[8, 2], constructions=["kmeans", "random"])
    table = compare_snapshots(bench.open("dense"), settings)
    steps = [step for step, _ in snapshots(bench.dir("dense"))]
    assert steps == [5, 10, 15, 20]
    for key, rows in table.groupby(["construction", "experts", "layer"]):
        assert list(zip(rows["step_a"], rows["step_b"], strict=True)) == list(combinations_with_replacement(steps, 2))
        assert (rows[rows["step_a"] == rows["step_b"]]["similarity"] == 1).all(), key
    # Five steps of training change less than fifteen.
    means = table[(table["layer"] == "mean") & (table["construction"] == "kmeans")]
    by_pair = means.groupby(["step_a", "step_b"])["similarity"].mean()
    assert by_pair[15, 20] > by_pair[5, 20]
    # The checkpoint of the last step is the last snapshot.
    model = build_model(bench.runs["dense"], VocabInfo.of(load_index(bench.data / "tokens")))
    load_beside_routers(model, read_checkpoint(snapshots(bench.dir("dense"))[-1][1]))
    final = read_checkpoint(bench.checkpoint("dense"))["state_dict"]
    assert all(torch.equal(final[name], value) for name, value in weights_of(model).items())


def test_numbers_of_clusters_that_do_not_divide_are_left_out() -> None:
    assert fitting_experts(AnalysisConfig(experts=[16, 5, 8, 8]), 32) == [8, 16]
