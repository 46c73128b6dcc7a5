"""Matrix products of the sparse FFN by QuACK (package `quack-kernels`, extra `quack`), over grouped pairs.

QuACK's kernels are written for Hopper: some warps keep its copy engine busy, others its matrix units. Rows of tokens
are gathered where they are read. All sums are in float32 and in a fixed order. The tiles are those of QuACK's that were
fastest in a trial by hand on an H200, for widths of 768 to 4096 and experts of 64 to 512 neurons.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, N pairs; rows and columns of a tile.
"""

import importlib.util

import torch
from torch import Tensor

ACTIVATIONS = {"relu": "relu", "relu2": "relu_sq", "gelu_new": "gelu_tanh_approx", "silu": "silu"}
GATED_ACTIVATIONS = {"relu": "reglu", "gelu_new": "geglu", "silu": "swiglu"}
"""QuACK's names of ours."""
_HOPPER = 9
_INSTALLED = importlib.util.find_spec("quack") is not None


def runs_here(device: torch.device) -> bool:
    """Whether the package is there and the device is a Hopper GPU."""
    return _INSTALLED and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


def up(
    x: Tensor, tokens: Tensor, bounds: Tensor, w: Tensor, bias: Tensor | None, activation: str,
    pre: Tensor | None, hidden: Tensor,
) -> None:  # fmt: skip
    """hidden [N, H]: activations of x[tokens] @ w[e].T + bias[e], of w [E, H, D] and bias [E, H].

    With a gate w is [E, 2 H, D], rows of the gate and of the input in turns. The activations' inputs go to `pre`
    [N, H or 2 H], if it is given.
    """
    from quack.gemm_act import gemm_act

    gemm_act(
        x, w, pre, None, hidden, None, activation, *_narrow(w.shape[1]), pingpong=True,
        rowvec_bias=bias, cu_seqlens_m=bounds, A_idx=tokens,
    )  # fmt: skip


def down(a: Tensor, bounds: Tensor, w: Tensor, out: Tensor) -> None:
    """out [N, D]: a [N, H] @ w[e], of w [E, H, D]."""
    from quack.gemm import gemm

    few = w.shape[1] <= 128
    rows, columns = (128, 256) if few else (128, 192)
    gemm(a, w.mT, out, None, None, rows, columns, 2, 1, pingpong=not few, cu_seqlens_m=bounds)


def up_backward(
    dy: Tensor, tokens: Tensor, bounds: Tensor, w_out: Tensor, activation: str,
    pre: Tensor, dpre: Tensor, hidden: Tensor,
) -> None:  # fmt: skip
    """From pre [N, H or 2 H] its gradient, dpre, and the activations again, hidden [N, H].

    The gradient of the activations is dy[tokens] @ w_out[e].T, of dy [T, D] and w_out [E, H, D].
    """
    from quack.gemm_dact import gemm_dact

    gemm_dact(
        dy, w_out, dpre, pre, hidden, None, activation, *_narrow(w_out.shape[1]), pingpong=True,
        cu_seqlens_m=bounds, A_idx=tokens,
    )  # fmt: skip


def _narrow(columns: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, and tiles of a cluster that share their columns' weights, for so many columns."""
    padded = (columns + 31) // 32 * 32
    return (128, padded, 2, 1) if padded <= 192 else (64, 256, 2, 1)
