"""The kernels against plain torch, on the CPU through Triton's interpreter (tests/conftest.py turns it on)."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.moe.backends import BACKENDS, Activation, Backend, Experts, fused
from ssd_lit.moe.backends.decode_gpu import decode_gpu
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.kernels import gradients as weight_gradients
from ssd_lit.moe.kernels.dynamic_k import route_above, select_above
from ssd_lit.moe.kernels.grouping import group_by_expert
from ssd_lit.moe.kernels.routing import route
from ssd_lit.moe.routers import CenterRouter, build_router
from ssd_lit.moe.routing import Routing, experts_above
from ssd_lit.moe.statistics import mean_k


def problem(
    tokens: int, width: int, experts: int, neurons: int, k: int, *,
    gated: bool = False, bias: bool = True, weighted: bool = False, load: str = "random", seed: int = 0,
) -> tuple[Tensor, Routing, Experts, list[Tensor]]:  # fmt: skip
    g = torch.Generator().manual_seed(seed)

    def fresh(*size: int) -> Tensor:
        return torch.randn(*size, generator=g).requires_grad_()

    x, w_in, w_out = fresh(tokens, width), fresh(experts, neurons, width), fresh(experts, neurons, width)
    b_in, w_gate = fresh(experts, neurons) if bias else None, fresh(experts, neurons, width) if gated else None
    weights = fresh(tokens, k) if weighted else None
    chosen = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    if load == "one expert":
        chosen = torch.arange(k).expand(tokens, k).contiguous()
    if load == "ragged":
        chosen = torch.where(torch.rand(tokens, k, generator=g) < 0.4, experts, chosen)
    b_out = fresh(width) if bias else None
    leaves = [p for p in (x, w_in, w_out, b_in, w_gate, weights, b_out) if p is not None]
    return x, Routing(chosen, weights, load == "ragged"), Experts(w_in, w_out, b_in, w_gate, b_out=b_out), leaves


def outcome(
    backend: Backend, parts: tuple[Tensor, Routing, Experts, Sequence[Tensor]], activation: str
) -> list[Tensor]:
    x, choice, experts, leaves = parts
    y = backend(x, choice, experts, Activation(activation))
    weight = torch.linspace(-1, 1, y.numel()).view_as(y)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)]


CASES = {
    "one token": (1, 16, 4, 8, 2),
    "odd sizes": (37, 24, 5, 12, 3),
    "rows of no multiple of 16 bytes": (37, 18, 5, 13, 3),
    "experts in two pieces": (20, 16, 3, 300, 2),
    "a gate and weights": (20, 16, 4, 16, 2),
    "all tokens to one expert": (40, 16, 6, 8, 1),
    "fewer experts for some": (30, 16, 4, 8, 3),
}
"""Tokens, width, experts, neurons of one, experts a token."""

KINDS: dict[str, dict[str, Any]] = {
    "a gate and weights": {"gated": True, "weighted": True, "bias": False},
    "all tokens to one expert": {"load": "one expert"},
    "fewer experts for some": {"weighted": True, "load": "ragged"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rows", [10, 100, 1000, None])
def test_fused_agrees_with_the_masked_reference(case: str, rows: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if rows is not None:
        # The pieces in which bfloat16 would be computed, for so many rows an expert.
        plan, gradient_plan = fused.plan, weight_gradients.plan
        monkeypatch.setattr(fused, "plan", lambda d, h, gated, *_: plan(d, h, gated, rows, torch.bfloat16))
        monkeypatch.setattr(weight_gradients, "plan", lambda d, h, *_: gradient_plan(d, h, rows, torch.bfloat16))
    parts = problem(*CASES[case], **KINDS.get(case, {}))
    for reference, got in zip(*(outcome(b, parts, "relu") for b in (BACKENDS["masked"], fused.fused)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_its_gradient(activation: str) -> None:
    for gated in (False, True):
        parts = problem(9, 16, 3, 8, 2, gated=gated)
        for reference, got in zip(
            *(outcome(b, parts, activation) for b in (BACKENDS["masked"], fused.fused)), strict=True
        ):
            torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_one_token_agrees_with_the_masked_reference(case: str) -> None:
    x, choice, experts, _ = problem(1, *CASES[case][1:], **KINDS.get(case, {}))
    with torch.no_grad():
        expected = BACKENDS["masked"](x, choice, experts, Activation("relu"))
        torch.testing.assert_close(decode_gpu(x, choice, experts, Activation("relu")), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_weights_kept_in_float32_are_not_rounded_to_the_precision_of_products() -> None:
    _, choice, _, leaves = problem(300, 16, 4, 16, 2, gated=True)
    # Numbers that float16 holds; Triton's interpreter has no products in bfloat16.
    exact = [leaf.detach().half().double().requires_grad_() for leaf in leaves]
    kept = [leaf.detach().float().requires_grad_() for leaf in exact]
    found = []
    for backend, (x, w_in, w_out, b_in, w_gate, b_out) in ((BACKENDS["masked"], exact), (fused.fused, kept)):
        experts = Experts(w_in, w_out, b_in, w_gate, b_out=b_out)
        y = backend(x if x.dtype == torch.float64 else x.half(), choice, experts, Activation("gelu"))
        weight = torch.linspace(-1, 1, y.numel()).view_as(y)
        found.append(torch.autograd.grad((y * weight).sum(), [x, w_in, w_out, b_in, w_gate, b_out]))
    for reference, got in zip(*found, strict=True):
        assert got.dtype == torch.float32
        assert (got.double() - reference).norm() < 2e-3 * reference.norm()
    for of_part in found[1][1:]:
        assert not torch.equal(of_part, of_part.half().float())


def layer(backend: str) -> ExpertFFN:
    torch.manual_seed(0)
    ffn = ExpertFFN(16, 32, experts=4, top_k=2, router=CenterRouter(16, 4), backend=backend)
    ffn.router.on_permuted(ffn.gating_weight)
    ffn.set_mode("sparse")
    return ffn


def gradients(way: Callable[[Tensor], Tensor], ffn: ExpertFFN) -> list[Tensor]:
    x = torch.linspace(-1, 1, 20 * 16).view(20, 16).requires_grad_()
    y = way(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *ffn.parameters()])]


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
def test_fused_compiles_as_one_graph_and_can_be_checkpointed(how: str) -> None:
    ffn, plain = layer("fused"), layer("masked")
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "compiled": torch.compile(ffn, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda x: checkpoint(ffn, x, use_reentrant=False),  # type: ignore[return-value]
    }
    for reference, got in zip(gradients(plain, plain), gradients(ways[how], ffn), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


def test_decode_gpu_refuses_a_gradient_and_several_tokens() -> None:
    x, choice, experts, _ = problem(1, 16, 4, 8, 2)
    with pytest.raises(ValueError, match=r"'decode_gpu'.*no gradient.*'fused'"):
        decode_gpu(x, choice, experts, Activation("relu"))
    with pytest.raises(ValueError, match=r"'decode_gpu': takes one token, given 3"):
        decode_gpu(x.expand(3, -1), choice, experts, Activation("relu"))


def test_fused_refuses_dropout_of_activations() -> None:
    x, choice, experts, _ = problem(3, 16, 4, 8, 2)
    with pytest.raises(ValueError, match=r"'fused'.*dropout.*take 'grouped'"):
        fused.fused(x, choice, experts, Activation("relu", dropout=0.1))


def test_parts_of_a_busy_expert_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, _ = weight_gradients.plan(16, 8, 1000, torch.bfloat16)
    monkeypatch.setattr(weight_gradients, "plan", lambda *_: weight_gradients.Plan({**sizes, "ROWS": 16}, part_rows=32))
    g = torch.Generator().manual_seed(0)
    x, _, experts, leaves = problem(200, 16, 5, 8, 1)
    # Of 40 rows in an even share, one expert gets 150, one 49, one 1, and two none.
    chosen = torch.tensor([1] * 150 + [3] * 49 + [4])[torch.randperm(200, generator=g), None]
    parts = (x, Routing(chosen), experts, leaves)
    for reference, got in zip(*(outcome(b, parts, "relu") for b in (BACKENDS["masked"], fused.fused)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "width", "experts", "k"),
    [(1, 16, 4, 1), (70, 40, 12, 5), (5, 300, 33, 33), (70, 300, 12, 5), (2100, 40, 12, 5), (2100, 40, 300, 5)],
)
def test_route_takes_the_largest_products(tokens: int, width: int, experts: int, k: int) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, directions = torch.randn(tokens, width, generator=g), torch.randn(experts, width, generator=g)
    found = route(x, directions, k)
    expected = (x.double() @ directions.double().T).topk(k).indices
    assert torch.equal(found.sort().values, expected.sort().values)


@pytest.mark.parametrize(
    ("tokens", "experts", "share"),
    [*((*size, share) for size in [(1, 4), (5, 33), (70, 12)] for share in (0.0, 0.05, 0.7, 1.0)), (2, 300, 0.05)],
)
def test_dynamic_k_is_chosen_and_counted(tokens: int, experts: int, share: float) -> None:
    g = torch.Generator().manual_seed(tokens)
    x, directions = torch.randn(tokens, 40, generator=g), torch.randn(experts, 40, generator=g)
    scores = torch.nn.functional.softplus(x @ directions.T)
    # In kernels the chosen are in order of their number, and E is behind them.
    expected = experts_above(scores, share).sort().values
    tally = torch.tensor([3, 2])
    assert torch.equal(select_above(scores, share, tally), expected)
    number = int((expected < experts).sum())
    assert tally.tolist() == [3 + number, 2 + tokens]
    assert torch.equal(route_above(x, directions, share, tally), expected)
    assert tally.tolist() == [3 + 2 * number, 2 + 2 * tokens]
    torch._dynamo.reset()
    compiled = torch.compile(route_above, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, directions, share, tally), expected)
    assert tally.tolist() == [3 + 3 * number, 2 + 3 * tokens]
    assert torch.equal(route_above(x, directions, share, None), expected)


def test_small_and_large_scores_of_directions_are_softplus() -> None:
    products = torch.tensor([[-30.0, -29.0], [-12.0, -11.9], [-1.0, 0.0], [19.0, 25.0], [90.0, 100.0]])
    exact = torch.nn.functional.softplus(products.double())
    ratio = exact[:, 0] / exact[:, 1]
    for row, share in zip(products, ratio.tolist(), strict=True):
        x, directions = torch.ones(1, 1), row[:, None]
        assert route_above(x, directions, share * (1 - 1e-5), None).tolist() == [[0, 1]]
        assert route_above(x, directions, share * (1 + 1e-5), None).tolist() == [[1, 2]]


@pytest.mark.parametrize("backend", ["fused", "decode_gpu"])
@pytest.mark.parametrize("threshold", [0.3, 0.9])
def test_dynamic_k_in_kernels_is_that_of_the_masked_reference(backend: str, threshold: float) -> None:
    torch.manual_seed(0)
    ffn = ExpertFFN(16, 64, experts=8, top_k=2, router=build_router("centers", 16, 8, 1))
    torch.nn.init.normal_(ffn.router.weights)
    ffn.set_mode("sparse", threshold=threshold)
    with torch.no_grad():
        for tokens in (1, 30) if backend == "fused" else (1,) * 12:
            x, found = torch.randn(tokens, 16), []
            for name in ("masked", backend):
                ffn.backend = name
                found.append(ffn(x))
            torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert 1 < (mean_k([ffn]) or 0) < 8


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(  # few pairs, and more of them in smaller and larger blocks
    ("experts", "tokens", "window"),
    [*itertools.product([7], [1, 300, 3000], [1, 2, 1000]), (7, 22000, 2), *itertools.product([200], [300, 3000], [2])],
)
def test_groups_hold_every_pair_once_in_order_and_tiles_cover_them(
    experts: int, tokens: int, window: int, ragged: bool
) -> None:
    k, rows = 3, 16 if tokens < 3000 else 128
    g = torch.Generator().manual_seed(window)
    chosen = torch.stack([torch.randperm(experts, generator=g)[:k] for _ in range(tokens)])
    chosen[chosen == 5] = experts if ragged else 4  # nobody's expert
    groups = group_by_expert(chosen, experts, ragged=ragged, tile_rows=rows, window=window)
    assert torch.equal(groups.pairs.long(), chosen.flatten().argsort(stable=True))
    assert groups.bounds.tolist() == [0, *chosen.flatten().bincount(minlength=experts + 1)[:experts].cumsum(0)]
    bounds = groups.bounds.tolist()
    expected = [
        [e, first, min(first + rows, bounds[e + 1])]
        for e in range(experts)
        for first in range(bounds[e], bounds[e + 1], rows)
    ]
    number = int(groups.tiles[-1, 0])
    tiles = groups.tiles[:number].tolist()
    assert sorted(tiles) == expected
    if window == 1000:
        assert tiles == expected
    if window == 1 and tokens > 1:  # the first tile of every expert comes before any second one
        assert [e for e, first, _ in tiles[:6]] == [0, 1, 2, 3, 4, 6]
