"""The backend of QuACK's products, with loops in their place: what is around them, on the CPU.

The products themselves run on a GPU alone: `benchmarks/exactness.py` compares them with float64 there.
"""

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.backends import BACKENDS, Activation
from ssd_lit.moe.backends.quack import quack
from ssd_lit.moe.kernels import quack as products
from tests.moe.test_kernels import CASES, KINDS, outcome, problem


def gelu_new(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


PLAIN = {"relu": F.relu, "relu_sq": lambda x: F.relu(x).square(), "gelu_tanh_approx": gelu_new, "silu": F.silu}
GATED = {"reglu": F.relu, "geglu": gelu_new, "swiglu": F.silu}


def activated(name: str, pre: Tensor) -> Tensor:
    """As QuACK does it: columns of the gate and of the input take turns."""
    return GATED[name](pre[:, ::2]) * pre[:, 1::2] if name in GATED else PLAIN[name](pre)


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """By differences, since there is no autograd inside of an operator; to the left, where a ReLU's slope at 0 is 0."""
    x, step = x.double(), 1e-6
    return (function(x) - function(x - step)) / step


def rows_of(bounds: Tensor) -> Iterator[tuple[int, slice]]:
    for expert, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        yield expert, slice(begin, end)


@pytest.fixture(autouse=True)
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products as their docstrings say; rows of pairs without an expert stay unwritten."""

    def up(x, tokens, bounds, w, bias, activation, pre, hidden):  # type: ignore[no-untyped-def]
        for e, rows in rows_of(bounds):
            inputs = x[tokens[rows].long()] @ w[e].T + (0 if bias is None else bias[e])
            hidden[rows] = activated(activation, inputs)
            if pre is not None:
                pre[rows] = inputs

    def down(a, bounds, w, out):  # type: ignore[no-untyped-def]
        out.fill_(torch.nan)
        for e, rows in rows_of(bounds):
            out[rows] = a[rows] @ w[e]

    def up_backward(dy, tokens, bounds, w_out, activation, pre, dpre, hidden):  # type: ignore[no-untyped-def]
        for e, rows in rows_of(bounds):
            grad = dy[tokens[rows].long()] @ w_out[e].T
            hidden[rows] = activated(activation, pre[rows])
            if activation in GATED:
                gate, value = pre[rows, ::2], pre[rows, 1::2]
                dpre[rows, ::2] = grad * value * slope(GATED[activation], gate)
                dpre[rows, 1::2] = grad * GATED[activation](gate)
            else:
                dpre[rows] = grad * slope(PLAIN[activation], pre[rows])

    for product in (up, down, up_backward):
        monkeypatch.setattr(products, product.__name__, product)


@pytest.mark.parametrize("case", CASES)
def test_quack_agrees_with_the_masked_reference(case: str) -> None:
    kind = {**KINDS.get(case, {}), "weighted": False}
    parts = problem(*CASES[case], **kind)
    for reference, got in zip(*(outcome(b, parts, "relu") for b in (BACKENDS["masked"], quack)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("activation", "gated"),
    [*((name, False) for name in products.ACTIVATIONS), *((name, True) for name in products.GATED_ACTIVATIONS)],
)
def test_every_activation_and_its_gradient(activation: str, gated: bool) -> None:
    parts = problem(9, 16, 3, 8, 2, gated=gated, bias=not gated)
    for reference, got in zip(*(outcome(b, parts, activation) for b in (BACKENDS["masked"], quack)), strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_gradients_have_the_dtype_in_which_weights_are_kept(gated: bool) -> None:
    x, choice, experts, _ = problem(30, 16, 4, 8, 2, gated=gated, bias=not gated)
    quack(x.half(), choice, experts, Activation("silu")).float().sum().backward()
    for part in experts:
        assert part is None or (part.grad is not None and part.grad.dtype == torch.float32)
