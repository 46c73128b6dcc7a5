"""Kernels of a step of generation beside the FFN's (`moe.kernels.decode`, which says how they follow each other).

Shape letters: D model width, DP that padded to a power of two, V vocabulary, N places of the cache, W width of a head,
E experts.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels.decode import last_to_arrive, load_norm, load_row, norm_factors, normalised, store_stats


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
    D: tl.constexpr, W: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Query [D] of the normalised row, and its key and value into the cache [heads, N, W], at `position`.

    w [D, 3 * D], b [3 * D]. A program takes COLUMNS columns, and ROWS rows at a time, the first of which it reads
    before it waits.
    """
    if PDL:
        gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS)
    tile = tl.load(w + place[:, None] * (3 * D) + column[None, :], mask=(place < D)[:, None], other=0.0)
    factor, added = load_norm(gain, bias, place, D)
    offset = tl.load(b + column)
    at = tl.load(position)
    if PDL:
        gdc_wait()
    row = load_row(x, place, D)
    mean, scale = norm_factors(stats, eps, BLOCKS, SIZE)
    total = tl.sum(tile.to(tl.float32) * normalised(row, mean, scale, factor, added)[:, None], axis=0)
    for first in tl.static_range(ROWS, D, ROWS):
        place = first + tl.arange(0, ROWS)
        tile = tl.load(w + place[:, None] * (3 * D) + column[None, :], mask=(place < D)[:, None], other=0.0)
        factor, added = load_norm(gain, bias, place, D)
        row = normalised(load_row(x, place, D), mean, scale, factor, added)
        total += tl.sum(tile.to(tl.float32) * row[:, None], axis=0)
    total += offset.to(tl.float32)
    which, inner = column // D, column % D
    cell = (inner // W * N + at) * W + inner % W
    tl.store(query + inner, total, mask=which == 0)
    tl.store(keys + cell, total.to(keys.dtype.element_ty), mask=which == 1)
    tl.store(values + cell, total.to(values.dtype.element_ty), mask=which == 2)


@triton.jit
def attend(
    query, keys, values, position, parts, sums, scale,
    W: tl.constexpr, WP: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Parts of the attention of each head to the places up to `position`, of CHUNK places each.

    parts [heads, CHUNKS, W]: weighted values; sums [heads, CHUNKS, 2]: the largest score, and the sum of the weights,
    that of the largest score being 1.
    """
    head, chunk = tl.program_id(0), tl.program_id(1)
    at = tl.load(position)
    if chunk * CHUNK > at:
        return
    if PDL:
        gdc_launch_dependents()
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    width = tl.arange(0, WP)
    inside = width < W
    cell = (head * N + place)[:, None] * W + width[None, :]
    # Those before this token do not wait for it.
    known, newest = (place < at)[:, None] & inside[None, :], (place == at)[:, None] & inside[None, :]
    key = tl.load(keys + cell, mask=known, other=0.0)
    value = tl.load(values + cell, mask=known, other=0.0)
    if PDL:
        gdc_wait()
    asked = tl.load(query + head * W + width, mask=inside, other=0.0, cache_modifier=".cg") * scale
    own_key = tl.load(keys + cell, mask=newest, other=0.0, cache_modifier=".cg")
    own_value = tl.load(values + cell, mask=newest, other=0.0, cache_modifier=".cg")
    key, value = tl.where(newest, own_key, key).to(tl.float32), tl.where(newest, own_value, value).to(tl.float32)
    score = tl.where(place <= at, tl.sum(key * asked[None, :], axis=1), float("-inf"))
    most = tl.max(score, axis=0)
    weight = tl.exp(score - most)
    part = head * CHUNKS + chunk
    tl.store(parts + part * W + width, tl.sum(weight[:, None] * value, axis=0), mask=inside)
    tl.store(sums + 2 * part, most)
    tl.store(sums + 2 * part + 1, tl.sum(weight, axis=0))


@triton.jit
def _attended(parts, sums, place, chunks, D: tl.constexpr, W: tl.constexpr, CHUNKS: tl.constexpr):
    """What the heads attended to, put together of so many parts, at some places of [D]."""
    inside, first = place < D, place // W * CHUNKS
    most = tl.full(place.shape, float("-inf"), tl.float32)
    weights, total = tl.zeros(place.shape, tl.float32), tl.zeros(place.shape, tl.float32)
    for chunk in range(chunks):
        at = first + chunk
        highest = tl.load(sums + 2 * at, mask=inside, other=0.0, cache_modifier=".cg")
        weight = tl.load(sums + 2 * at + 1, mask=inside, other=1.0, cache_modifier=".cg")
        value = tl.load(parts + at * W + place % W, mask=inside, other=0.0, cache_modifier=".cg")
        top = tl.maximum(most, highest)
        before, now = tl.exp(most - top), tl.exp(highest - top)
        weights, total, most = weights * before + weight * now, total * before + value * now, top
    return total / weights


@triton.jit
def mix(
    parts, sums, position, w, b, x, stats, directions, gain, products,
    D: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    ROWS: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, SPARSE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x [D] += what the heads attended to (`attend`) @ w + b, and the new row's stats by blocks of COLUMNS.

    If SPARSE, also each block's part in the router's scores, products [blocks, E]: the directions [E, D], times the
    next norm's gain, times x. Rows are taken as in `project`.
    """
    if PDL:
        gdc_launch_dependents()
    block = tl.program_id(0)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    place, expert = tl.arange(0, ROWS), tl.arange(0, EP)
    tile = tl.load(w + place[:, None] * D + column[None, :], mask=(place < D)[:, None], other=0.0)
    added = tl.load(b + column)
    chunks = tl.load(position) // CHUNK + 1
    if SPARSE:
        at = directions + expert[:, None] * D + column[None, :]
        direction = tl.load(at, mask=(expert < E)[:, None], other=0.0)
        factor = tl.load(gain + column)
    if PDL:
        gdc_wait()
    before = tl.load(x + column, cache_modifier=".cg")
    row = _attended(parts, sums, place, chunks, D, W, CHUNKS)
    total = tl.sum(tile.to(tl.float32) * row[:, None], axis=0)
    for first in tl.static_range(ROWS, D, ROWS):
        place = first + tl.arange(0, ROWS)
        tile = tl.load(w + place[:, None] * D + column[None, :], mask=(place < D)[:, None], other=0.0)
        row = _attended(parts, sums, place, chunks, D, W, CHUNKS)
        total += tl.sum(tile.to(tl.float32) * row[:, None], axis=0)
    total += before + added.to(tl.float32)
    tl.store(x + column, total)
    store_stats(stats, block, total, COLUMNS)
    if SPARSE:
        product = direction.to(tl.float32) * (factor.to(tl.float32) * total)[None, :]
        tl.store(products + block * E + expert, tl.sum(product, axis=1), mask=expert < E)


@triton.jit
def unembed(
    x, stats, gain, bias, eps, w, logits, best, counter, likeliest,
    D: tl.constexpr, DP: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    PARTS_PADDED: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr,
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
    mean, scale = norm_factors(stats, eps, BLOCKS, SIZE)
    row = normalised(load_row(x, place, D), mean, scale, factor, added)
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
