"""The sparse FFN for one token or a few on the CPU: products of a row with views of the chosen experts' weights.

For generation. Its gradients are correct too, but slow: each view has a gradient of full size.
"""

import torch
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.routing import Routing

BLOCK = 16
"""Neurons of one product: MKL computes one matrix-vector product on one core, but a batch of them on all."""


def decode_cpu(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Token by token, expert by expert: reads only the chosen experts' weights, in place.

    torch.compile breaks its graph here, where the chosen experts become numbers.
    """
    experts = experts.to(x.dtype)
    n_experts, n_neurons, width = experts.w_in.shape
    block = BLOCK if n_neurons % BLOCK == 0 else n_neurons
    blocks = n_neurons // block
    w_in, b_in, w_gate, b_gate = (
        None if part is None else part.view(n_experts, blocks, block, -1).transpose(2, 3)
        for part in (experts.w_in, experts.b_in, experts.w_gate, experts.b_gate)
    )  # [E, blocks, D or 1, block]
    assert w_in is not None
    w_out = experts.w_out.view(n_experts, blocks, block, width)
    sums = [x.new_zeros(0, width)]
    for t, chosen in enumerate(routing.experts.tolist()):
        row = x[t].expand(blocks, 1, width)
        y = x.new_zeros(blocks, 1, width)
        for k, e in enumerate(chosen):
            if e == n_experts:  # fills the places of a token with fewer than K experts
                continue
            gate = None if w_gate is None else _products(row, w_gate[e], b_gate, e)
            hidden = activation(_products(row, w_in[e], b_in, e), gate)
            if routing.weights is not None:
                hidden = hidden * routing.weights[t, k].to(x.dtype)
            y = torch.baddbmm(y, hidden, w_out[e])
        sums.append(y.sum(0))
    return experts.shifted(torch.cat(sums))


def _products(row: Tensor, w: Tensor, b: Tensor | None, e: int) -> Tensor:
    return torch.bmm(row, w) if b is None else torch.baddbmm(b[e], row, w)
