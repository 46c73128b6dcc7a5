"""The sparse FFN for a few tokens: every program reads one piece of one chosen expert's weights, once.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token.
"""

import triton
import triton.language as tl

from ssd_lit.moe.kernels.activations import activate


@triton.jit
def up_few(
    x, chosen, weights, w_in, w_gate, b_in, hidden,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BIAS: tl.constexpr, WEIGHTED: tl.constexpr, NEURONS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """hidden [T, K, H] in float32: the chosen experts' activations, times the expert's weight for the token."""
    pair = tl.program_id(0)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    expert = tl.load(chosen + pair)
    # A token with fewer experts has E in its other places: no neurons for those.
    inside = neuron < tl.where(expert < E, H, 0)
    inner = tl.arange(0, INNER)
    weight_at = (expert * H + neuron).to(tl.int64)[:, None] * D + inner[None, :]
    product = tl.zeros([NEURONS], tl.float32)
    gate = tl.zeros([NEURONS], tl.float32)
    for d in range(0, D, INNER):
        mask = inside[:, None] & (inner < D - d)[None, :]
        values = tl.load(x + (pair // K).to(tl.int64) * D + d + inner, mask=inner < D - d, other=0.0).to(tl.float32)
        product += tl.sum(tl.load(w_in + weight_at + d, mask=mask, other=0.0).to(tl.float32) * values[None, :], axis=1)
        if GATED:
            rows = tl.load(w_gate + weight_at + d, mask=mask, other=0.0).to(tl.float32)
            gate += tl.sum(rows * values[None, :], axis=1)
    if BIAS:
        product += tl.load(b_in + expert * H + neuron, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        value = activate(gate, ACTIVATION) * product
    else:
        value = activate(product, ACTIVATION)
    if WEIGHTED:
        value *= tl.load(weights + pair).to(tl.float32)
    tl.store(hidden + pair * H + neuron, tl.where(inside, value, 0.0), mask=neuron < H)


@triton.jit
def down_few(
    hidden, chosen, w_out, out,
    D: tl.constexpr, E: tl.constexpr, H: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [T, K, D] in float32: the output of each chosen expert."""
    pair = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    expert = tl.load(chosen + pair)
    neurons = tl.where(expert < E, H, 0)
    neuron = tl.arange(0, NEURONS)
    total = tl.zeros([COLUMNS], tl.float32)
    for h in range(0, H, NEURONS):
        inside = neuron < neurons - h
        rows = tl.load(
            w_out + (expert * H + h + neuron).to(tl.int64)[:, None] * D + column[None, :],
            mask=inside[:, None] & (column < D)[None, :],
            other=0.0,
        )
        values = tl.load(hidden + pair * H + h + neuron, mask=inside, other=0.0)
        total += tl.sum(rows.to(tl.float32) * values[:, None], axis=0)
    tl.store(out + pair * D + column, total, mask=column < D)
