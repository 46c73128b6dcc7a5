"""The sparse FFN by QuACK's products, for training on Hopper GPUs: for most sizes faster than `fused`.

Dropless and deterministic, as `fused` is. Pairs are grouped and added up by our kernels, and the gradients of weights
are ours too: QuACK gives an expert's gradient to few programs, however many tokens chose it. Each direction is one
operator to torch.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token, N = T * K pairs.
"""

from typing import Any

import torch
from torch import Tensor

from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.kernels import early_launch, side_stream
from ssd_lit.moe.kernels import quack as products
from ssd_lit.moe.kernels.gradients import bias_gradient, weight_gradient
from ssd_lit.moe.kernels.grouping import Groups, group_by_expert, most_tiles, rows_of_pairs
from ssd_lit.moe.kernels.pair_sums import add_pairs
from ssd_lit.moe.routing import Routing

TILE_ROWS = 128
"""Rows over which the gradient of a bias is added up by one program."""


def quack(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Gather, products and activation in QuACK's kernels.

    Gradients of the experts' parts are sums in float32, written in the dtype in which the part is kept. For inputs
    without an obstacle (`backends.obstacle_of_quack`).
    """
    gated = experts.w_gate is not None
    # Products read copies in the dtype of x; gradients go past these, as in `fused`.
    w_out = experts.w_out.detach().to(x.dtype)
    if experts.w_gate is None:
        w_up = experts.w_in.detach().to(x.dtype)
    else:
        w_up = torch.stack((experts.w_gate.detach(), experts.w_in.detach()), dim=2).flatten(1, 2).to(x.dtype)
    name = (products.GATED_ACTIVATIONS if gated else products.ACTIVATIONS)[activation.name]
    y: Tensor = _forward(
        x, routing.experts, w_up, w_out, experts.w_in, experts.w_out, experts.w_gate, experts.b_in, experts.b_out,
        name, routing.ragged,
    )[0]  # fmt: skip
    return y


@torch.library.custom_op("ssd_lit::quack_forward", mutates_args=())
def _forward(
    x: Tensor, chosen: Tensor, w_up: Tensor, w_out: Tensor,
    kept_in: Tensor, kept_out: Tensor, kept_gate: Tensor | None, b_in: Tensor | None, b_out: Tensor | None,
    activation: str, ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [T, D]; then the inputs of the backward pass: `pre`, the groups, and tokens and places of pairs.

    `pre` [N, H or 2 H] holds the activations' inputs; for a ReLU without a gate what it gave, which shows its slope.

    w_up is [E, H or 2 H, D]. `kept_in`, `kept_out` and `kept_gate` get the gradients of w_up and w_out.
    """
    x, chosen = x.contiguous(), chosen.contiguous()
    n, (n_experts, h, d) = chosen.numel(), w_out.shape
    groups = group_by_expert(chosen, n_experts, ragged=ragged, tile_rows=TILE_ROWS, window=1)
    tokens, places = rows_of_pairs(groups, chosen.shape[1])
    hidden, out = x.new_empty(n, h), x.new_empty(n, d)
    pre = None if activation == "relu" else x.new_empty(n, w_up.shape[1])
    products.up(x, tokens, groups.bounds, w_up, b_in, activation, pre, hidden)
    products.down(hidden, groups.bounds, w_out, out)
    y = torch.empty_like(x)
    add_pairs(out, chosen, b_out, y, n_experts=n_experts, ragged=ragged, launch=early_launch(x), places=places)
    return y, hidden if pre is None else pre, *groups, tokens, places


@_forward.register_fake
def _(
    x: Tensor, chosen: Tensor, w_up: Tensor, w_out: Tensor,
    kept_in: Tensor, kept_out: Tensor, kept_gate: Tensor | None, b_in: Tensor | None, b_out: Tensor | None,
    activation: str, ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, n_experts = chosen.numel(), len(w_out)
    rows = [x.new_empty(n, dtype=torch.int32) for _ in range(3)]
    return (
        x.new_empty(x.shape),
        x.new_empty(n, w_up.shape[1]),
        rows[0],
        x.new_empty(n_experts + 1, dtype=torch.int32),
        x.new_empty(most_tiles(n, n_experts, TILE_ROWS) + 1, 3, dtype=torch.int32),
        rows[1],
        rows[2],
    )


@torch.library.custom_op("ssd_lit::quack_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, chosen: Tensor, w_up: Tensor, w_out: Tensor, b_in: Tensor | None, kept: torch.dtype,
    activation: str, ragged: bool,
    pre: Tensor, pairs: Tensor, bounds: Tensor, tiles: Tensor, tokens: Tensor, places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w_up, w_out and b_in; those of the weights are of dtype `kept`, the last is empty without one."""
    dy, x, chosen = dy.contiguous(), x.contiguous(), chosen.contiguous()
    n, (n_experts, h, d) = len(pre), w_out.shape
    dpre, hidden, out = torch.empty_like(pre), x.new_empty(n, h), x.new_empty(n, d)
    products.up_backward(dy, tokens, bounds, w_out, activation, pre, dpre, hidden)
    products.down(dpre, bounds, w_up, out)
    dx = torch.empty_like(x)
    groups = Groups(pairs, bounds, tiles)
    # Sums wait for memory, while the gradients of weights compute.
    side = side_stream(x.device)
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        add_pairs(out, chosen, None, dx, n_experts=n_experts, ragged=ragged, launch={"PDL": False}, places=places)
        db_in = x.new_empty(0) if b_in is None else bias_gradient(dpre, groups, b_in, TILE_ROWS)
    dw_out = weight_gradient(hidden, dy, groups, chosen.shape[1], kept)
    dw_up = weight_gradient(dpre, x, groups, chosen.shape[1], kept)
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    return dx, dw_up, dw_out, db_in


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, chosen: Tensor, w_up: Tensor, w_out: Tensor, b_in: Tensor | None, kept: torch.dtype,
    activation: str, ragged: bool,
    pre: Tensor, pairs: Tensor, bounds: Tensor, tiles: Tensor, tokens: Tensor, places: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dw_up, dw_out = (w.new_empty(w.shape, dtype=kept) for w in (w_up, w_out))
    return x.new_empty(x.shape), dw_up, dw_out, x.new_empty(0) if b_in is None else b_in.new_empty(b_in.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, chosen, w_up, w_out, kept_in, _, kept_gate, b_in, b_out, ctx.activation, ctx.ragged = inputs
    ctx.kept, ctx.gated, ctx.shift = kept_in.dtype, kept_gate is not None, None if b_out is None else b_out.dtype
    ctx.save_for_backward(x, chosen, w_up, w_out, b_in, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    saved = ctx.saved_tensors
    b_in = saved[4]
    dx, dw_up, dw_out, db_in = _backward(dy, *saved[:5], ctx.kept, ctx.activation, ctx.ragged, *saved[5:])
    dw_gate, dw_in = dw_up.unflatten(1, (-1, 2)).unbind(2) if ctx.gated else (None, dw_up)
    db_out = None if ctx.shift is None else dy.sum(0, dtype=ctx.shift)
    return (
        dx, None, None, None, dw_in, dw_out, dw_gate, None if b_in is None else db_in, db_out, None, None
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_keep)
