"""The sparse FFN over tokens sorted by expert, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.backends.expert_products import gathered_products, scattered_products
from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.routing import Routing


def loop(x: Tensor, choice: Routing, experts: Experts, activation: Activation) -> Tensor:
    """One set of matrix products for each expert, over the tokens that chose it."""
    place, count = _by_expert(choice, experts.w_in.shape[0])
    token = place // choice.experts.shape[1]
    pre = gathered_products(x, experts.w_in, experts.b_in, token, count)
    gate = None if experts.w_gate is None else gathered_products(x, experts.w_gate, None, token, count)
    hidden = _weighed(activation(pre, gate), choice, place)
    y: Tensor = scattered_products(hidden, experts.w_out, token, count, x.shape[0])
    return y


def grouped(x: Tensor, choice: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Grouped matrix products over all experts."""
    place, count = _by_expert(choice, experts.w_in.shape[0])
    token = place // choice.experts.shape[1]
    ends = count.cumsum(0).to(torch.int32)
    rows = x[token]
    pre = F.grouped_mm(rows, experts.w_in.transpose(1, 2), offs=ends)
    if experts.b_in is not None:
        pre = pre + experts.b_in.repeat_interleave(count, dim=0, output_size=token.shape[0])  # [N, H]
    gate = None if experts.w_gate is None else F.grouped_mm(rows, experts.w_gate.transpose(1, 2), offs=ends)
    out = F.grouped_mm(activation(pre, gate), experts.w_out, offs=ends)
    return torch.zeros_like(x).index_add(0, token, _weighed(out, choice, place))


def _by_expert(choice: Routing, n_experts: int) -> tuple[Tensor, Tensor]:
    """Places [N] in the flattened choice, sorted by their expert, and how many tokens go to each [E]."""
    expert = choice.experts.flatten()
    place = expert.argsort(stable=True)
    # bincount would say the same, but torch.compile does not know how long its answer is.
    count = expert.new_zeros(n_experts + 1).scatter_add(0, expert, torch.ones_like(expert))[:n_experts]
    # Places without an expert stand last.
    return (place[: int(count.sum())] if choice.ragged else place), count


def _weighed(out: Tensor, choice: Routing, place: Tensor) -> Tensor:
    return out if choice.weights is None else out * choice.weights.flatten()[place, None].to(out.dtype)
