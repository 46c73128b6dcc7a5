import math

import pytest
import torch

from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter, TrainedCenterRouter, expert_centers
from ssd_lit.moe.statistics import (
    NORM_SHARE,
    active_neurons,
    active_ratio,
    expert_load,
    load_entropy,
    routing_recall,
)


def make(activation: str = "relu", gated: bool = False) -> ExpertFFN:
    torch.manual_seed(0)
    ffn = ExpertFFN(
        8, 32, experts=4, top_k=2, router=CenterRouter(8, 4), activation=activation, gated=gated, backend="masked"
    )
    ffn.router.on_permuted(ffn.gating_weight)
    return ffn


def test_active_ratio_counts_neurons_that_fire_among_those_computed() -> None:
    ffn = make()
    x = torch.randn(20, 8)
    fires = (x @ ffn.w_in.T) > 0
    assert active_ratio(ffn, x) == pytest.approx(fires.float().mean().item())
    ffn.set_mode("sparse")
    chosen = ffn.route(x).experts
    expected = sum(fires[t, 8 * e : 8 * e + 8].sum().item() for t in range(20) for e in chosen[t].tolist())
    assert active_ratio(ffn, x) == pytest.approx(expected / (20 * 32))


@pytest.mark.parametrize("gated", [False, True])
def test_with_smooth_activations_the_smallest_set_that_holds_the_norm_counts(gated: bool) -> None:
    ffn = make("silu", gated)
    x = torch.randn(11, 8)
    hidden = ACTIVATIONS["silu"](x @ ffn.gating_weight.T) * (x @ ffn.w_in.T if gated else 1)
    contributions = hidden.abs() * ffn.w_out.norm(dim=1)
    found = active_neurons(ffn, x)
    for c, mine in zip(contributions, found, strict=True):
        total = c.norm()
        count = next(n for n in range(1, 33) if c.sort(descending=True).values[:n].norm() >= NORM_SHARE * total)
        assert mine.sum() == count
        assert c[mine].norm() >= NORM_SHARE * total
    with_relu = make("relu", gated)
    assert active_ratio(with_relu, x) == pytest.approx(((x @ with_relu.gating_weight.T) > 0).float().mean().item())


def test_expert_load_adds_up_to_k_and_its_entropy_is_one_when_even() -> None:
    load = expert_load(make(), torch.randn(50, 8))
    assert load.sum().item() == pytest.approx(2.0)
    assert load_entropy(torch.full((16,), 0.375)) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.0)
    assert load_entropy(torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_routing_recall_is_one_for_all_experts_and_for_the_oracle() -> None:
    ffn = make()
    x = torch.randn(50, 8)
    assert 0.5 < routing_recall(ffn, x) < 1
    ffn.oracle = True
    assert routing_recall(ffn, x) == pytest.approx(1.0)
    ffn.oracle = False
    ffn.set_mode("sparse", 4)
    assert routing_recall(ffn, x) == pytest.approx(1.0)


def test_with_dynamic_k_the_oracle_takes_as_many_experts_of_each_token() -> None:
    ffn, x = make(), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    ffn.router = TrainedCenterRouter(8, 4)
    ffn.router.init_trainable(ffn.gating_weight)
    ffn.set_mode("sparse", threshold=0.7)
    chosen = [[e for e in row if e < 4] for row in ffn.route(x).experts.tolist()]
    assert len({len(row) for row in chosen}) > 1
    mass = ffn.activation_mass(x).tolist()
    taken = sum(mass[t][e] for t, row in enumerate(chosen) for e in row)
    best = sum(sum(sorted(mass[t], reverse=True)[: len(row)]) for t, row in enumerate(chosen))
    assert routing_recall(ffn, x) == pytest.approx(taken / best)
    ffn.oracle = True
    assert routing_recall(ffn, x) == pytest.approx(1.0)


def test_output_norms_are_those_of_the_experts_run_one_by_one() -> None:
    for gated in (False, True):
        ffn = make("gelu", gated)
        x = torch.randn(9, 8)
        hidden = ffn.activations(x)
        norms = ffn.output_norms(x)
        for e in range(4):
            part = slice(8 * e, 8 * e + 8)
            torch.testing.assert_close(norms[:, e], (hidden[:, part] @ ffn.w_out[part]).norm(dim=1))
        assert not math.isnan(float(norms.sum()))


def test_centres_are_unit_means_of_normalised_rows() -> None:
    w = torch.randn(12, 5)
    centers = expert_centers(w, 3)
    for e in range(3):
        rows = [w[i] / w[i].norm() for i in range(4 * e, 4 * e + 4)]
        mean = sum(rows) / 4  # type: ignore[operator]
        torch.testing.assert_close(centers[e], mean / mean.norm())
