import pytest
import torch
from torch import Tensor

from ssd_lit.moe.backends import BACKENDS
from ssd_lit.moe.ffn import ExpertFFN

SHAPES = [(1, 8, 4, 16, 2), (37, 16, 8, 8, 3), (64, 32, 4, 32, 4), (5, 16, 16, 4, 1)]  # T, D, E, H, K


def inputs(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    t, d, e, h, k = shape
    g = torch.Generator().manual_seed(seed)
    x, w_in, b_in, w_out = (
        torch.randn(*size, generator=g, dtype=dtype).requires_grad_() for size in ((t, d), (e, h, d), (e, h), (e, h, d))
    )
    # Some expert often gets no token at all.
    chosen = torch.stack([torch.randperm(e, generator=g)[:k] for _ in range(t)])
    return x, chosen, w_in, b_in, w_out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["loop", "grouped"])
def test_backend_agrees_with_the_masked_reference_in_output_and_gradients(name: str, shape: tuple[int, ...]) -> None:
    # Grouped products exist for float32 only.
    dtype, tolerance = (torch.float32, 1e-4) if name == "grouped" else (torch.float64, 1e-12)
    arguments = inputs(shape, dtype, seed=sum(shape))
    weight = torch.randn(shape[0], shape[1], dtype=dtype)
    found = []
    for backend in ("masked", name):
        y = BACKENDS[backend](*arguments)
        leaves = [a for a in arguments if a.requires_grad]
        found.append([y, *torch.autograd.grad((y * weight).sum(), leaves)])
    for reference, got in zip(*found, strict=True):
        torch.testing.assert_close(got, reference, rtol=tolerance, atol=tolerance)


def test_the_masked_reference_is_what_the_formula_says() -> None:
    x, chosen, w_in, b_in, w_out = inputs((6, 8, 4, 4, 2), torch.float64, seed=1)
    y = torch.zeros_like(x)
    for t in range(6):
        for e in chosen[t].tolist():
            y[t] += torch.relu(w_in[e] @ x[t] + b_in[e]) @ w_out[e]
    torch.testing.assert_close(BACKENDS["masked"](x, chosen, w_in, b_in, w_out), y)


@pytest.mark.parametrize("backend", ["masked", "loop"])
def test_neurons_of_experts_that_nobody_chose_get_no_gradient(backend: str) -> None:
    torch.manual_seed(0)
    ffn = ExpertFFN(8, 16, experts=4, top_k=1, dropout=0.0, backend=backend).double()
    ffn.centers.copy_(torch.eye(4, 8))
    ffn.set_mode("sparse")
    x = torch.zeros(5, 8, dtype=torch.double)
    x[:, 2] = 3.0  # every token looks at the third centre
    ffn(x).sum().backward()
    assert ffn.w_in.grad is not None
    touched = ffn.w_in.grad.abs().sum(dim=1).view(4, 4).sum(dim=1) > 0
    assert touched.tolist() == [False, False, True, False]


def test_dropout_and_the_mode_flag_are_kept() -> None:
    ffn = ExpertFFN(8, 16, experts=4, top_k=2, dropout=0.5, backend="loop")
    x = torch.randn(64, 8)
    assert torch.equal(ffn.eval()(x), ffn(x))
    assert not torch.equal(ffn.train()(x), ffn(x))
    with pytest.raises(ValueError, match="top_k 5: allowed are 1 to 4"):
        ffn.set_mode("sparse", 5)
