"""The sparse FFN of a few tokens on a GPU, for generation: reads only the chosen experts' weights.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token.
"""

import torch
import triton
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.kernels import decode
from ssd_lit.moe.routing import Routing


def decode_gpu(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Two launches and a sum over K, without host synchronisation: can be captured in a CUDA graph.

    Raises ValueError if a gradient is needed.
    """
    if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, routing.weights, *experts)):
        raise ValueError("backend 'decode_gpu': has no gradient; take 'fused' for training")
    out: Tensor = _forward(x, routing.experts, routing.weights, *experts.for_kernels, activation.name)
    return out.sum(dim=1).to(x.dtype)


@torch.library.custom_op("ssd_lit::few_forward", mutates_args=())
def _forward(
    x: Tensor, chosen: Tensor, weights: Tensor | None,
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, w_gate: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """The output of every chosen expert, [T, K, D] in float32."""
    x, chosen = x.contiguous(), chosen.contiguous()
    (tokens, d), (experts, h, _), k = x.shape, w_in.shape, chosen.shape[1]
    hidden = x.new_empty(tokens * k, h, dtype=torch.float32)
    out = x.new_empty(tokens, k, d, dtype=torch.float32)
    # Pieces of about 32 kB: enough programs for all multiprocessors, and enough loads in flight in each.
    neurons, columns = 8, 64
    decode.up_few[(tokens * k, triton.cdiv(h, neurons))](
        x, chosen, weights, w_in, w_gate, b_in, hidden,
        D=d, E=experts, H=h, K=k, ACTIVATION=activation, GATED=w_gate is not None, BIAS=b_in is not None,
        WEIGHTED=weights is not None, NEURONS=neurons, INNER=min(2048, triton.next_power_of_2(d)), num_warps=4,
    )  # fmt: skip
    decode.down_few[(tokens * k, triton.cdiv(d, columns))](
        hidden, chosen, w_out, out,
        D=d, E=experts, H=h, NEURONS=min(256, triton.next_power_of_2(h)), COLUMNS=columns, num_warps=4,
    )  # fmt: skip
    return out


@_forward.register_fake
def _(
    x: Tensor, chosen: Tensor, weights: Tensor | None,
    w_in: Tensor, w_out: Tensor, b_in: Tensor | None, w_gate: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    return x.new_empty(len(x), chosen.shape[1], x.shape[1], dtype=torch.float32)
