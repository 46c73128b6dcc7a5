"""The FFN of a few tokens in three kernels, for generation: the weights of each chosen expert are read once for all.

Shape letters: B tokens, D model width, E experts, H neurons of one expert, S slots: the experts that any token chose,
in order. EP is E padded to a power of two; tokens are padded to 16 rows of a matrix product.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels.activations import activate


@triton.jit
def spread(
    chosen, weights, matrix, K: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WEIGHTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """matrix [B, E]: each token's weights of experts, 0 for those that are not among its chosen [B, K]."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    token = tl.program_id(0)
    expert = tl.arange(0, EP)
    row = tl.zeros([EP], tl.float32)
    for k in tl.static_range(K):
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + token * K + k).to(tl.float32)
        row = tl.where(expert == tl.load(chosen + token * K + k), weight, row)
    tl.store(matrix + token * E + expert, row, mask=expert < E)


@triton.jit
def _slot(slot, matrix, B: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, TOKENS: tl.constexpr):
    """The expert of a slot, E if there is none, and the tokens' weights of it, [TOKENS]."""
    token, expert = tl.arange(0, TOKENS), tl.arange(0, EP)
    weights = tl.load(
        matrix + token[:, None] * E + expert[None, :],
        mask=(token < B)[:, None] & (expert < E)[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    taken = tl.max((weights != 0.0).to(tl.int32), axis=0)
    mine = (taken > 0) & (tl.cumsum(taken, axis=0) - 1 == slot)
    found = tl.where(slot < tl.sum(taken, axis=0), tl.sum(tl.where(mine, expert, 0), axis=0), E)
    return found, tl.sum(tl.where(mine[None, :], weights, 0.0), axis=1)


@triton.jit
def up(
    x, matrix, w_in, w_gate, b_in, hidden,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, H: tl.constexpr, SLOTS: tl.constexpr,
    NEURONS: tl.constexpr, INNER: tl.constexpr, TOKENS: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden [B, SLOTS, H]: activations of the slots' neurons, times the tokens' weights of the expert."""
    pieces: tl.constexpr = (H + NEURONS - 1) // NEURONS
    slot = tl.program_id(0) // pieces
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert, weight = _slot(slot, matrix, B, E, EP, TOKENS)
    if expert >= E:
        return
    token, inner = tl.arange(0, TOKENS), tl.arange(0, INNER)
    neuron = tl.program_id(0) % pieces * NEURONS + tl.arange(0, NEURONS)
    inside = neuron < H
    row_at = (expert * H + neuron).to(tl.int64)
    value = tl.zeros([TOKENS, NEURONS], tl.float32)
    gate = tl.zeros([TOKENS, NEURONS] if GATED else [1, 1], tl.float32)
    for d in range(0, D, INNER):
        left = inner < D - d
        rows = tl.load(
            x + token[:, None] * D + d + inner[None, :], mask=(token < B)[:, None] & left[None, :], other=0.0
        )
        at = row_at[None, :] * D + d + inner[:, None]
        mask = inside[None, :] & left[:, None]
        value = tl.dot(rows, tl.load(w_in + at, mask=mask, other=0.0), value, input_precision=PRECISION)
        if GATED:
            gate = tl.dot(rows, tl.load(w_gate + at, mask=mask, other=0.0), gate, input_precision=PRECISION)
    if BIAS:
        value += tl.load(b_in + row_at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if GATED:
        value *= activate(gate, ACTIVATION)
    else:
        value = activate(value, ACTIVATION)
    at = (token * SLOTS + slot)[:, None] * H + neuron[None, :]
    value = (value * weight[:, None]).to(hidden.dtype.element_ty)
    tl.store(hidden + at, value, mask=(token < B)[:, None] & inside[None, :])


@triton.jit
def down(
    hidden, matrix, w_out, parts,
    B: tl.constexpr, D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, H: tl.constexpr, SLOTS: tl.constexpr,
    INNER: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """parts [SLOTS, B, D] in float32: each slot's outputs, zeros where there is no expert."""
    slot = tl.program_id(1)
    expert, _ = _slot(slot, matrix, B, E, EP, TOKENS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, inner = tl.arange(0, TOKENS), tl.arange(0, INNER)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([TOKENS, COLUMNS], tl.float32)
    for h in range(0, tl.where(expert < E, H, 0), INNER):
        left = inner < H - h
        values = tl.load(
            hidden + (token * SLOTS + slot)[:, None] * H + h + inner[None, :],
            mask=(token < B)[:, None] & left[None, :], other=0.0,
        )  # fmt: skip
        rows = tl.load(
            w_out + (expert * H + h + inner).to(tl.int64)[:, None] * D + column[None, :],
            mask=left[:, None] & (column < D)[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(values, rows, total, input_precision=PRECISION)
    tl.store(
        parts + (slot * B + token)[:, None] * D + column[None, :],
        total,
        mask=(token < B)[:, None] & (column < D)[None, :],
    )
