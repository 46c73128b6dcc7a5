import pytest
import torch

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.router import expert_centers, top_k_experts
from ssd_lit.moe.statistics import active_ratio, expert_load, load_entropy, routing_recall


@pytest.fixture
def ffn() -> ExpertFFN:
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 32, experts=4, top_k=2, dropout=0.0, backend="masked")
    ffn.centers.copy_(expert_centers(ffn.w_in, 4))
    return ffn


def test_active_ratio_counts_neurons_that_fire_among_those_computed(ffn: ExpertFFN) -> None:
    x = torch.randn(20, 8)
    fires = (x @ ffn.w_in.T + ffn.b_in) > 0
    assert active_ratio(ffn, x) == pytest.approx(fires.float().mean().item())
    ffn.set_mode("sparse")
    chosen = top_k_experts(x, ffn.centers, 2)
    expected = sum(fires[t, 8 * e : 8 * e + 8].sum().item() for t in range(20) for e in chosen[t].tolist())
    assert active_ratio(ffn, x) == pytest.approx(expected / (20 * 32))


def test_expert_load_adds_up_to_k_and_its_entropy_is_one_when_even(ffn: ExpertFFN) -> None:
    load = expert_load(ffn, torch.randn(50, 8))
    assert load.sum().item() == pytest.approx(2.0)
    assert load_entropy(torch.full((16,), 0.375)) == pytest.approx(1.0)
    assert load_entropy(torch.tensor([1.0, 0.0, 0.0, 0.0])) == pytest.approx(0.0)
    assert load_entropy(torch.tensor([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_routing_recall_is_one_for_all_experts_and_for_a_router_that_is_right(ffn: ExpertFFN) -> None:
    x = torch.randn(50, 8)
    assert 0.5 < routing_recall(ffn, x) < 1
    ffn.set_mode("sparse", 4)
    assert routing_recall(ffn, x) == pytest.approx(1.0)


def test_centres_are_unit_means_of_normalised_rows() -> None:
    w = torch.randn(12, 5)
    centers = expert_centers(w, 3)
    for e in range(3):
        rows = [w[i] / w[i].norm() for i in range(4 * e, 4 * e + 4)]
        mean = sum(rows) / 4  # type: ignore[operator]
        torch.testing.assert_close(centers[e], mean / mean.norm())
