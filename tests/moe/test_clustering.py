import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ssd_lit.moe.clustering import balanced_assignment, balanced_kmeans, normalised_rows, random_balanced


@pytest.mark.parametrize(("n", "clusters"), [(24, 4), (60, 6), (64, 16), (128, 2), (30, 1), (12, 12)])
@pytest.mark.parametrize("seed", range(3))
def test_the_assignment_is_the_cheapest_balanced_one(n: int, clusters: int, seed: int) -> None:
    cost = np.random.default_rng([n, clusters, seed]).normal(size=(n, clusters))
    labels = balanced_assignment(cost)
    assert np.bincount(labels, minlength=clusters).tolist() == [n // clusters] * clusters
    # The peer sees every place in a cluster as a column of its own.
    rows, places = linear_sum_assignment(np.repeat(cost, n // clusters, axis=1))
    best = cost[rows, places // (n // clusters)].sum()
    assert cost[np.arange(n), labels].sum() == pytest.approx(best, abs=1e-9)


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
