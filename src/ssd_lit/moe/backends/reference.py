"""The reference backend of the sparse FFN, against which all others are tested."""

import torch
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.routing import Routing


def masked(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Computes every neuron, then multiplies those of experts not chosen by zero. Saves nothing."""
    experts = experts.to(x.dtype)
    n_experts = experts.w_in.shape[0]
    weights = (
        torch.ones_like(routing.experts, dtype=x.dtype) if routing.weights is None else routing.weights.to(x.dtype)
    )
    # Column E is for the unused places of tokens with fewer than K experts.
    mask = x.new_zeros(x.shape[0], n_experts + 1).scatter(1, routing.experts, weights)[:, :-1]  # [T, E]
    pre = torch.einsum("td,ehd->teh", x, experts.w_in)
    if experts.b_in is not None:
        pre = pre + experts.b_in
    gate = None if experts.w_gate is None else torch.einsum("td,ehd->teh", x, experts.w_gate)
    if gate is not None and experts.b_gate is not None:
        gate = gate + experts.b_gate
    return experts.shifted(torch.einsum("teh,ehd->td", activation(pre, gate) * mask[:, :, None], experts.w_out))
