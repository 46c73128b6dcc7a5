from typing import get_args

import pytest
import torch
import torch.nn.functional as F

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import PosthocRouter, RouterName
from ssd_lit.moe.permutation import upcycle_into
from ssd_lit.moe.routers import build_router, expert_choices, gate_losses
from ssd_lit.moe.routing import experts_above, scheduled_k, top_k_experts
from ssd_lit.moe.statistics import mean_k


def ffn_with(router: str, *, upcycled: bool = False, top_k: int = 2, backend: str = "masked") -> ExpertFFN:
    torch.manual_seed(1)
    return ExpertFFN(
        8, 96 if upcycled else 24, experts=4, top_k=top_k, router=build_router(router, 8, 4, 5), upcycled=upcycled,
        backend=backend,
    ).double()  # fmt: skip


def test_a_learned_router_weighs_experts_by_a_softmax_over_the_chosen_that_adds_up_to_k() -> None:
    ffn = ffn_with("gate")
    ffn.set_mode("sparse")
    x = torch.randn(7, 8, dtype=torch.double)
    logits = x @ ffn.router.gate.T
    expected = torch.zeros_like(x)
    for t in range(7):
        chosen = logits[t].topk(2).indices
        share = logits[t, chosen].softmax(0)
        for e, weight in zip(chosen.tolist(), share, strict=True):
            part = slice(6 * e, 6 * e + 6)
            hidden = torch.relu(ffn.w_in[part] @ x[t] + ffn.b_in[part])
            expected[t] += 2 * weight * (hidden @ ffn.w_out[part])
    torch.testing.assert_close(ffn(x), expected + ffn.b_out)
    ffn(x).square().sum().backward()
    assert ffn.router.gate.grad.abs().sum() > 0
    # With logits that are all alike and every expert on, it is the dense FFN.
    torch.nn.init.zeros_(ffn.router.gate)
    ffn.set_mode("sparse", 4)
    torch.testing.assert_close(ffn(x), ffn.set_mode("dense") or ffn(x))


def test_the_load_balancing_loss_is_one_when_even_and_grows_with_collapse() -> None:
    even, z = gate_losses(torch.zeros(8, 4), expert_choices(torch.arange(4).repeat(2)[:, None], 4))
    assert even.item() == pytest.approx(1.0)
    assert z.item() == pytest.approx(torch.tensor(4.0).log().square().item())
    scores = torch.zeros(8, 4)
    scores[:, 0] = 20.0
    collapsed, _ = gate_losses(scores, expert_choices(torch.zeros(8, 1, dtype=torch.long), 4))
    assert collapsed.item() == pytest.approx(4.0, rel=1e-3)


def test_a_gate_trained_on_its_balance_loss_alone_evens_the_load() -> None:
    torch.manual_seed(3)
    router = build_router("gate", 8, 4, 1)
    x = torch.randn(512, 8) + 1.5 * F.normalize(router.gate.detach()[0], dim=0)
    router.gate.data *= 20

    def largest_share() -> float:
        chosen = top_k_experts(router(x), 1)
        return float(chosen.flatten().bincount(minlength=4).max()) / len(x)

    before = largest_share()
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        scores = router(x)
        gate_losses(scores, expert_choices(top_k_experts(scores, 1), 4))[0].backward()
        optimizer.step()
    assert before > 0.5
    assert largest_share() < 0.35


def test_copies_with_weights_that_add_up_to_one_compute_what_the_single_ffn_did() -> None:
    source = ffn_with("gate")
    target = ffn_with("gate", upcycled=True)
    upcycle_into(source, target)
    x = torch.randn(5, 8, dtype=torch.double)
    for k in (1, 3, 4):
        target.set_mode("sparse", k)
        torch.testing.assert_close(target(x), source(x))
    target.set_mode("dense")
    with pytest.raises(ValueError, match="no dense mode"):
        target(x)
    with pytest.raises(ValueError, match="4 copies of 96 neurons do not make 96"):
        upcycle_into(target, target)


def test_dynamic_k_takes_the_experts_near_the_best_one() -> None:
    scores = torch.tensor([[4.0, 3.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.1, 0.0]])
    some, all_on, best = experts_above(scores, 0.5).tolist()
    assert (some, sorted(all_on), best) == ([0, 1, 4, 4], [0, 1, 2, 3], [2, 4, 4, 4])
    ffn = ffn_with("norm_mlp", backend="loop")
    # Tokens for which no hidden unit of the router fires shall not tie.
    torch.nn.init.normal_(ffn.router.b_out)
    x = torch.randn(30, 8, dtype=torch.double)
    ffn.set_mode("sparse", threshold=0.0)
    torch.testing.assert_close(ffn(x), ffn.set_mode("dense") or ffn(x))
    ffn.set_mode("sparse", threshold=1.0)
    few = ffn(x)
    ffn.set_mode("sparse", 1)
    torch.testing.assert_close(few, ffn(x))


@pytest.mark.parametrize("backend", ["masked", "loop", "decode_cpu"])
@pytest.mark.parametrize("router", ["centers", "mass_mlp"])
@pytest.mark.parametrize("threshold", [0.1, 0.6, 0.95])
def test_dynamic_k_computes_and_counts_what_the_formula_says(backend: str, router: str, threshold: float) -> None:
    ffn = ffn_with(router, backend=backend)
    for parameter in ffn.router.parameters():
        torch.nn.init.normal_(parameter)
    ffn.set_mode("sparse", threshold=threshold)
    expected, taken = [], 0
    for row in (x := torch.randn(30, 8, dtype=torch.double)):
        scores = ffn.router(row[None])[0]
        near = [e for e in range(4) if scores[e] >= threshold * scores.max()]
        parts = [slice(6 * e, 6 * e + 6) for e in near]
        y = sum(torch.relu(ffn.w_in[part] @ row + ffn.b_in[part]) @ ffn.w_out[part] for part in parts)
        expected.append(y + ffn.b_out)
        taken += len(near)
    assert 30 < taken < 120
    assert mean_k([ffn]) is None
    torch.testing.assert_close(torch.cat([ffn(x[:7]), ffn(x[7:])]), torch.stack(expected))
    assert mean_k([ffn]) == taken / 30
    ffn.route(x)  # a look is not counted
    assert mean_k([ffn, ffn]) == taken / 30
    ffn.set_mode("sparse")
    assert ffn.threshold == threshold
    assert mean_k([ffn]) is None
    ffn.set_mode("sparse", 2)
    assert ffn.threshold is None
    ffn(x)
    assert mean_k([ffn]) is None


def test_a_threshold_needs_scores_that_are_never_negative() -> None:
    trained = get_args(PosthocRouter)
    for name in (*get_args(RouterName), *trained):
        ffn = ffn_with(name)
        assert ffn.router.non_negative == (name in trained)
        if name in trained:
            assert (ffn.router(torch.randn(100, 8, dtype=torch.double)) >= 0).all()
            ffn.set_mode("sparse", threshold=0.5)
        else:
            with pytest.raises(ValueError, match=r"threshold 0.5.*negative.* mass_mlp, norm_mlp, centers"):
                ffn.set_mode("sparse", threshold=0.5)
            assert (ffn.mode, ffn.threshold) == ("dense", None)
    for arguments, message in (
        ({"threshold": 1.5}, "threshold 1.5: allowed are 0 to 1"),
        ({"threshold": -0.1}, "threshold -0.1: allowed are 0 to 1"),
        ({"threshold": 0.1, "top_k": 2}, "top_k 2 and threshold 0.1: give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            ffn.set_mode("sparse", **arguments)


def test_the_oracle_changes_what_a_gate_chooses_and_not_how_it_weighs() -> None:
    ffn = ffn_with("gate")
    ffn.set_mode("sparse")
    ffn.oracle = True
    x = torch.randn(20, 8, dtype=torch.double)
    choice = ffn.route(x)
    assert choice.experts.sort().values.equal(top_k_experts(ffn.activation_mass(x), 2).sort().values)
    expected = 2 * ffn.router(x).gather(1, choice.experts).softmax(-1)
    torch.testing.assert_close(choice.weights, expected)


def test_directions_begin_as_the_centres_and_learn_to_find_more_mass() -> None:
    tuned, plain = ffn_with("centers"), ffn_with("center")
    with torch.no_grad():  # An expert of long rows contributes more, which centres of one length do not tell.
        tuned.w_in[:6] *= 3
        plain.w_in[:6] *= 3
    plain.router.on_permuted(plain.gating_weight)
    tuned.router.init_trainable(tuned.gating_weight)
    x, unseen = torch.randn(2, 500, 8, dtype=torch.double)

    def found(ffn: ExpertFFN) -> torch.Tensor:
        ffn.set_mode("sparse", 1)
        return ffn.activation_mass(unseen).gather(1, ffn.route(unseen).experts).sum()

    before = found(tuned)
    assert before == found(plain)
    optimizer = torch.optim.Adam(tuned.router.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        F.cross_entropy(tuned.router(x).log(), F.normalize(tuned.activation_mass(x).detach(), p=1)).backward()
        optimizer.step()
    assert found(tuned) > 1.05 * before


def test_a_frozen_router_has_nothing_to_train_and_the_oracle_beats_it() -> None:
    for name in ("center", "random"):
        ffn = ffn_with(name)
        ffn.router.on_permuted(ffn.gating_weight)
        assert not list(ffn.router.parameters())
        ffn.set_mode("sparse")
        x = torch.randn(200, 8, dtype=torch.double)
        mass = ffn.activation_mass(x)
        found = mass.gather(1, ffn.route(x).experts).sum()
        ffn.oracle = True
        assert found < mass.gather(1, ffn.route(x).experts).sum()
    with pytest.raises(ValueError, match="allowed are center, random, gate, mass_mlp, norm_mlp, centers"):
        build_router("centre", 8, 4, 1)


@pytest.mark.parametrize("kind", ["linear", "cosine", "step"])
def test_k_schedules_go_from_start_to_end_up_or_down_without_turning(kind: str) -> None:
    for start, end in ((1, 16), (16, 4)):
        ks = [scheduled_k(n, 100, kind=kind, start=start, end=end, stairs=4) for n in range(100)]  # type: ignore[arg-type]
        assert (ks[0], ks[-1]) == (start, end)
        assert ks == sorted(ks, reverse=start > end)
        if kind == "step":
            assert [len(set(ks)), ks.count(start), ks.count(end)] == [4, 25, 25]
    assert {scheduled_k(n, 100, kind="constant", start=1, end=6, stairs=4) for n in range(100)} == {6}


def test_linear_is_a_straight_line_and_cosine_is_behind_it_first() -> None:
    def ks(kind: str) -> list[int]:
        return [scheduled_k(n, 101, kind=kind, start=0, end=100, stairs=1) for n in range(101)]  # type: ignore[arg-type]

    assert ks("linear") == list(range(101))
    assert all(c <= n for n, c in enumerate(ks("cosine")[:50]))
    assert ks("cosine")[50] == 50
