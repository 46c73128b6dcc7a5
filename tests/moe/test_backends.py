import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import profile
from torch.utils.checkpoint import checkpoint

from ssd_lit.moe.backends import BACKENDS, Activation, Experts, choose_backend, fastest_backend
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter, GateRouter, build_router
from ssd_lit.moe.routing import Routing

# T, D, E, H, K
SHAPES = [(1, 8, 4, 16, 2), (37, 16, 8, 8, 3), (64, 32, 4, 32, 4), (5, 16, 16, 4, 1)]
ODD_SHAPES = [(1, 16, 4, 7, 4), (3, 5, 6, 48, 2)]
"""Grouped products take only rows of whole 16 bytes."""
KINDS = [kind for kind in itertools.product([False, True], repeat=5) if kind[1] or not kind[4]]
"""Bias, gate, weights, ragged, bias of the gate."""


def inputs(
    shape: tuple[int, ...], kind: tuple[bool, ...], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Routing, Experts, list[Tensor]]:
    t, d, e, h, k = shape
    bias, gated, weighted, ragged, gate_bias = kind
    g = torch.Generator().manual_seed(seed)

    def fresh(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=dtype).requires_grad_()

    x, w_in, w_out = fresh(t, d), fresh(e, h, d), fresh(e, h, d)
    b_in, w_gate = fresh(e, h) if bias else None, fresh(e, h, d) if gated else None
    weights = fresh(t, k) if weighted else None
    b_gate = fresh(e, h) if gate_bias else None
    # Some expert often gets no token at all.
    chosen = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(t)])
    if ragged:
        chosen = torch.where(torch.rand(t, k, generator=g) < 0.4, e, chosen)
    leaves = [p for p in (x, w_in, w_out, b_in, w_gate, weights, b_gate) if p is not None]
    return x, Routing(chosen, weights, ragged), Experts(w_in, w_out, b_in, w_gate, b_gate), leaves


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *itertools.product(["loop", "grouped", "decode_cpu"], SHAPES),
        *itertools.product(["loop", "decode_cpu"], ODD_SHAPES),
    ],
)
def test_backend_agrees_with_the_masked_reference_in_output_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    # Grouped products exist for float32 only, where a sum that is near zero has the rounding of its large parts.
    dtype, tolerance = (torch.float32, 1e-5) if name == "grouped" else (torch.float64, 1e-12)
    for kind in KINDS:
        x, choice, experts, leaves = inputs(shape, kind, dtype, seed=sum(shape))
        weight = torch.randn(shape[0], shape[1], dtype=dtype)
        found = []
        for backend in ("masked", name):
            y = BACKENDS[backend](x, choice, experts, Activation("relu"))
            found.append([y, *torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)])
        for reference, got in zip(*found, strict=True):
            scale = max(1.0, reference.abs().max().item()) if name == "grouped" else 1.0
            torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("name", ["loop", "grouped", "decode_cpu"])
def test_all_tokens_to_one_expert(name: str) -> None:
    x, choice, experts, leaves = inputs((33, 16, 8, 8, 1), (True, False, False, False, False), torch.float32, seed=0)
    choice = choice._replace(experts=torch.full_like(choice.experts, 5))
    found = []
    for backend in ("masked", name):
        y = BACKENDS[backend](x, choice, experts, Activation("relu"))
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for reference, got in zip(*found, strict=True):
        torch.testing.assert_close(got, reference, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["loop", "decode_cpu"])
def test_gradients_have_gradients(name: str) -> None:
    _, choice, _, leaves = inputs((3, 4, 3, 2, 2), (True, True, True, True, True), torch.float64, seed=2)

    def compute(
        x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor, w_gate: Tensor, weights: Tensor, b_gate: Tensor
    ) -> Tensor:
        parts = Experts(w_in, w_out, b_in, w_gate, b_gate)
        return BACKENDS[name](x, choice._replace(weights=weights), parts, Activation("gelu"))

    assert torch.autograd.gradcheck(compute, leaves)
    assert torch.autograd.gradgradcheck(compute, leaves)


def sparse_ffn(backend: str, **how: Any) -> ExpertFFN:
    torch.manual_seed(0)
    how = {"router": CenterRouter(64, 16), **how}
    ffn = ExpertFFN(64, 512, experts=16, top_k=3, backend=backend, **how)
    ffn.router.on_permuted(ffn.gating_weight)
    ffn.set_mode("sparse")
    return ffn


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["loop", "grouped", "decode_cpu"])
def test_no_weights_are_copied(backend: str, gated: bool) -> None:
    ffn = sparse_ffn(backend, gated=gated)
    x = torch.randn(2, 64)
    with profile(profile_memory=True) as profiled:
        ffn(x)
    largest = max(event.self_cpu_memory_usage for event in profiled.events())
    # The weights of one expert are [32, 64]; neurons and outputs of two tokens are fewer.
    assert 0 < largest < 32 * 64 * 4


@pytest.mark.parametrize("router", ["center", "gate"])
def test_compiled_and_recomputed_ffns_are_the_same_ffn(router: str) -> None:
    ffn = sparse_ffn("loop", router=build_router(router, 64, 16, hidden=1))
    torch._dynamo.reset()
    compiled = torch.compile(ffn, fullgraph=True, backend="aot_eager")
    ways = (ffn, compiled, lambda x: checkpoint(ffn, x, use_reentrant=False))
    found = []
    for way in ways:
        ffn.zero_grad()
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        way(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in ffn.parameters())])
    for others in found[1:]:
        for reference, got in zip(found[0], others, strict=True):
            torch.testing.assert_close(got, reference)


@pytest.mark.parametrize("backend", ["loop", "decode_cpu"])
def test_autocast_computes_in_its_precision(backend: str) -> None:
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    found = []
    for name in ("masked", backend):
        ffn = sparse_ffn(name)
        with torch.autocast("cpu", torch.bfloat16):
            y = ffn(x)
        y.float().square().sum().backward()
        found.append([y, *(p.grad for p in ffn.parameters())])
    for reference, got in zip(*found, strict=True):
        assert got.dtype == reference.dtype
        assert (got - reference).norm() < 0.02 * reference.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_masked_reference_is_what_the_formula_says(kind: tuple[bool, ...]) -> None:
    x, choice, experts, _ = inputs((6, 8, 4, 4, 2), kind, torch.float64, seed=1)
    y = torch.zeros_like(x)
    for t, k in itertools.product(range(6), range(2)):
        e = int(choice.experts[t, k])
        if e == 4:
            continue
        pre = experts.w_in[e] @ x[t] + (0 if experts.b_in is None else experts.b_in[e])
        hidden = pre.relu()
        if experts.w_gate is not None:
            gate = experts.w_gate[e] @ x[t] + (0 if experts.b_gate is None else experts.b_gate[e])
            hidden = gate.relu() * pre
        y[t] += (hidden @ experts.w_out[e]) * (1 if choice.weights is None else choice.weights[t, k])
    torch.testing.assert_close(BACKENDS["masked"](x, choice, experts, Activation("relu")), y)


@pytest.mark.parametrize("backend", ["masked", "loop", "decode_cpu"])
def test_neurons_of_experts_that_nobody_chose_get_no_gradient(backend: str) -> None:
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 16, experts=4, top_k=1, router=CenterRouter(8, 4), backend=backend).double()
    ffn.router.centers.copy_(torch.eye(4, 8))
    ffn.set_mode("sparse")
    x = torch.zeros(5, 8, dtype=torch.double)
    x[:, 2] = 3.0  # every token looks at the third centre
    ffn(x).sum().backward()
    assert ffn.w_in.grad is not None
    touched = ffn.w_in.grad.abs().sum(dim=1).view(4, 4).sum(dim=1) > 0
    assert touched.tolist() == [False, False, True, False]


def test_dropout_and_the_mode_flag_are_kept() -> None:
    for dropouts in ({"dropout": 0.5}, {"hidden_dropout": 0.5}):
        ffn = ExpertFFN(8, 16, experts=4, top_k=2, router=CenterRouter(8, 4), backend="loop", **dropouts)  # type: ignore[arg-type]
        x = torch.randn(64, 8)
        for mode in ("dense", "sparse"):
            ffn.set_mode(mode)  # type: ignore[arg-type]
            assert torch.equal(ffn.eval()(x), ffn(x))
            assert not torch.equal(ffn.train()(x), ffn(x))


@pytest.mark.parametrize(
    ("choice", "told"),
    [
        (("sparse", 5), "top_k 5: allowed are 1 to 4"),
        (("sparse", 2.0), "top_k 2.0: allowed are 1 to 4"),
        (("sparse", True), "top_k True: allowed are 1 to 4"),
        (("Sparse", 1), "mode 'Sparse': allowed are dense, sparse"),
    ],
)
def test_a_choice_that_is_none_is_refused_and_changes_nothing(choice: tuple[Any, Any], told: str) -> None:
    ffn = ExpertFFN(8, 16, experts=4, top_k=2, router=CenterRouter(8, 4))
    with pytest.raises(ValueError, match=told):
        ffn.set_mode(*choice)
    assert (ffn.mode, ffn.top_k) == ("dense", 2)
    ffn.set_mode("sparse", np.int64(3))  # type: ignore[arg-type]
    assert ffn.top_k == 3


@pytest.mark.parametrize("backend", ["masked", "loop", "grouped", "decode_cpu"])
def test_no_tokens_are_no_outputs(backend: str) -> None:
    ffn = ExpertFFN(8, 16, experts=4, top_k=2, router=CenterRouter(8, 4), backend=backend)
    ffn.set_mode("sparse")
    assert ffn(torch.zeros(0, 8)).shape == (0, 8)


def test_an_ffn_with_a_gate_is_copied_in_the_middle_of_training() -> None:
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 16, experts=4, top_k=2, router=GateRouter(8, 4), backend="loop")
    ffn.set_mode("sparse")
    x = torch.randn(6, 8)
    (ffn(x).sum() + sum(ffn.gate_losses or ())).backward()
    assert torch.equal(copy.deepcopy(ffn).eval()(x), ffn.eval()(x))


def test_kernels_refuse_the_bias_of_a_gate_that_they_do_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_lit.moe.kernels.runs_on", lambda x: True)
    for name in ("fused", "decode_gpu", "quack"):
        with pytest.raises(ValueError, match=f"{name}.*bias of a gate"):
            choose_backend(name, torch.zeros(4, 8), parts(gate_bias=True), Activation("silu"))


def test_on_a_gpu_no_backend_of_dynamic_k_waits_for_the_host() -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")
    with FakeTensorMode():
        x, one = (torch.empty(tokens, 64, dtype=torch.bfloat16, device="cuda") for tokens in (300, 1))
    with torch.no_grad():
        for gate_bias, ragged, name in ((True, False, "grouped"), (True, True, "masked"), (False, True, "fused")):
            assert fastest_backend(x, parts(gate_bias=gate_bias), Activation("relu"), ragged=ragged) == name
        assert fastest_backend(one, parts(), Activation("relu"), ragged=True) == "decode_gpu"


OBSTACLES: dict[str, dict[str, Any]] = {
    "needs a Hopper GPU": {"hopper": False},
    "two bytes": {"dtype": torch.float32},
    "activation gelu": {"activation": "gelu"},
    "no weights": {"weighted": True},
    "no bias beside a gate": {"gated": True, "bias": True},
    "8 divides": {"neurons": 12},
}


@pytest.mark.parametrize("told", OBSTACLES)
def test_quack_is_taken_for_many_tokens_of_a_wide_or_gated_ffn_unless_something_stands_in_the_way(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

    def given(
        hopper: bool = True, dtype: torch.dtype = torch.bfloat16, activation: str = "relu", weighted: bool = False,
        gated: bool = False, bias: bool = False, neurons: int = 16, width: int = 2048, tokens: int = 8192,
    ) -> tuple[tuple[Tensor, Experts, Activation], bool]:  # fmt: skip
        monkeypatch.setattr("ssd_lit.moe.kernels.quack.runs_here", lambda _: hopper)
        with FakeTensorMode():
            x = torch.empty(tokens, width, dtype=dtype, device="cuda")
        given = parts(gated=gated, bias=bias, neurons=neurons, width=width)
        return (x, given, Activation(activation)), weighted

    for chosen, sizes in (
        ("quack", {}), ("fused", {"tokens": 300}), ("fused", {"width": 768}), ("quack", {"width": 768, "gated": True})
    ):  # fmt: skip
        assert fastest_backend(*given(**sizes)[0]) == chosen
    inputs, weighted = given(**OBSTACLES[told])
    assert fastest_backend(*inputs, weighted=weighted) != "quack"
    with pytest.raises(ValueError, match=f"backend 'quack'.*{told}.*take 'fused'"):
        choose_backend("quack", *inputs, weighted=weighted)


def parts(
    *, gated: bool = False, bias: bool = True, gate_bias: bool = False, neurons: int = 16, width: int = 64
) -> Experts:
    """The neurons of four experts."""
    weights, biases = torch.zeros(4, neurons, width), torch.zeros(4, neurons)
    return Experts(
        weights, weights, biases if bias else None, weights if gated else None, biases if gate_bias else None
    )  # fmt: skip
