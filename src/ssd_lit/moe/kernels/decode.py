"""The FFN of one token in two kernels, for generation: only the chosen experts' weights are read, in place and once.

A step of generation is a chain of small kernels; its time is that of reading weights, and of waiting for each other. So
each kernel lets the next one start at once (programmatic dependent launch), which reads what does not change in a step
before it waits for what this one computes, and converts nothing before, which would wait for the reading. Whatever an
earlier kernel of the chain wrote is read past the L1 cache, and as much of it at once as possible: a load behind a sum
begins only when the sum is there.

Shape letters: D model width, E experts, H neurons of one expert, S slots: places for chosen experts. DP and EP are D
and E padded to powers of two.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels.activations import activate, softplus


@triton.jit
def load_row(x, place, D: tl.constexpr):
    """A row x [D] in float32."""
    return tl.load(x + place, mask=place < D, other=0.0, cache_modifier=".cg").to(tl.float32)


@triton.jit
def load_norm(gain, bias, place, D: tl.constexpr):
    """Gain and bias [D] of a layer norm as they are stored: a conversion would wait for them."""
    return tl.load(gain + place, mask=place < D, other=0.0), tl.load(bias + place, mask=place < D, other=0.0)


@triton.jit
def norm_factors(stats, eps, BLOCKS: tl.constexpr, SIZE: tl.constexpr):
    """Mean and reciprocal standard deviation of a row of BLOCKS blocks of SIZE, by stats [BLOCKS, 2] (`store_stats`).

    Deviations from each block's own mean, and those of the means from the first, add up without cancellation. Blocks
    are taken 32 at a time, as one warp holds them: sums within a warp need no barrier.
    """
    lane = tl.arange(0, 32)
    first_mean = tl.load(stats, cache_modifier=".cg")
    off, squares = tl.zeros([32], tl.float32), tl.zeros([32], tl.float32)
    for first in tl.static_range(0, BLOCKS, 32):
        inside = first + lane < BLOCKS
        mean = tl.load(stats + 2 * (first + lane), mask=inside, other=0.0, cache_modifier=".cg")
        deviation = tl.load(stats + 2 * (first + lane) + 1, mask=inside, other=0.0, cache_modifier=".cg")
        difference = tl.where(inside, mean - first_mean, 0.0)
        off += difference
        squares += deviation + SIZE * difference * difference
    shift = tl.sum(off, axis=0) / BLOCKS
    variance = tl.sum(squares, axis=0) / (BLOCKS * SIZE) - shift * shift
    return first_mean + shift, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def normalised(row, mean, scale, gain, bias):
    """A row after a layer norm, given its factors."""
    return (row - mean) * scale * gain.to(tl.float32) + bias.to(tl.float32)


@triton.jit
def store_stats(stats, block, values, SIZE: tl.constexpr):
    """Mean and squared deviations of one block of a row."""
    mean = tl.sum(values, axis=0) / SIZE
    tl.store(stats + 2 * block, mean)
    tl.store(stats + 2 * block + 1, tl.sum((values - mean) * (values - mean), axis=0))


@triton.jit
def last_to_arrive(counter, expected):
    """Whether this is the last of so many programs to come here; it then sees what the others stored before."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _choose(score, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr):
    """By scores [EP]: which experts are chosen, and the slots of those, [EP].

    Chosen are the K best, or, with a THRESHOLD of 0 or more, all whose softplus is at least that share of the best's.
    """
    expert = tl.arange(0, EP)
    there = expert < E
    score = tl.where(there, score, float("-inf"))
    if THRESHOLD >= 0:
        taken = there & (softplus(score) >= THRESHOLD * softplus(tl.max(score, axis=0)))
    else:
        # As in `kernels.routing`, of equal scores the lower expert comes first.
        ahead, earlier = score[None, :] > score[:, None], expert[None, :] < expert[:, None]
        ahead = ahead | ((score[None, :] == score[:, None]) & earlier)
        taken = there & (tl.sum(ahead.to(tl.int32), axis=1) < K)
    return taken, tl.cumsum(taken.to(tl.int32), axis=0) - 1


@triton.jit
def _score(
    products, shift, offset, mean, scale,
    E: tl.constexpr, EP: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """[EP]: the dot products of the router's directions with a normalised row.

    products [BLOCKS, E] are those of the row's blocks before it is normalised, with the norm's gain in the directions;
    shift and offset [E] are the directions' products with the gain and with the norm's bias.
    """
    expert, block = tl.arange(0, EP), tl.arange(0, PADDED)
    parts = tl.load(
        products + block[:, None] * E + expert[None, :],
        mask=(block < BLOCKS)[:, None] & (expert < E)[None, :], other=0.0, cache_modifier=".cg",
    )  # fmt: skip
    return (tl.sum(parts, axis=0) - mean * shift) * scale + offset


@triton.jit
def up(
    x, stats, gain, bias, eps, products, shift, offset, chosen, weights, w_in, w_gate, b_in, hidden, tally,
    D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, H: tl.constexpr, NEURONS: tl.constexpr,
    CHOICE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr, TOTAL: tl.constexpr, WEIGHTED: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
    NORM: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden [S, H] in float32: activations of the slots' neurons, times the token's weight of the expert.

    x [D] is normalised if NORM. By CHOICE slots are "all" experts, those "given" in chosen [S], or those of the best
    "scores" (`_score`). With a THRESHOLD the numbers of chosen experts and of tokens are added to tally [2].
    """
    pieces: tl.constexpr = (H + NEURONS - 1) // NEURONS
    slot = tl.program_id(0) // pieces
    neuron = tl.program_id(0) % pieces * NEURONS + tl.arange(0, NEURONS)
    place, expert_place = tl.arange(0, DP), tl.arange(0, EP)
    if CHOICE == "all" and PDL:
        gdc_launch_dependents()
    if NORM:
        factor, added = load_norm(gain, bias, place, D)
    if CHOICE == "scores":
        shifts = tl.load(shift + expert_place, mask=expert_place < E, other=0.0)
        offsets = tl.load(offset + expert_place, mask=expert_place < E, other=0.0)
    weight = 1.0
    expert = slot
    if CHOICE != "all":
        # Only then is the choice there; and the next kernel reads it before it waits.
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row = load_row(x, place, D)
        if NORM:
            mean, scale = norm_factors(stats, eps, BLOCKS, SIZE)
        if CHOICE == "scores":
            score = _score(products, shifts, offsets, mean, scale, E, EP, BLOCKS, PADDED)
            taken, slots = _choose(score, E, EP, K, THRESHOLD)
            if THRESHOLD >= 0:
                if tl.program_id(0) == 0:
                    tl.atomic_add(tally, tl.sum(taken.to(tl.int64), axis=0))
                    tl.atomic_add(tally + 1, 1)
            mine = taken & (slots == slot)
            expert = tl.min(tl.where(mine, expert_place, E), axis=0)
            if TOTAL > 0:
                share = tl.where(taken, tl.exp(score - tl.max(tl.where(taken, score, float("-inf")), axis=0)), 0.0)
                weight = tl.sum(tl.where(mine, share, 0.0), axis=0) * (TOTAL / tl.sum(share, axis=0))
        else:
            expert = tl.load(chosen + slot).to(tl.int32)
            if WEIGHTED:
                weight = tl.load(weights + slot).to(tl.float32)
        if expert >= E:
            return
    inside = neuron < H
    mask = inside[:, None] & (place < D)[None, :]
    row_at = (expert * H + neuron).to(tl.int64)
    tile = tl.load(w_in + row_at[:, None] * D + place[None, :], mask=mask, other=0.0)
    if GATED:
        gate_tile = tl.load(w_gate + row_at[:, None] * D + place[None, :], mask=mask, other=0.0)
    if BIAS:
        before = tl.load(b_in + row_at, mask=inside, other=0.0)
    if CHOICE == "all":
        if PDL:
            gdc_wait()
        row = load_row(x, place, D)
        if NORM:
            mean, scale = norm_factors(stats, eps, BLOCKS, SIZE)
    if NORM:
        row = normalised(row, mean, scale, factor, added)
    value = tl.sum(tile.to(tl.float32) * row[None, :], axis=1)
    if BIAS:
        value += before.to(tl.float32)
    if GATED:
        value *= activate(tl.sum(gate_tile.to(tl.float32) * row[None, :], axis=1), ACTIVATION)
    else:
        value = activate(value, ACTIVATION)
    tl.store(hidden + slot * H + neuron, value * weight, mask=inside)


@triton.jit
def _rows_of_slots(
    row, w_out, column, experts, rows,
    D: tl.constexpr, EP: tl.constexpr, H: tl.constexpr,
):  # fmt: skip
    """The weights [ROWS, COLUMNS] of the slots' neurons by their number, of `rows` that there are, and which are.

    experts [EP] are those of the slots.
    """
    inside = row < rows
    expert = tl.gather(experts, tl.where(inside, row // H, 0), axis=0)
    tile = tl.load(
        w_out + (expert * H + row % H).to(tl.int64)[:, None] * D + column[None, :],
        mask=inside[:, None] & (column < D)[None, :], other=0.0,
    )  # fmt: skip
    return tile, inside


@triton.jit
def down(
    hidden, stats_before, eps, products, shift, offset, chosen, w_out, b_out, y, stats,
    D: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, H: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHOICE: tl.constexpr, K: tl.constexpr, THRESHOLD: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [D]: the slots' hidden neurons [S, H] times w_out. With RESIDUAL it is added to y, whose new stats are written.

    A program takes COLUMNS columns, and ROWS neurons at a time, the first of which it reads before it waits.
    """
    if PDL:
        gdc_launch_dependents()
    place = tl.arange(0, EP)
    if CHOICE == "scores":
        shifts = tl.load(shift + place, mask=place < E, other=0.0)
        offsets = tl.load(offset + place, mask=place < E, other=0.0)
        mean, scale = norm_factors(stats_before, eps, BLOCKS, SIZE)
        score = _score(products, shifts, offsets, mean, scale, E, EP, BLOCKS, PADDED)
        taken, slots = _choose(score, E, EP, K, THRESHOLD)
        mine = taken[None, :] & (slots[None, :] == place[:, None])
        experts = tl.min(tl.where(mine, place[None, :], E), axis=1)
    else:
        experts = tl.load(chosen + place, mask=place < SLOTS, other=E).to(tl.int32)
    # Those that are none stand behind the others.
    rows = tl.sum((experts < E).to(tl.int32), axis=0) * H
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    tile, inside = _rows_of_slots(row, w_out, column, experts, rows, D, EP, H)
    if BIAS:
        added = tl.load(b_out + column, mask=column < D, other=0.0)
    if PDL:
        gdc_wait()
    neurons = tl.load(hidden + row, mask=inside, other=0.0, cache_modifier=".cg")
    value = tl.zeros([COLUMNS], tl.float32)
    if RESIDUAL:
        value += tl.load(y + column, mask=column < D, other=0.0, cache_modifier=".cg")
    if BIAS:
        value += added.to(tl.float32)
    value += tl.sum(tile.to(tl.float32) * neurons[:, None], axis=0)
    for first in range(ROWS, rows, ROWS):
        tile, inside = _rows_of_slots(first + row, w_out, column, experts, rows, D, EP, H)
        neurons = tl.load(hidden + first + row, mask=inside, other=0.0, cache_modifier=".cg")
        value += tl.sum(tile.to(tl.float32) * neurons[:, None], axis=0)
    tl.store(y + column, value.to(y.dtype.element_ty), mask=column < D)
    if RESIDUAL:
        store_stats(stats, tl.program_id(0), value, COLUMNS)


@triton.jit
def down_in_parts(
    hidden, w_out, b_out, parts, counters, y, stats,
    D: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `down`, of all F neurons: a program takes ROWS of them, the last one adds up the PARTS of its columns."""
    part = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = part * ROWS + tl.arange(0, ROWS)
    inside, within = row < F, column < D
    tile = tl.load(
        w_out + row.to(tl.int64)[:, None] * D + column[None, :], mask=inside[:, None] & within[None, :], other=0.0
    )
    if BIAS:
        bias = tl.load(b_out + column, mask=within, other=0.0)
    if PDL:
        gdc_wait()
    values = tl.load(hidden + row, mask=inside, other=0.0, cache_modifier=".cg")
    added = tl.zeros([COLUMNS], tl.float32)
    if RESIDUAL:
        added += tl.load(y + column, mask=within, other=0.0, cache_modifier=".cg")
    if BIAS:
        added += bias.to(tl.float32)
    tl.store(parts + part * D + column, tl.sum(tile.to(tl.float32) * values[:, None], axis=0), mask=within)
    if last_to_arrive(counters + tl.program_id(0), PARTS):
        every = tl.arange(0, PADDED)
        sums = tl.load(
            parts + every[:, None] * D + column[None, :],
            mask=(every < PARTS)[:, None] & within[None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        value = tl.sum(sums, axis=0) + added
        tl.store(y + column, value.to(y.dtype.element_ty), mask=within)
        if RESIDUAL:
            store_stats(stats, tl.program_id(0), value, COLUMNS)
