"""The sparse FFN over tokens sorted by expert, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.backends.contract import Activation, Experts
from ssd_lit.moe.selection import Choice


def loop(x: Tensor, choice: Choice, experts: Experts, activation: Activation) -> Tensor:
    """One set of matrix products for each expert, over the tokens that chose it."""
    n_experts = experts.w_in.shape[0]
    place, count = _by_expert(choice, n_experts)
    k = choice.experts.shape[1]
    # Unbinding once gives one stacked gradient; indexing w_in[e] would build a full-size one for every expert.
    parts = zip(
        place.split(count.tolist()),
        experts.w_in.unbind(),
        experts.w_out.unbind(),
        [None] * n_experts if experts.b_in is None else experts.b_in.unbind(),
        [None] * n_experts if experts.w_gate is None else experts.w_gate.unbind(),
        strict=True,
    )
    y = torch.zeros_like(x)
    for mine, w_in, w_out, b_in, w_gate in parts:
        if len(mine) == 0:
            continue
        token = mine // k
        rows = x[token]
        hidden = activation(F.linear(rows, w_in, b_in), None if w_gate is None else F.linear(rows, w_gate))
        y = y.index_add(0, token, _weighed(hidden @ w_out, choice, mine))
    return y


def grouped(x: Tensor, choice: Choice, experts: Experts, activation: Activation) -> Tensor:
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


def _by_expert(choice: Choice, n_experts: int) -> tuple[Tensor, Tensor]:
    """Places [N] in the flattened choice, sorted by their expert, and how many tokens go to each [E]."""
    expert = choice.experts.flatten()
    place = expert.argsort(stable=True)
    count = expert.bincount(minlength=n_experts + 1)[:n_experts]
    # Places without an expert stand last.
    return (place[: int(count.sum())] if choice.ragged else place), count


def _weighed(out: Tensor, choice: Choice, place: Tensor) -> Tensor:
    return out if choice.weights is None else out * choice.weights.flatten()[place, None].to(out.dtype)
