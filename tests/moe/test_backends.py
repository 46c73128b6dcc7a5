import itertools

import pytest
import torch
from torch import Tensor

from ssd_lit.moe.backends import BACKENDS, Activation, Experts
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routers import CenterRouter
from ssd_lit.moe.selection import Choice

SHAPES = [(1, 8, 4, 16, 2), (37, 16, 8, 8, 3), (64, 32, 4, 32, 4), (5, 16, 16, 4, 1)]  # T, D, E, H, K
KINDS = list(itertools.product([False, True], repeat=4))  # bias, gate, weights, ragged


def inputs(
    shape: tuple[int, ...], kind: tuple[bool, ...], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Choice, Experts, list[Tensor]]:
    t, d, e, h, k = shape
    bias, gated, weighted, ragged = kind
    g = torch.Generator().manual_seed(seed)

    def fresh(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=dtype).requires_grad_()

    x, w_in, w_out = fresh(t, d), fresh(e, h, d), fresh(e, h, d)
    b_in, w_gate = fresh(e, h) if bias else None, fresh(e, h, d) if gated else None
    weights = fresh(t, k) if weighted else None
    # Some expert often gets no token at all.
    chosen = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(t)])
    if ragged:
        chosen = torch.where(torch.rand(t, k, generator=g) < 0.4, e, chosen)
    leaves = [p for p in (x, w_in, w_out, b_in, w_gate, weights) if p is not None]
    return x, Choice(chosen, weights, ragged), Experts(w_in, w_out, b_in, w_gate), leaves


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_backend_agrees_with_the_masked_reference_in_output_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    # Grouped products exist for float32 only.
    dtype, tolerance = (torch.float32, 2e-4) if name == "grouped" else (torch.float64, 1e-12)
    for kind in KINDS:
        x, choice, experts, leaves = inputs(shape, kind, dtype, seed=sum(shape))
        weight = torch.randn(shape[0], shape[1], dtype=dtype)
        found = []
        for backend in ("masked", name):
            y = BACKENDS[backend](x, choice, experts, Activation("relu"))
            found.append([y, *torch.autograd.grad((y * weight).sum(), leaves, materialize_grads=True)])
        for reference, got in zip(*found, strict=True):
            torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_masked_reference_is_what_the_formula_says(kind: tuple[bool, ...]) -> None:
    x, choice, experts, _ = inputs((6, 8, 4, 4, 2), kind, torch.float64, seed=1)
    y = torch.zeros_like(x)
    for t, k in itertools.product(range(6), range(2)):
        e = int(choice.experts[t, k])
        if e == 4:
            continue
        pre = experts.w_in[e] @ x[t] + (0 if experts.b_in is None else experts.b_in[e])
        hidden = pre.relu() if experts.w_gate is None else (experts.w_gate[e] @ x[t]).relu() * pre
        y[t] += (hidden @ experts.w_out[e]) * (1 if choice.weights is None else choice.weights[t, k])
    torch.testing.assert_close(BACKENDS["masked"](x, choice, experts, Activation("relu")), y)


@pytest.mark.parametrize("backend", ["masked", "loop"])
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
    with pytest.raises(ValueError, match="top_k 5: allowed are 1 to 4"):
        ffn.set_mode("sparse", 5)
