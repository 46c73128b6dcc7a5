"""Matrix products of the sparse FFN over grouped pairs, forward and backward.

Every row of a group's product belongs to one pair (a token with one of its experts, `kernels.grouping`). Rows of
tokens are gathered where they are read and scattered where they are written, so that no sorted copy of them exists;
weights are read in place. Sums are in float32, in an order that does not depend on timing.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token, N = T * K pairs.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels.activations import activate, derivative
from ssd_lit.moe.kernels.gradients import bias_slot


@triton.jit
def _weights(
    w, expert, neuron, d,
    D: tl.constexpr, H: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Rows from `neuron` and columns from d of an expert's matrix in w [E, H, D]: [NEURONS, COLUMNS], zeros outside.

    DESCRIBED: w is a tensor descriptor, which Hopper's copy engine reads.
    """
    if DESCRIBED:
        return w.load([expert, neuron, d]).reshape([NEURONS, COLUMNS])
    else:
        row = neuron + tl.arange(0, NEURONS)
        column = tl.arange(0, COLUMNS)
        at = w + (expert * H + row).to(tl.int64)[:, None] * D + column[None, :] + d
        # Loads without a mask are faster, and most sizes need none.
        if (D % COLUMNS == 0) & (H % NEURONS == 0):
            return tl.load(at)
        else:
            return tl.load(at, mask=(row < H)[:, None] & (column < D - d)[None, :], other=0.0)


@triton.jit
def _rows_by_neurons(
    rows, token, w, w_gate, expert, neuron,
    D: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr,
    INNER: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """rows[token] @ w[expert, neuron:].T [ROWS, NEURONS], and the same with w_gate where there is a gate."""
    inner = tl.arange(0, INNER)
    row_at = rows + token.to(tl.int64)[:, None] * D + inner[None, :]
    product = tl.zeros([ROWS, NEURONS], tl.float32)
    gate = tl.zeros([ROWS, NEURONS] if GATED else [1, 1], tl.float32)
    for d in range(0, D, INNER):
        if D % INNER == 0:
            a = tl.load(row_at + d)
        else:
            a = tl.load(row_at + d, mask=(inner < D - d)[None, :], other=0.0)
        b = _weights(w, expert, neuron, d, D, H, NEURONS, INNER, DESCRIBED)
        product = tl.dot(a, b.T, product, input_precision=PRECISION)
        if GATED:
            b_gate = _weights(w_gate, expert, neuron, d, D, H, NEURONS, INNER, DESCRIBED)
            gate = tl.dot(a, b_gate.T, gate, input_precision=PRECISION)
    return product, gate


@triton.jit
def _tile(tiles, most_tiles, number):
    """Expert, first row and end of a tile; an empty range of rows after the last tile."""
    exists = number < tl.load(tiles + most_tiles * 3)
    expert = tl.load(tiles + number * 3, mask=exists, other=0)
    first = tl.load(tiles + number * 3 + 1, mask=exists, other=0)
    end = tl.load(tiles + number * 3 + 2, mask=exists, other=0)
    return expert, first, end


@triton.jit
def _spread(
    a, w, a_gate, w_gate, expert, neuron, out, pair, there,
    D: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out[pair] = a @ w[expert, neuron:] (+ a_gate @ w_gate[expert, neuron:]), for a [ROWS, NEURONS] in registers."""
    column = tl.arange(0, COLUMNS)
    out_at = out + pair.to(tl.int64)[:, None] * D + column[None, :]
    for d in range(0, D, COLUMNS):
        b = _weights(w, expert, neuron, d, D, H, NEURONS, COLUMNS, DESCRIBED)
        product = tl.dot(a, b, input_precision=PRECISION)
        if GATED:
            b_gate = _weights(w_gate, expert, neuron, d, D, H, NEURONS, COLUMNS, DESCRIBED)
            product = tl.dot(a_gate, b_gate, product, input_precision=PRECISION)
        mask = there[:, None]
        if D % COLUMNS != 0:
            mask = mask & (column < D - d)[None, :]
        tl.store(out_at + d, product.to(out.dtype.element_ty), mask=mask)


@triton.jit
def up(
    x, w_in, w_gate, b_in, weights, pairs, tiles, hidden, pre, gate, w_out, out, most_tiles,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, KEEP: tl.constexpr, DOWN: tl.constexpr,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden [N, H]: activations of each pair's expert, times the pair's weight; KEEP also writes their inputs.

    DOWN, with all H neurons in one piece, also writes the pairs' outputs out [N, D], as `down` does.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pieces: tl.constexpr = (H + NEURONS - 1) // NEURONS
    expert, first, end = _tile(tiles, most_tiles, tl.program_id(0) // pieces)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    pair = tl.load(pairs + row, mask=row < end, other=0)
    first_neuron = tl.program_id(0) % pieces * NEURONS
    product, gated = _rows_by_neurons(
        x, pair // K, w_in, w_gate, expert, first_neuron, D, H, GATED, ROWS, NEURONS, INNER, PRECISION, DESCRIBED
    )
    neuron = first_neuron + tl.arange(0, NEURONS)
    inside = neuron < H
    if BIAS:
        product += tl.load(b_in + expert * H + neuron, mask=inside, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * H + neuron[None, :]
    mask = (row < end)[:, None] & inside[None, :]
    kind = hidden.dtype.element_ty
    if KEEP:
        tl.store(pre + at, product.to(kind), mask=mask)
        if GATED:
            tl.store(gate + at, gated.to(kind), mask=mask)
    if GATED:
        value = activate(gated, ACTIVATION) * product
    else:
        value = activate(product, ACTIVATION)
    if WEIGHTED:
        value *= tl.load(weights + pair, mask=row < end, other=0.0).to(tl.float32)[:, None]
    tl.store(hidden + at, value.to(kind), mask=mask)
    if DOWN:
        _spread(
            value.to(kind), w_out, value.to(kind), w_out, expert, first_neuron, out, pair, row < end,
            D, H, False, NEURONS, COLUMNS, PRECISION, DESCRIBED,
        )  # fmt: skip


@triton.jit
def up_backward(
    dy, w_out, weights, pairs, tiles, pre, gate, dpre, dgate, dweights, db_tiles, w_in, w_gate, out, most_tiles,
    n_tokens,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, DOWN: tl.constexpr,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Gradients of the activations' inputs in `up`, from dy [T, D], and of the pairs' weights by piece of H.

    DOWN, with all H neurons in one piece, also writes each pair's gradient of its token, out [N, D]. With
    BIAS, db_tiles holds the sums of dpre over each tile's rows, for `gradients.add_tiles`.
    """
    pieces: tl.constexpr = (H + NEURONS - 1) // NEURONS
    piece = tl.program_id(0) % pieces
    expert, first, end = _tile(tiles, most_tiles, tl.program_id(0) // pieces)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    pair = tl.load(pairs + row, mask=row < end, other=0)
    grad, _ = _rows_by_neurons(
        dy, pair // K, w_out, w_out, expert, piece * NEURONS, D, H, False, ROWS, NEURONS, INNER, PRECISION, DESCRIBED
    )
    neuron = piece * NEURONS + tl.arange(0, NEURONS)
    inside = neuron < H
    at = row.to(tl.int64)[:, None] * H + neuron[None, :]
    mask = (row < end)[:, None] & inside[None, :]
    kind = dpre.dtype.element_ty
    before = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        gated = tl.load(gate + at, mask=mask, other=0.0).to(tl.float32)
        act = activate(gated, ACTIVATION)
        if WEIGHTED:
            by_weight = tl.sum(grad * act * before, axis=1)
    elif WEIGHTED:
        by_weight = tl.sum(grad * activate(before, ACTIVATION), axis=1)
    if WEIGHTED:
        tl.store(dweights + piece.to(tl.int64) * n_tokens * K + pair, by_weight, mask=row < end)
        grad *= tl.load(weights + pair, mask=row < end, other=0.0).to(tl.float32)[:, None]
    if GATED:
        slope = (grad * act).to(kind)
        slope_gate = (grad * before * derivative(gated, ACTIVATION)).to(kind)
        tl.store(dgate + at, slope_gate, mask=mask)
    else:
        slope = (grad * derivative(before, ACTIVATION)).to(kind)
        slope_gate = slope
    tl.store(dpre + at, slope, mask=mask)
    if BIAS:
        sums = tl.sum(tl.where(mask, slope, 0.0).to(tl.float32), axis=0)
        tl.store(db_tiles + bias_slot(expert, first, ROWS) * H + neuron, sums, mask=inside)
    if DOWN:
        _spread(
            slope, w_in, slope_gate, w_gate, expert, piece * NEURONS, out, pair, row < end,
            D, H, GATED, NEURONS, COLUMNS, PRECISION, DESCRIBED,
        )  # fmt: skip


@triton.jit
def _rows(
    hidden, first, end, h, H: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr, DESCRIBED: tl.constexpr
):  # fmt: skip
    """Rows from `first` and columns from h of hidden [N, H]: [ROWS, INNER]. Rows behind the end hold anything."""
    if DESCRIBED:
        return hidden.load([first, h])
    else:
        inner = tl.arange(0, INNER)
        row = tl.minimum(first + tl.arange(0, ROWS), end - 1)
        at = hidden + row.to(tl.int64)[:, None] * H + inner[None, :] + h
        if H % INNER == 0:
            return tl.load(at)
        else:
            return tl.load(at, mask=(inner < H - h)[None, :], other=0.0)


@triton.jit
def down(
    hidden, w, hidden_gate, w_gate, pairs, tiles, out, most_tiles,
    D: tl.constexpr, H: tl.constexpr, GATED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [N, D], at the pair's own place: hidden [N, H] @ w[expert] [H, D], and the gate's product added to it."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    pieces: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    expert, first, end = _tile(tiles, most_tiles, tl.program_id(0) // pieces)
    if first >= end:
        return
    first_column = tl.program_id(0) % pieces * COLUMNS
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for h in range(0, H, INNER):
        a = _rows(hidden, first, end, h, H, ROWS, INNER, DESCRIBED)
        b = _weights(w, expert, h, first_column, D, H, INNER, COLUMNS, DESCRIBED)
        product = tl.dot(a, b, product, input_precision=PRECISION)
        if GATED:
            a_gate = _rows(hidden_gate, first, end, h, H, ROWS, INNER, DESCRIBED)
            b_gate = _weights(w_gate, expert, h, first_column, D, H, INNER, COLUMNS, DESCRIBED)
            product = tl.dot(a_gate, b_gate, product, input_precision=PRECISION)
    row = first + tl.arange(0, ROWS)
    column = first_column + tl.arange(0, COLUMNS)
    pair = tl.load(pairs + row, mask=row < end, other=0)
    at = out + pair.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(at, product.to(out.dtype.element_ty), mask=(row < end)[:, None] & (column < D)[None, :])
