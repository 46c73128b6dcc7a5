"""The sparse FFN in fused kernels, for training and evaluation on a GPU.

Dropless for any load of the experts, and deterministic: the same inputs give the same bits. Each direction is one
operator to torch, so that torch.compile sees no break and no shape that depends on data.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token, N = T * K pairs.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.moe.backends.interface import Activation, Experts
from ssd_lit.moe.kernels import early_launch, precision, products, side_stream
from ssd_lit.moe.kernels.descriptors import can_describe, describe
from ssd_lit.moe.kernels.gradients import add_tiles, weight_gradient
from ssd_lit.moe.kernels.grouping import Groups, group_by_expert
from ssd_lit.moe.kernels.pair_sums import add_pairs
from ssd_lit.moe.routing import Routing


def fused(x: Tensor, routing: Routing, experts: Experts, activation: Activation) -> Tensor:
    """Gather, products, activation and scatter in kernels.

    Gradients of the experts' parts are sums in float32, written in the dtype in which the part is kept.

    Raises ValueError for dropout between activation and output.
    """
    if activation.dropout:
        raise ValueError("backend 'fused': dropout of activations is not supported; take 'grouped'")
    # Products read copies in the dtype of x. Torch would round gradients to that of what was read: they go past it.
    w_in, w_out, w_gate = (
        None if w is None else w.detach().to(x.dtype) for w in (experts.w_in, experts.w_out, experts.w_gate)
    )
    y: Tensor = _forward(
        x, routing.experts, routing.weights, w_in, w_out, w_gate, experts.w_in, experts.w_out, experts.w_gate,
        experts.b_in, experts.b_out, activation.name, routing.ragged,
    )[0]  # fmt: skip
    return y


class Plan(NamedTuple):
    """Tile sizes of the kernels, and their warps and pipeline stages."""

    tile_rows: int
    window: int
    whole: bool
    """Whether one kernel computes both projections."""
    up: dict[str, int]
    down: dict[str, int]


def plan(d_model: int, neurons: int, gated: bool, rows: int, dtype: torch.dtype) -> Plan:
    """Sizes that were fastest on an H200 in bfloat16, for a model width, neurons an expert and its usual rows."""
    h, d = _padded(neurons), _padded(d_model)
    if dtype.itemsize > 2:
        return _plan_of_wide_numbers(h, d)
    if rows < 512:
        return _plan_of_few(h, d, rows, gated)
    wide = min(128 if gated else 256, h)
    up = {"NEURONS": wide, "INNER": min(64, d), "COLUMNS": min(64, d), "num_warps": 8, "num_stages": 4}
    if wide <= 128 and not gated:
        # Few enough registers for two programs to share a multiprocessor.
        up |= {"INNER": min(32, d), "num_stages": 6, "maxnreg": 128}
    return Plan(
        tile_rows=128,
        # Keeps the weights of all experts in the cache, or of only a few at a time.
        window=2 if d_model <= 1024 else 32,
        whole=wide >= neurons,
        up=up,
        down={"COLUMNS": min(128, d), "INNER": min(64, h), "num_warps": 8, "num_stages": 3},
    )


def _plan_of_few(h: int, d: int, rows: int, gated: bool) -> Plan:
    """Small tiles, so that a few rows an expert keep all multiprocessors busy."""
    warps = {"num_warps": 4}
    wide = min(128 if gated else 256, h)
    up: dict[str, int]
    if rows < 32:
        up = {"NEURONS": min(32, h), "INNER": min(128, d), "num_stages": 3}
    elif rows < 128:
        up = {"NEURONS": min(64 if gated else 128, h), "INNER": min(128, d), "num_stages": 4}
    else:
        up = {"NEURONS": wide, "INNER": min(64, d), "num_stages": 3}
    return Plan(
        tile_rows=16 if rows < 32 else 64,
        window=1,
        whole=rows >= 128 and wide >= h,
        up={**up, "COLUMNS": min(64, d), **warps},
        down={"COLUMNS": min(128, d), "INNER": min(64, h), "num_stages": 2 if 32 <= rows < 128 else 3, **warps},
    )


def _plan_of_wide_numbers(h: int, d: int) -> Plan:
    """Sizes that fit shared memory in float32."""
    inner = {"INNER": 32, "num_warps": 4, "num_stages": 2}
    return Plan(
        tile_rows=64,
        window=2,
        whole=False,
        up={"NEURONS": min(64, h), "COLUMNS": 16, **inner},
        down={"COLUMNS": min(64, d), **inner},
    )


def _padded(size: int) -> int:
    return max(16, int(triton.next_power_of_2(size)))


class _Shape(NamedTuple):
    n_tokens: int
    k: int
    n_experts: int
    neurons: int
    d_model: int


def _shape(x: Tensor, chosen: Tensor, w_in: Tensor) -> _Shape:
    return _Shape(len(x), chosen.shape[1], w_in.shape[0], w_in.shape[1], x.shape[1])


def _keeps(activation: str, weights: Tensor | None, w_gate: Tensor | None) -> bool:
    """Whether the backward pass needs more than the activations, which suffice for ReLU without weights or gate."""
    return activation != "relu" or weights is not None or w_gate is not None


@torch.library.custom_op("ssd_lit::fused_forward", mutates_args=())
def _forward(
    x: Tensor, chosen: Tensor, weights: Tensor | None, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None,
    kept_in: Tensor, kept_out: Tensor, kept_gate: Tensor | None, b_in: Tensor | None, b_out: Tensor | None,
    activation: str, ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """y [T, D]; then the inputs of the backward pass: hidden, pre and gate [N, H] and the groups.

    `kept_in`, `kept_out` and `kept_gate` get the gradients of w_in, w_out and w_gate.
    """
    x, chosen = x.contiguous(), chosen.contiguous()
    shape = _shape(x, chosen, w_in)
    n, h = chosen.numel(), shape.neurons
    sizes = plan(shape.d_model, h, w_gate is not None, n // shape.n_experts, x.dtype)
    groups = group_by_expert(chosen, shape.n_experts, ragged=ragged, tile_rows=sizes.tile_rows, window=sizes.window)
    keep = _keeps(activation, weights, w_gate)
    hidden = x.new_empty(n, h)
    pre = x.new_empty(n if keep else 0, h)
    gate = x.new_empty(n if w_gate is not None else 0, h)
    out = x.new_empty(n, shape.d_model)
    most = len(groups.tiles) - 1
    described = can_describe(w_in, w_out, w_gate)
    rows, inner, columns = sizes.up["NEURONS"], sizes.up["INNER"], sizes.up["COLUMNS"]
    products.up[(most * triton.cdiv(h, rows),)](
        x, _tiles(w_in, rows, inner, described), _tiles(w_gate, rows, inner, described), b_in, weights,
        groups.pairs, groups.tiles, hidden, pre, gate, _tiles(w_out, rows, columns, described), out, most,
        D=shape.d_model, H=h, K=shape.k, ACTIVATION=activation, GATED=w_gate is not None, BIAS=b_in is not None,
        WEIGHTED=weights is not None, KEEP=keep, DOWN=sizes.whole,
        ROWS=sizes.tile_rows, PRECISION=precision(), DESCRIBED=described, **early_launch(x), **sizes.up,
    )  # fmt: skip
    if not sizes.whole:
        _down(hidden, w_out, None, None, groups, out, sizes, early_launch(x))
    y = torch.empty_like(x)
    add_pairs(out, chosen, b_out, y, n_experts=shape.n_experts, ragged=ragged, launch=early_launch(x))
    return y, hidden, pre, gate, *groups


@_forward.register_fake
def _(
    x: Tensor, chosen: Tensor, weights: Tensor | None, w_in: Tensor, w_out: Tensor, w_gate: Tensor | None,
    kept_in: Tensor, kept_out: Tensor, kept_gate: Tensor | None, b_in: Tensor | None, b_out: Tensor | None,
    activation: str, ragged: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shape = _shape(x, chosen, w_in)
    n, h = chosen.numel(), shape.neurons
    sizes = plan(shape.d_model, h, w_gate is not None, n // shape.n_experts, x.dtype)
    tiles = n // sizes.tile_rows + shape.n_experts + 1
    return (
        x.new_empty(x.shape),
        x.new_empty(n, h),
        x.new_empty(n if _keeps(activation, weights, w_gate) else 0, h),
        x.new_empty(n if w_gate is not None else 0, h),
        x.new_empty(n, dtype=torch.int32),
        x.new_empty(shape.n_experts + 1, dtype=torch.int32),
        x.new_empty(tiles, 3, dtype=torch.int32),
    )


@torch.library.custom_op("ssd_lit::fused_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, chosen: Tensor, weights: Tensor | None,
    w_in: Tensor, w_out: Tensor, w_gate: Tensor | None, b_in: Tensor | None, kept: torch.dtype,
    activation: str, ragged: bool,
    hidden: Tensor, pre: Tensor, gate: Tensor, pairs: Tensor, bounds: Tensor, tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, w_in, w_out, w_gate and b_in; empty where there is no such input.

    Those of w_in, w_out and w_gate are of dtype `kept`.
    """
    dy, x, chosen = dy.contiguous(), x.contiguous(), chosen.contiguous()
    shape = _shape(x, chosen, w_in)
    n, h, d = chosen.numel(), shape.neurons, shape.d_model
    gated, weighted = w_gate is not None, weights is not None
    sizes = plan(d, h, gated, n // shape.n_experts, x.dtype)
    groups = Groups(pairs, bounds, tiles)
    most = len(tiles) - 1
    pieces = triton.cdiv(h, sizes.up["NEURONS"])
    dpre = torch.empty_like(hidden)
    dgate = torch.empty_like(hidden) if gated else None
    db_tiles = x.new_empty(most, h, dtype=torch.float32) if b_in is not None else None
    out, dx = x.new_empty(n, d), torch.empty_like(x)
    # Pairs without an expert have no gradient and are in no tile.
    dweights = x.new_zeros(pieces, n, dtype=torch.float32) if weighted else None
    described = can_describe(w_in, w_out, w_gate)
    rows, inner, columns = sizes.up["NEURONS"], sizes.up["INNER"], sizes.up["COLUMNS"]
    # Weight gradients run beside the rest: each fills what the other leaves of the device. A kernel that waits for
    # another would take room from them.
    launch = {"PDL": False}
    side = side_stream(x.device)
    if side is not None:
        side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        products.up_backward[(most * pieces,)](
            dy, _tiles(w_out, rows, inner, described), weights, pairs, tiles, pre if len(pre) else hidden, gate,
            dpre, dgate, dweights, db_tiles, _tiles(w_in, rows, columns, described),
            _tiles(w_gate, rows, columns, described), out, most, shape.n_tokens,
            D=d, H=h, K=shape.k, ACTIVATION=activation, GATED=gated, BIAS=b_in is not None,
            WEIGHTED=weighted, DOWN=sizes.whole,
            ROWS=sizes.tile_rows, PRECISION=precision(), DESCRIBED=described, **sizes.up,
        )  # fmt: skip
        known = None if side is None else side.record_event()
        if not sizes.whole:
            _down(dpre, w_in, dgate, w_gate, groups, out, sizes, launch)
        add_pairs(out, chosen, None, dx, n_experts=shape.n_experts, ragged=ragged, launch=launch)

    dw_out = weight_gradient(hidden, dy, groups, shape.k, kept)
    if known is not None:
        torch.cuda.current_stream().wait_event(known)
    dw_in = weight_gradient(dpre, x, groups, shape.k, kept)
    dw_gate = x.new_empty(0) if dgate is None else weight_gradient(dgate, x, groups, shape.k, kept)
    db_in = x.new_empty(0)
    if b_in is not None and db_tiles is not None:
        db_in = add_tiles(db_tiles, bounds, b_in, sizes.tile_rows)
    if side is not None:
        torch.cuda.current_stream().wait_stream(side)
    return (
        dx,
        x.new_empty(0) if weights is None or dweights is None else dweights.sum(0).view_as(weights).to(weights.dtype),
        dw_in,
        dw_out,
        dw_gate,
        db_in,
    )


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, chosen: Tensor, weights: Tensor | None,
    w_in: Tensor, w_out: Tensor, w_gate: Tensor | None, b_in: Tensor | None, kept: torch.dtype,
    activation: str, ragged: bool,
    hidden: Tensor, pre: Tensor, gate: Tensor, pairs: Tensor, bounds: Tensor, tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(value: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
        return x.new_empty(0) if value is None else value.new_empty(value.shape, dtype=dtype)

    return like(x), like(weights), like(w_in, kept), like(w_out, kept), like(w_gate, kept), like(b_in)


def _tiles(w: Tensor | None, rows: int, columns: int, described: bool) -> Tensor | TensorDescriptor | None:
    """The weights of all experts [E, H, D] as a kernel takes them, for tiles of one expert's rows and columns."""
    return describe(w, [1, rows, columns]) if w is not None and described else w


def _down(
    a: Tensor,
    w: Tensor,
    a_gate: Tensor | None,
    w_gate: Tensor | None,
    groups: Groups,
    out: Tensor,
    sizes: Plan,
    launch: dict[str, bool],
) -> None:
    """Write each pair's product with its expert's rows of w, [N, H] -> out [N, D]."""
    d = out.shape[1]
    most = len(groups.tiles) - 1
    described = can_describe(a, w, a_gate, w_gate)
    inner, columns = sizes.down["INNER"], sizes.down["COLUMNS"]
    rows, rows_gate = (describe(t, [sizes.tile_rows, inner]) if described and t is not None else t for t in (a, a_gate))
    products.down[(most * triton.cdiv(d, columns),)](
        rows, _tiles(w, inner, columns, described), rows_gate, _tiles(w_gate, inner, columns, described),
        groups.pairs, groups.tiles, out, most,
        D=d, H=a.shape[1], GATED=a_gate is not None, ROWS=sizes.tile_rows, PRECISION=precision(),
        DESCRIBED=described, **launch, **sizes.down,
    )  # fmt: skip


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, kept_in, _, _, b_in, b_out, ctx.activation, ctx.ragged = inputs
    ctx.kept, ctx.shift = kept_in.dtype, None if b_out is None else b_out.dtype
    ctx.save_for_backward(*tensors, b_in, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    weights, w_gate, b_in = saved[2], saved[5], saved[6]
    dx, dweights, dw_in, dw_out, dw_gate, db_in = _backward(
        dy, *saved[:7], ctx.kept, ctx.activation, ctx.ragged, *saved[7:]
    )
    # Here torch.compile sees the sum: torch's own kernel takes as long as a product with all weights.
    db_out = None if ctx.shift is None else dy.sum(0, dtype=ctx.shift)
    return (
        dx, None, None if weights is None else dweights, None, None, None,
        dw_in, dw_out, None if w_gate is None else dw_gate, None if b_in is None else db_in, db_out, None, None,
    )  # fmt: skip


_forward.register_autograd(_differentiate, setup_context=_keep)

assert set(ACTIVATIONS) == {"relu", "relu2", "gelu", "gelu_new", "silu"}, "every activation has its kernel"
