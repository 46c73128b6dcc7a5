from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ssd_lit.moe import assignment
from ssd_lit.moe.assignment import assign
from ssd_lit.moe.clustering import balanced_kmeans, balanced_kmeans_layers, normalised_rows, random_balanced
from tests.moe.cheapest import assert_cheapest

SHAPES = [(24, 4), (60, 6), (64, 16), (128, 2), (30, 1), (12, 12), (240, 8)]


def costs(kind: str, n: int, clusters: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng([n, clusters, seed])
    cost = draw.normal(size=(n, clusters))
    match kind:
        case "zeros":
            return np.zeros((n, clusters))
        case "many ties":
            return cost.round()
        case "equal rows":
            return cost[draw.integers(0, max(1, n // 6), n)]
        case "equal columns":
            return cost[:, draw.integers(0, max(1, clusters // 2), clusters)]
        case "columns far apart":
            return cost + 1e6 * draw.normal(size=(1, clusters))
        case "heavy tails":
            return np.exp(6 * cost)
    return cost


@pytest.mark.parametrize(("n", "clusters"), SHAPES)
@pytest.mark.parametrize(
    "kind", ["normal", "zeros", "many ties", "equal rows", "equal columns", "columns far apart", "heavy tails"]
)
def test_the_assignment_is_the_cheapest_balanced_one(n: int, clusters: int, kind: str) -> None:
    # Problems solved together stay apart.
    cost = np.stack([costs(kind, n, clusters, seed) for seed in range(3)])
    labels = assign(torch.from_numpy(cost))[0].numpy()
    for one, found in zip(cost, labels, strict=True):
        assert_cheapest(one, found)


@pytest.mark.parametrize("kind", ["normal", "many ties", "equal rows", "heavy tails"])
@pytest.mark.parametrize("change", [1e-3, 0.1, 2.0])
def test_prices_of_other_costs_lead_to_the_cheapest_assignment_too(kind: str, change: float) -> None:
    cost = np.stack([costs(kind, 240, 8, seed) for seed in range(2)])
    other = np.stack([costs("normal", 240, 8, seed) for seed in (5, 6)])
    prices = assign(torch.from_numpy(cost + change * other))[1]
    for one, found in zip(cost, assign(torch.from_numpy(cost), prices)[0].numpy(), strict=True):
        assert_cheapest(one, found)


@pytest.mark.parametrize("error", [0.01, 0.3, 3.0])
def test_wrong_prices_do_not_make_the_assignment_wrong(monkeypatch: pytest.MonkeyPatch, error: float) -> None:
    right = assignment.find_prices

    def prices(cost: torch.Tensor, start: torch.Tensor, temperatures: Sequence[float]) -> torch.Tensor:
        return right(cost, start, temperatures) + error * torch.arange(cost.shape[-1]).remainder(2)

    cost = np.random.default_rng(0).normal(size=(200, 10))
    best = cost[np.arange(200), assign(torch.from_numpy(cost)[None])[0][0].numpy()].sum()
    monkeypatch.setattr(assignment, "find_prices", prices)
    labels = assign(torch.from_numpy(cost)[None])[0][0].numpy()
    assert np.bincount(labels).tolist() == [20] * 10
    assert cost[np.arange(200), labels].sum() == pytest.approx(best, abs=1e-9)


def test_planted_clusters_are_found() -> None:
    g = torch.Generator().manual_seed(3)
    planted = torch.randperm(80, generator=g) % 8
    x = 5 * torch.eye(8)[planted] + 0.1 * torch.randn(80, 8, generator=g)
    found = balanced_kmeans(x, 8, seed=2)
    pairs = set(zip(planted.tolist(), found.labels.tolist(), strict=True))
    assert len(pairs) == 8
    mean = torch.stack([x[found.labels == c].mean(dim=0) for c in range(8)])
    torch.testing.assert_close(found.centers, mean)
    assert found.inertia == pytest.approx(((x - mean[found.labels]) ** 2).sum().item(), rel=1e-5)


def test_the_same_arguments_give_the_same_result_and_leave_random_state_alone() -> None:
    x = torch.randn(96, 10)
    torch_state = torch.get_rng_state()
    np.random.seed(7)  # noqa: NPY002
    first = balanced_kmeans(x, 8, seed=5)
    assert torch.equal(first.labels, balanced_kmeans(x, 8, seed=5).labels)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.random.rand() == np.random.RandomState(7).rand()  # noqa: NPY002


@pytest.mark.parametrize("seed", range(5))
def test_a_warm_start_is_never_worse_than_the_cold_one(seed: int) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    cold = balanced_kmeans(x, 8, seed=seed)
    warm = balanced_kmeans(x, 8, init=random_balanced(64, 8, seed=seed), seed=seed)
    assert warm.inertia <= cold.inertia
    assert torch.equal(balanced_kmeans(x, 8, init=cold.labels, seed=seed).labels, cold.labels)


def test_layers_clustered_together_are_clustered_as_if_alone() -> None:
    g = torch.Generator().manual_seed(4)
    layers = [torch.randn(n, d, generator=g) for n, d in [(96, 10), (64, 10), (96, 10), (96, 10)]]
    init = [random_balanced(len(x), 8, seed=i) for i, x in enumerate(layers)]
    for starts in (None, init):
        together = balanced_kmeans_layers(layers, 8, init=starts, seed=3)
        for i, (x, found) in enumerate(zip(layers, together, strict=True)):
            alone = balanced_kmeans(x, 8, init=None if starts is None else starts[i], seed=3)
            assert torch.equal(found.labels, alone.labels)
            torch.testing.assert_close(found.centers, alone.centers)
            assert found.inertia == pytest.approx(alone.inertia, rel=1e-12)
    assert balanced_kmeans_layers([], 8) == []


def test_the_number_of_threads_changes_no_bit_and_is_left_alone() -> None:
    layers = [torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(balanced_kmeans_layers(layers, 16))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one.labels, three.labels)
        assert torch.equal(one.centers, three.centers)
        assert one.inertia == three.inertia


@pytest.mark.parametrize("x", [torch.zeros(16, 3), torch.ones(16, 3), torch.eye(16)[:, :2].repeat(1, 2)])
@pytest.mark.parametrize("clusters", [1, 4, 16])
def test_degenerate_rows_still_make_equal_clusters(x: torch.Tensor, clusters: int) -> None:
    labels = balanced_kmeans(normalised_rows(x), clusters).labels
    assert labels.bincount(minlength=clusters).tolist() == [16 // clusters] * clusters


def test_what_cannot_be_clustered_is_refused() -> None:
    with pytest.raises(ValueError, match="10 rows do not divide into 4"):
        balanced_kmeans(torch.randn(10, 2), 4)
    with pytest.raises(ValueError, match="not finite"):
        balanced_kmeans(torch.full((4, 2), torch.nan), 2)
    with pytest.raises(ValueError, match="init"):
        balanced_kmeans(torch.randn(4, 2), 2, init=torch.tensor([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="do not divide"):
        random_balanced(10, 3)


def test_random_clusters_are_equal_in_size_and_differ_by_seed() -> None:
    a, b = random_balanced(64, 8, seed=0), random_balanced(64, 8, seed=1)
    assert a.bincount().tolist() == b.bincount().tolist() == [8] * 8
    assert not torch.equal(a, b)
