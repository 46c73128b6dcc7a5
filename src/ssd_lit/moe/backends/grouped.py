"""The sparse FFN over tokens sorted by expert, in plain torch."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.routing import Routing


@torch.library.custom_op("ssd_lit::gathered_products", mutates_args=())
def gathered_products(x: Tensor, w: Tensor, b: Tensor | None, token: Tensor, count: Tensor) -> Tensor:
    """Each pair's token times its expert's weights: x [T, D], w [E, H, D], b [E, H] -> [N, H]."""
    y = x.new_empty(len(token), w.shape[1])
    counts = count.tolist()
    rows = _workspace(x, counts)
    for e, tokens, out in _by_expert(counts, token, y):
        gathered = torch.index_select(x, 0, tokens, out=rows[: len(tokens)])
        if b is None:
            torch.mm(gathered, w[e].T, out=out)
        else:
            torch.addmm(b[e], gathered, w[e].T, out=out)
    return y


@torch.library.custom_op("ssd_lit::scattered_products", mutates_args=())
def scattered_products(h: Tensor, w: Tensor, token: Tensor, count: Tensor, tokens: int) -> Tensor:
    """The sum over a token's pairs of neurons times their expert's weights: h [N, H], w [E, H, D] -> [T, D]."""
    y = h.new_zeros(tokens, w.shape[2])
    counts = count.tolist()
    rows = _workspace(y, counts)
    for e, indices, hidden in _by_expert(counts, token, h):
        y.index_add_(0, indices, torch.mm(hidden, w[e], out=rows[: len(indices)]))
    return y


@torch.library.custom_op("ssd_lit::product_gradients", mutates_args=())
def product_gradients(h: Tensor, x: Tensor, token: Tensor, count: Tensor) -> Tensor:
    """The sum over an expert's pairs of neurons times token: h [N, H], x [T, D] -> [E, H, D]."""
    counts = count.tolist()
    dw = h.new_empty(len(counts), h.shape[1], x.shape[1])
    rows = _workspace(x, counts)
    for e, tokens, hidden in _by_expert(counts, token, h):
        torch.mm(hidden.T, torch.index_select(x, 0, tokens, out=rows[: len(tokens)]), out=dw[e])
    for e, n_tokens in enumerate(counts):
        if not n_tokens:
            dw[e].zero_()
    return dw


def _by_expert(counts: list[int], token: Tensor, neurons: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Every expert that was chosen, with its part of token [N] and of neurons [N, H]."""
    parts = zip(token.split(counts), neurons.split(counts), strict=True)
    return ((e, *part) for e, part in enumerate(parts) if counts[e])


def _workspace(like: Tensor, counts: list[int]) -> Tensor:
    """Rows for the tokens of one expert at a time: allocating them for all would take longer than the products."""
    return like.new_empty(max(counts), like.shape[1])


@gathered_products.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, token: Tensor, count: Tensor) -> Tensor:
    return x.new_empty(token.shape[0], w.shape[1])


@scattered_products.register_fake
def _(h: Tensor, w: Tensor, token: Tensor, count: Tensor, tokens: int) -> Tensor:
    return h.new_empty(tokens, w.shape[2])


@product_gradients.register_fake
def _(h: Tensor, x: Tensor, token: Tensor, count: Tensor) -> Tensor:
    return h.new_empty(count.shape[0], h.shape[1], x.shape[1])


def _save_gathered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, w, _, token, count = inputs
    ctx.save_for_backward(x, w, token, count)


def _gathered_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, w, token, count = ctx.saved_tensors
    for_x, for_w, for_b, *_ = ctx.needs_input_grad
    dx = scattered_products(dy, w, token, count, x.shape[0]) if for_x else None
    dw = product_gradients(dy, x, token, count) if for_w else None
    db = product_gradients(dy, x.new_ones(x.shape[0], 1), token, count).squeeze(2) if for_b else None
    return dx, dw, db, None, None


def _save_scattered(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, w, token, count, _ = inputs
    ctx.save_for_backward(h, w, token, count)


def _scattered_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    h, w, token, count = ctx.saved_tensors
    for_h, for_w, *_ = ctx.needs_input_grad
    dh = gathered_products(dy, w, None, token, count) if for_h else None
    dw = product_gradients(h, dy, token, count) if for_w else None
    return dh, dw, None, None, None


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients_backward(ctx: Any, dw: Tensor) -> tuple[Tensor | None, ...]:
    h, x, token, count = ctx.saved_tensors
    for_h, for_x, *_ = ctx.needs_input_grad
    dh = gathered_products(x, dw, None, token, count) if for_h else None
    dx = scattered_products(h, dw, token, count, x.shape[0]) if for_x else None
    return dh, dx, None, None


gathered_products.register_autograd(_gathered_backward, setup_context=_save_gathered)
scattered_products.register_autograd(_scattered_backward, setup_context=_save_scattered)
product_gradients.register_autograd(_gradients_backward, setup_context=_save_gradients)


def loop(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """One set of matrix products for each expert, over the tokens that chose it."""
    experts = experts.to(x.dtype)
    place, count = _sorted_by_expert(routing, experts.w_in.shape[0])
    token = place // routing.experts.shape[1]
    pre = gathered_products(x, experts.w_in, experts.b_in, token, count)
    gate = None if experts.w_gate is None else gathered_products(x, experts.w_gate, experts.b_gate, token, count)
    hidden = _weighed(activation(pre, gate), routing, place)
    return experts.shifted(scattered_products(hidden, experts.w_out, token, count, x.shape[0]))


def grouped(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Grouped matrix products over all experts."""
    experts = experts.to(x.dtype)
    place, count = _sorted_by_expert(routing, experts.w_in.shape[0])
    token = place // routing.experts.shape[1]
    ends = count.cumsum(0).to(torch.int32)
    rows = x[token]

    def products(w: Tensor, b: Tensor | None) -> Tensor:  # [N, H]
        y = F.grouped_mm(rows, w.transpose(1, 2), offs=ends)
        return y if b is None else y + b.repeat_interleave(count, dim=0, output_size=token.shape[0])

    pre = products(experts.w_in, experts.b_in)
    gate = None if experts.w_gate is None else products(experts.w_gate, experts.b_gate)
    out = F.grouped_mm(activation(pre, gate), experts.w_out, offs=ends)
    return experts.shifted(torch.zeros_like(x).index_add(0, token, _weighed(out, routing, place)))


def _sorted_by_expert(routing: Routing, n_experts: int) -> tuple[Tensor, Tensor]:
    """Places [N] in the flattened routing, sorted by their expert, and how many tokens go to each [E]."""
    expert = routing.experts.flatten()
    place = expert.argsort(stable=True)
    # Not bincount: torch.compile does not know the size of its output.
    count = expert.new_zeros(n_experts + 1).scatter_add(0, expert, torch.ones_like(expert))[:n_experts]
    # Places without an expert come last.
    return (place[: int(count.sum())] if routing.ragged else place), count


def _weighed(out: Tensor, routing: Routing, place: Tensor) -> Tensor:
    return out if routing.weights is None else out * routing.weights.flatten()[place, None].to(out.dtype)
