"""Kernels of a step of generation beside the FFN's (`moe.kernels.decode`, which says how they follow each other).

Shape letters: D model width, DP that padded to a power of two, V vocabulary, N places of the cache, W width of a head,
E experts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels.decode import last_to_arrive, load_norm, load_row, normalised, store_stats


@triton.jit
def embed(tokens, position, token_table, position_table, x, stats, D: tl.constexpr, SIZE: tl.constexpr):
    """x [D] in float32: the last token and its position, embedded; and the row's stats by blocks of SIZE."""
    block = tl.program_id(0)
    place = block * SIZE + tl.arange(0, SIZE)
    row = tl.load(token_table + tl.load(tokens) * D + place).to(tl.float32)
    row += tl.load(position_table + tl.load(position) * D + place).to(tl.float32)
    tl.store(x + place, row)
    store_stats(stats, block, row, SIZE)


@triton.jit
def project(
    x, stats, gain, bias, eps, w, b, position, query, keys, values,
    D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Query [D] of the normalised row, and its key and value into the cache [heads, N, W], at `position`.

    w [D, 3 * D], b [3 * D].
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, DP)
    factor, added = load_norm(gain, bias, place, D)
    offset = tl.load(b + column).to(tl.float32)
    at = tl.load(position)
    tile = tl.load(w + place[:, None] * (3 * D) + column[None, :], mask=(place < D)[:, None], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, means, deviations = load_row(x, stats, place, D, True, BLOCKS, PADDED)
    row = normalised(row, means, deviations, factor, added, eps, BLOCKS, PADDED, SIZE)
    total = tl.sum(tile.to(tl.float32) * row[:, None], axis=0) + offset
    which, inner = column // D, column % D
    cell = (inner // W * N + at) * W + inner % W
    tl.store(query + inner, total, mask=which == 0)
    tl.store(keys + cell, total.to(keys.dtype.element_ty), mask=which == 1)
    tl.store(values + cell, total.to(values.dtype.element_ty), mask=which == 2)


@triton.jit
def attend(
    query, keys, values, position, parts, counters, y, scale,
    W: tl.constexpr, WP: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    CHUNKS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [D]: attention of one head to the places up to `position`; a program reads CHUNK of them.

    The last program of a head puts its parts together: weighted values, the largest score and the sum of weights.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    at = tl.load(position)
    if chunk * CHUNK > at:
        return
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    width = tl.arange(0, WP)
    inside = width < W
    cell = (head * N + place)[:, None] * W + width[None, :]
    # Those before this token do not wait for it.
    known = (place < at)[:, None] & inside[None, :]
    key = tl.load(keys + cell, mask=known, other=0.0)
    value = tl.load(values + cell, mask=known, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    own = (head * N + at) * W + width
    own_key = tl.load(keys + own, mask=inside, other=0.0, cache_modifier=".cg")
    own_value = tl.load(values + own, mask=inside, other=0.0, cache_modifier=".cg")
    asked = tl.load(query + head * W + width, mask=inside, other=0.0, cache_modifier=".cg") * scale
    newest = (place == at)[:, None]
    key = tl.where(newest, own_key[None, :], key).to(tl.float32)
    value = tl.where(newest, own_value[None, :], value).to(tl.float32)
    score = tl.where(place <= at, tl.sum(key * asked[None, :], axis=1), float("-inf"))
    most = tl.max(score, axis=0)
    weight = tl.exp(score - most)
    total = tl.sum(weight[:, None] * value, axis=0)
    if CHUNKS == 1:
        tl.store(y + head * W + width, total / tl.sum(weight, axis=0), mask=inside)
    else:
        part_at = parts + (head * CHUNKS + chunk) * (W + 2)
        tl.store(part_at + width, total, mask=inside)
        tl.store(part_at + W, most)
        tl.store(part_at + W + 1, tl.sum(weight, axis=0))
        chunks = at // CHUNK + 1
        if last_to_arrive(counters + head, chunks):
            every = tl.arange(0, CHUNKS_PADDED)
            there = every < chunks
            every_at = parts + (head * CHUNKS + every) * (W + 2)
            mask = there[:, None] & inside[None, :]
            highest = tl.load(every_at + W, mask=there, other=float("-inf"), cache_modifier=".cg")
            sums = tl.load(every_at + W + 1, mask=there, other=0.0, cache_modifier=".cg")
            totals = tl.load(every_at[:, None] + width[None, :], mask=mask, other=0.0, cache_modifier=".cg")
            factor = tl.exp(highest - tl.max(highest, axis=0))
            mean = tl.sum(totals * factor[:, None], axis=0) / tl.sum(sums * factor, axis=0)
            tl.store(y + head * W + width, mean, mask=inside)


@triton.jit
def mix(
    attended, w, b, x, stats, directions, gain, products,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    SPARSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [D] += attended [D] @ w + b, and the new row's stats by blocks of COLUMNS.

    If SPARSE, also each block's part in the router's scores, products [blocks, E]: the directions [E, D], times the
    next norm's gain, times x.
    """
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    place, expert = tl.arange(0, DP), tl.arange(0, EP)
    tile = tl.load(w + place[:, None] * D + column[None, :], mask=(place < D)[:, None], other=0.0)
    added = tl.load(b + column).to(tl.float32)
    if SPARSE:
        at = directions + expert[:, None] * D + column[None, :]
        direction = tl.load(at, mask=(expert < E)[:, None], other=0.0).to(tl.float32)
        direction *= tl.load(gain + column).to(tl.float32)[None, :]
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(attended + place, mask=place < D, other=0.0, cache_modifier=".cg")
    added += tl.load(x + column, cache_modifier=".cg")
    total = tl.sum(tile.to(tl.float32) * row[:, None], axis=0) + added
    tl.store(x + column, total)
    store_stats(stats, block, total, COLUMNS)
    if SPARSE:
        tl.store(products + block * E + expert, tl.sum(direction * total[None, :], axis=1), mask=expert < E)


@triton.jit
def unembed(
    x, stats, gain, bias, eps, w, logits, best, counter, likeliest,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """logits [V] in float32, the normalised row times w [V, D]; and the likeliest token, the first of equals.

    A program takes ROWS tokens; the last one to be done finds the best of all by the best logit of each.
    """
    part = tl.program_id(0)
    entry = part * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, DP)
    factor, added = load_norm(gain, bias, place, D)
    at = w + entry.to(tl.int64)[:, None] * D + place[None, :]
    tile = tl.load(at, mask=(entry < V)[:, None] & (place < D)[None, :], other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, means, deviations = load_row(x, stats, place, D, True, BLOCKS, PADDED)
    row = normalised(row, means, deviations, factor, added, eps, BLOCKS, PADDED, SIZE)
    value = tl.sum(tile.to(tl.float32) * row[None, :], axis=1)
    tl.store(logits + entry, value, mask=entry < V)
    tl.store(best + part, tl.max(tl.where(entry < V, value, float("-inf")), axis=0))
    if last_to_arrive(counter, PARTS):
        every = tl.arange(0, PARTS_PADDED)
        tops = tl.load(best + every, mask=every < PARTS, other=float("-inf"), cache_modifier=".cg")
        top = tl.max(tops, axis=0)
        entry = tl.min(tl.where(tops == top, every, PARTS), axis=0) * ROWS + tl.arange(0, ROWS)
        value = tl.load(logits + entry, mask=entry < V, other=float("-inf"), cache_modifier=".cg")
        tl.store(likeliest, tl.min(tl.where(value == top, entry, V), axis=0).to(tl.int64))
