"""The sparse FFN for one token or a few on the CPU: products of a token with views of the chosen experts' weights.

For generation. Its gradients are correct too, but slow: each view has a gradient of full size.
"""

import torch
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.routing import Routing


def decode_cpu(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Token by token, expert by expert: reads only the chosen experts' weights, in place.

    torch.compile breaks its graph here, where the chosen experts become numbers.
    """
    n_experts, width = len(experts.w_in), x.shape[1]
    sums = []
    for t, chosen in enumerate(routing.experts.tolist()):
        token, y = x[t], x.new_zeros(width)
        for k, e in enumerate(chosen):
            if e == n_experts:  # fills the places of a token with fewer than K experts
                continue
            gate = None if experts.w_gate is None else _product(experts.w_gate[e], experts.b_gate, e, token)
            hidden = activation(_product(experts.w_in[e], experts.b_in, e, token), gate)
            if routing.weights is not None:
                hidden = hidden * routing.weights[t, k].to(x.dtype)
            y = torch.addmv(y, experts.w_out[e].T, hidden)
        sums.append(y)
    return experts.shifted(torch.stack(sums))


def _product(w: Tensor, b: Tensor | None, e: int, token: Tensor) -> Tensor:
    # One expert's matrix: torch's BLAS reads it with all cores, and faster than as a batch of its blocks.
    return torch.mv(w, token) if b is None else torch.addmv(b[e], w, token)
