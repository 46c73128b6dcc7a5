from typing import get_args

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from ssd_lit.moe.clustering import balanced_kmeans, normalised_rows, random_balanced
from ssd_lit.moe.construction import construct, leading_components
from ssd_lit.moe.names import NEEDS_ACTIVATIONS, Construction

F, T, E, D = 96, 400, 8, 16
KMEANS = ("kmeans", *sorted(NEEDS_ACTIVATIONS))


def planted(seed: int = 0, smooth: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden groups [F], rows [F, D] around one direction a group, activations [T, F] of groups that fire together.

    A token belongs to one group: 70 % of its neurons fire, and 3 % of all others. With `smooth` those that do not fire
    are a little negative, as with GELU. Neurons differ in scale.
    """
    g = torch.Generator().manual_seed(seed)
    groups = torch.randperm(F, generator=g) % E
    rows = torch.randn(E, D, generator=g)[groups] + 0.2 * torch.randn(F, D, generator=g)
    of_token = torch.randint(E, (T, 1), generator=g) == groups
    fires = torch.rand(T, F, generator=g) < torch.where(of_token, 0.7, 0.03)
    silent = -0.1 * torch.rand(T, F, generator=g) if smooth else torch.zeros(T, F)
    activations = torch.where(fires, 0.1 + torch.rand(T, F, generator=g), silent)
    return groups, rows, activations * (0.5 * torch.randn(F, generator=g)).exp()


def agreement(a: Tensor, b: Tensor) -> float:
    return float(adjusted_rand_score(a.numpy(), b.numpy()))


def inertia(points: Tensor, labels: Tensor) -> float:
    centers = torch.stack([points[labels == e].mean(dim=0) for e in range(E)])
    return float((points - centers[labels]).square().sum())


def share_within(activations: Tensor, labels: Tensor) -> float:
    """Fraction of the co-activation weight between different neurons that stays within parts, by its definition."""
    strength = activations.abs()
    weights = torch.einsum("ti,tj->ij", strength, strength).fill_diagonal_(0)
    return float(weights[labels[:, None] == labels].sum() / weights.sum())


@pytest.mark.parametrize("name", get_args(Construction))
def test_experts_are_equal_and_the_same_arguments_give_the_same_ones(name: str) -> None:
    _, rows, activations = planted(1)
    torch_state = torch.get_rng_state()
    np.random.seed(7)  # noqa: NPY002
    labels = construct(name, rows, E, seed=5, activations=activations)
    assert labels.dtype == torch.int64
    assert labels.bincount(minlength=E).tolist() == [F // E] * E
    assert torch.equal(labels, construct(name, rows, E, seed=5, activations=activations))
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.random.rand() == np.random.RandomState(7).rand()  # noqa: NPY002


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_groups_are_found_but_not_by_chance(seed: int, smooth: bool) -> None:
    groups, rows, activations = planted(seed, smooth)
    found = {name: construct(name, rows, E, seed=seed, activations=activations) for name in get_args(Construction)}
    assert {name for name in get_args(Construction) if agreement(found[name], groups) > 0.95} == set(KMEANS)
    assert agreement(found["random"], groups) < 0.1


def test_each_construction_looks_at_its_own_evidence() -> None:
    by_activations, _, activations = planted(2)
    by_rows, rows, _ = planted(3)
    for name in KMEANS:
        labels = construct(name, rows, E, seed=0, activations=activations)
        assert agreement(labels, by_activations if name in NEEDS_ACTIVATIONS else by_rows) > 0.95


def test_what_each_one_optimises_is_better_than_by_chance_without_planted_groups() -> None:
    g = torch.Generator().manual_seed(4)
    rows = torch.randn(F, D, generator=g)
    activations = torch.relu(torch.randn(T, D, generator=g) @ rows.T - 2)
    chance = random_balanced(F, E, seed=0)
    found = {name: construct(name, rows, E, seed=0, activations=activations) for name in KMEANS}
    points, profiles = normalised_rows(rows), normalised_rows(activations.T)
    assert inertia(points, found["kmeans"]) < 0.9 * inertia(points, chance)
    assert inertia(profiles, found["kmeans_activations"]) < 0.95 * inertia(profiles, chance)
    assert share_within(activations, found["coactivation"]) > 1.5 * share_within(activations, chance)


def test_kmeans_is_balanced_kmeans_over_unit_rows_and_takes_a_warm_start() -> None:
    _, rows, _ = planted(5)
    init = random_balanced(F, E, seed=1)
    expected = balanced_kmeans(normalised_rows(rows), E, init=init, seed=3).labels
    assert torch.equal(construct("kmeans", rows, E, seed=3, init=init), expected)


@pytest.mark.parametrize("name", KMEANS)
def test_a_construction_started_from_its_own_result_stays_there(name: str) -> None:
    g = torch.Generator().manual_seed(6)
    rows = torch.randn(F, D, generator=g)
    activations = torch.relu(torch.randn(T, D, generator=g) @ rows.T - 2)
    first = construct(name, rows, E, seed=0, activations=activations)
    other = construct(name, rows, E, seed=1, activations=activations)
    assert not torch.equal(first, other)
    again = construct(name, rows, E, seed=0, activations=activations, init=first)
    assert torch.equal(first, again)


@pytest.mark.parametrize(("n", "width"), [(20, 70), (70, 20), (30, 30)])
def test_all_components_keep_all_distances(n: int, width: int) -> None:
    g = torch.Generator().manual_seed(0)
    points = torch.randn(n, width, dtype=torch.float64, generator=g) + 1
    points[n // 2 :] = points[: n - n // 2]  # the smallest eigenvalues are zero but for rounding
    reduced = leading_components(points, 30)
    assert reduced.shape[1] <= 30
    torch.testing.assert_close(reduced @ reduced.T, points @ points.T)


@pytest.mark.parametrize(("n", "width"), [(40, 90), (90, 40)])
def test_few_components_are_those_of_the_singular_value_decomposition(n: int, width: int) -> None:
    points = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reduced = leading_components(points, 7)
    u, s, _ = torch.linalg.svd(points, full_matrices=False)
    best = u[:, :7] * s[:7]
    torch.testing.assert_close(reduced @ reduced.T, best @ best.T)


@pytest.mark.parametrize("seed", range(3))
def test_profiles_over_few_different_tokens_are_clustered_as_if_whole(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    # Without zeros: neurons that fire for one token only have equal profiles, and could change places.
    activations = torch.rand(E, F, generator=g).repeat(30, 1)
    labels = construct("kmeans_activations", torch.zeros(F, D), E, seed=seed, activations=activations)
    assert torch.equal(labels, balanced_kmeans(normalised_rows(activations.T), E, seed=seed).labels)


def test_the_components_kept_lose_nothing_against_clustering_whole_profiles() -> None:
    g = torch.Generator().manual_seed(7)
    activations = torch.relu(torch.randn(T, D, generator=g) @ torch.randn(D, F, generator=g) - 2)
    profiles = normalised_rows(activations.T)
    labels = construct("kmeans_activations", torch.zeros(F, D), E, seed=0, activations=activations)
    assert inertia(profiles, labels) < 1.01 * balanced_kmeans(profiles, E, seed=0).inertia


def test_the_scale_of_a_neuron_does_not_move_its_profile() -> None:
    _, rows, activations = planted(8)
    scaled = activations.double() * torch.logspace(-3, 3, F, dtype=torch.float64)
    labels = construct("kmeans_activations", rows, E, seed=0, activations=activations)
    assert torch.equal(labels, construct("kmeans_activations", rows, E, seed=0, activations=scaled))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(NEEDS_ACTIVATIONS))
def test_neurons_that_never_fire_do_not_hide_the_groups_of_the_others(name: str) -> None:
    groups, rows, activations = planted(9)
    dead = torch.randperm(F, generator=torch.Generator().manual_seed(0))[:8]
    activations[:, dead] = 0
    alive = activations.any(dim=0)
    labels = construct(name, rows, E, seed=0, activations=activations)
    assert labels.bincount(minlength=E).tolist() == [F // E] * E
    assert agreement(labels[alive], groups[alive]) > 0.95


@pytest.mark.filterwarnings("error")
def test_neurons_that_only_fire_alone_do_not_hide_the_groups_of_the_others() -> None:
    groups, rows, activations = planted(9)
    lone = torch.randperm(F, generator=torch.Generator().manual_seed(0))[:24]
    activations[:, lone] = 0
    activations = torch.cat([activations, 100 * torch.eye(F)[lone]])
    others = torch.ones(F, dtype=torch.bool).index_fill(0, lone, False)
    labels = construct("coactivation", rows, E, seed=0, activations=activations)
    assert agreement(labels[others], groups[others]) > 0.95


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(NEEDS_ACTIVATIONS))
def test_a_whole_expert_of_dead_neurons_is_one_expert(name: str) -> None:
    groups, rows, activations = planted(10)
    activations[:, groups == 3] = 0
    labels = construct(name, rows, E, seed=0, activations=activations)
    assert agreement(labels, groups) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_groups_that_never_fire_together_are_the_parts_of_the_graph(scale: float) -> None:
    groups, rows, activations = planted(11)
    g = torch.Generator().manual_seed(0)
    activations = activations * (torch.randint(E, (T, 1), generator=g) == groups) * scale
    activations[:E] = scale * (torch.arange(E)[:, None] == groups)
    assert share_within(activations.double(), groups) == pytest.approx(1)
    labels = construct("coactivation", rows, E, seed=0, activations=activations)
    assert agreement(labels, groups) == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted(NEEDS_ACTIVATIONS))
@pytest.mark.parametrize("experts", [1, 2, 6, 12])
def test_odd_graphs_still_give_equal_experts(name: str, experts: int) -> None:
    pair = torch.zeros(3, 12)
    pair[0, 4] = pair[0, 9] = 1
    g = torch.Generator().manual_seed(0)
    for activations in (torch.zeros(3, 12), torch.eye(12), torch.ones(5, 12), pair, torch.randn(1, 12, generator=g)):
        labels = construct(name, torch.ones(12, 2), experts, seed=0, activations=activations)
        assert labels.bincount(minlength=experts).tolist() == [12 // experts] * experts


def test_contiguous_experts_are_slices_and_random_ones_follow_the_seed() -> None:
    rows = torch.randn(12, 3)
    assert construct("contiguous", rows, 3, seed=0).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(construct("random", rows, 3, seed=4), random_balanced(12, 3, seed=4))
    assert not torch.equal(construct("random", rows, 3, seed=4), construct("random", rows, 3, seed=5))


def test_half_precision_that_needs_gradients_is_fine() -> None:
    groups, rows, activations = planted(12)
    for name in KMEANS:
        fired = activations.bfloat16().requires_grad_()
        labels = construct(name, rows.bfloat16().requires_grad_(), E, seed=0, activations=fired)
        assert agreement(labels, groups) > 0.95


def test_what_cannot_be_constructed_is_refused() -> None:
    rows, activations = torch.randn(12, 3), torch.randn(5, 12)
    with pytest.raises(ValueError, match=r"'metis' is unknown; allowed: kmeans, kmeans_activations, coactivation"):
        construct("metis", rows, 3, seed=0)
    for name in get_args(Construction):
        with pytest.raises(ValueError, match="12 neurons do not divide into 5 experts"):
            construct(name, rows, 5, seed=0, activations=activations)
        with pytest.raises(ValueError, match="rows hold values that are not finite"):
            construct(name, rows / 0, 3, seed=0, activations=activations)
        with pytest.raises(ValueError, match="rows must be neurons by model width"):
            construct(name, rows[0], 3, seed=0, activations=activations)
    for name in NEEDS_ACTIVATIONS:
        with pytest.raises(ValueError, match=f"'{name}' needs activations"):
            construct(name, rows, 3, seed=0)
        for wrong in (activations.T, activations[:0], activations[0]):
            with pytest.raises(ValueError, match="activations must be tokens by 12 neurons"):
                construct(name, rows, 3, seed=0, activations=wrong)
        with pytest.raises(ValueError, match="activations hold values that are not finite"):
            construct(name, rows, 3, seed=0, activations=activations.log())
    with pytest.raises(ValueError, match="init"):
        construct("kmeans", rows, 3, seed=0, init=torch.zeros(11, dtype=torch.int64))
