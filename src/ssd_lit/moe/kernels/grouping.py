"""Tokens grouped by their experts, without atomics: the same choice always gives the same order.

A *pair* is a token with one of its experts, t * K + k. Pairs are put in order of their expert, and of their number
within one expert: a counting sort. Tiles cut the groups into pieces of at most BM rows of one expert.

Shape letters: T tokens, K experts a token, N = T * K pairs, E experts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ssd_lit.moe.kernels import early_launch

FEW_PAIRS = 8192
"""Up to so many pairs, one kernel does all: every program reads all pairs, and places those of its expert."""
CHUNK = 512
"""Pairs that a program places at a time, with few experts."""
NUMBERS = 2**14
"""Most numbers of a table of pairs by experts: more fit neither registers nor shared memory."""
MOST_BLOCKS = 512
"""Each block of chunks reads the counts of all others."""


class Groups(NamedTuple):
    """Pairs in order of their expert, and their tiles."""

    pairs: Tensor
    """[N] int32; pairs without an expert come last."""
    bounds: Tensor
    """[E + 1] int32: rows bounds[e] to bounds[e + 1] of `pairs` belong to expert e."""
    tiles: Tensor
    """[most tiles + 1, 3] int32: expert, first row and end of every tile; the last line holds the number of tiles."""


def group_by_expert(chosen: Tensor, n_experts: int, *, ragged: bool, tile_rows: int, window: int) -> Groups:
    """Group the pairs of `chosen` [T, K]: experts 0 to E - 1, and E for none where it is `ragged`.

    Tiles of `tile_rows` rows come in windows: `window` tiles of the first expert, as many of the next and so on, then
    the next window. A small window keeps few tokens in the cache at a time, a large one few experts.
    """
    n = chosen.numel()
    pairs = torch.empty(n, dtype=torch.int32, device=chosen.device)
    bounds = torch.empty(n_experts + 1, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(most_tiles(n, n_experts, tile_rows) + 1, 3, dtype=torch.int32, device=chosen.device)
    most = len(tiles) - 1
    padded = max(2, triton.next_power_of_2(n_experts + ragged))
    if n <= FEW_PAIRS:
        _group_few[(n_experts + ragged,)](
            chosen, pairs, bounds, tiles, n, most, n_experts, window,
            PADDED=padded, ROWS=tile_rows, PAIRS=max(32, triton.next_power_of_2(n)),
            BLOCK=max(1, min(64, NUMBERS // 4 // padded)), num_warps=8,
            **early_launch(chosen),
        )  # fmt: skip
        return Groups(pairs, bounds, tiles)
    block = CHUNK * triton.next_power_of_2(triton.cdiv(n, MOST_BLOCKS * CHUNK))
    blocks = triton.cdiv(n, block)
    counts = torch.empty(blocks, padded, dtype=torch.int32, device=chosen.device)
    _count[(blocks,)](chosen, counts, n, PADDED=padded, BLOCK=block, **early_launch(chosen))
    _place_and_cut[(n_experts + blocks,)](
        chosen, counts, pairs, bounds, tiles, n, blocks, most, n_experts, window,
        PADDED=padded, ROWS=tile_rows, BLOCK=block, CHUNK=max(1, min(CHUNK, NUMBERS // padded)),
        COUNTS=max(1, min(128, NUMBERS // 4 // padded)), TILES=max(1, min(64, NUMBERS // 4 // padded)),
        num_warps=8, **early_launch(chosen),
    )  # fmt: skip
    return Groups(pairs, bounds, tiles)


def most_tiles(n_pairs: int, n_experts: int, tile_rows: int) -> int:
    """The largest possible number of tiles, for any load of the experts."""
    return n_pairs // tile_rows + n_experts


def rows_of_pairs(groups: Groups, k: int) -> tuple[Tensor, Tensor]:
    """The token of every row of the groups, and the row of every pair t * K + k, both [N] int32."""
    n = len(groups.pairs)
    tokens, places = torch.empty_like(groups.pairs), torch.empty_like(groups.pairs)
    _rows_of_pairs[(triton.cdiv(n, 1024),)](groups.pairs, tokens, places, n, K=k, BLOCK=1024)
    return tokens, places


@triton.jit
def _rows_of_pairs(pairs, tokens, places, n, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(pairs + row, mask=row < n, other=0)
    tl.store(tokens + row, pair // K, mask=row < n)
    tl.store(places + pair, row, mask=row < n)


@triton.jit
def _group_few(
    chosen, pairs, bounds, tiles, n, most, n_experts, window,
    PADDED: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Everything about one expert's pairs, or about the pairs without one."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    me = tl.program_id(0)
    pair = tl.arange(0, PAIRS)
    there = pair < n
    expert = tl.load(chosen + pair, mask=there, other=0).to(tl.int32)
    experts = tl.arange(0, PADDED)
    counts = tl.histogram(expert, PADDED, mask=there)
    end = tl.cumsum(counts, axis=0)
    mine = (expert == me) & there
    row = tl.sum(tl.where(experts < me, counts, 0), axis=0) + tl.cumsum(mine.to(tl.int32), axis=0) - 1
    tl.store(pairs + row, pair, mask=mine)
    if me < n_experts:
        _cut(me, experts, end - counts, end, bounds, tiles, most, n_experts, window, ROWS, BLOCK)


@triton.jit
def _count(chosen, counts, n, PADDED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """counts [blocks, PADDED]: the pairs of each expert in a block."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + place, mask=place < n, other=0).to(tl.int32)
    count = tl.histogram(expert, PADDED, mask=place < n)
    tl.store(counts + block * PADDED + tl.arange(0, PADDED), count)


@triton.jit
def _place_and_cut(
    chosen, counts, pairs, bounds, tiles, n, blocks, most, n_experts, window,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
    COUNTS: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first programs cut one expert's rows into tiles each, the others place a block of pairs each."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    me = tl.program_id(0)
    block = me - n_experts
    experts = tl.arange(0, PADDED)
    total = tl.zeros([PADDED], tl.int32)
    earlier = tl.zeros([PADDED], tl.int32)
    for first in range(0, blocks, COUNTS):
        other = first + tl.arange(0, COUNTS)
        count = tl.load(counts + other[:, None] * PADDED + experts[None, :], mask=(other < blocks)[:, None], other=0)
        total += tl.sum(count, axis=0)
        earlier += tl.sum(tl.where((other < block)[:, None], count, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    if me < n_experts:
        _cut(me, experts, end - total, end, bounds, tiles, most, n_experts, window, ROWS, TILES)
    else:
        # Where each expert's pairs of this block begin; within a chunk, as many of them stand before one.
        row = end - total + earlier
        for first in range(block * BLOCK, (block + 1) * BLOCK, CHUNK):
            pair = first + tl.arange(0, CHUNK)
            expert = tl.load(chosen + pair, mask=pair < n, other=PADDED).to(tl.int32)
            mine = (expert[:, None] == experts[None, :]).to(tl.int32)
            place = tl.sum(mine * (row[None, :] + tl.cumsum(mine, axis=0) - 1), axis=1)
            tl.store(pairs + place, pair, mask=pair < n)
            row += tl.sum(mine, axis=0)


@triton.jit
def _cut(me, experts, begin, end, bounds, tiles, most, n_experts, window, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Bounds and tiles of one expert, given the first rows and ends of all."""
    pieces = tl.where(experts < n_experts, (end - begin + ROWS - 1) // ROWS, 0)
    my_begin = tl.sum(tl.where(experts == me, begin, 0), axis=0)
    my_end = tl.sum(tl.where(experts == me, end, 0), axis=0)
    tl.store(bounds + me, my_begin)
    if me == n_experts - 1:
        tl.store(bounds + n_experts, my_end)
        tl.store(tiles + most * 3, tl.sum(pieces, axis=0))
    for first in range(0, (my_end - my_begin + ROWS - 1) // ROWS, BLOCK):
        piece = first + tl.arange(0, BLOCK)
        row = my_begin + piece * ROWS
        # Before it come all pieces of earlier windows, and those of its window that belong to earlier experts.
        opened = piece // window * window
        earlier = tl.sum(tl.minimum(pieces[None, :], opened[:, None]), axis=1)
        beside = tl.minimum(tl.maximum(pieces[None, :] - opened[:, None], 0), window)
        place = earlier + tl.sum(tl.where(experts[None, :] < me, beside, 0), axis=1) + piece - opened
        inside = row < my_end
        tl.store(tiles + place * 3, me, mask=inside)
        tl.store(tiles + place * 3 + 1, row, mask=inside)
        tl.store(tiles + place * 3 + 2, tl.minimum(row + ROWS, my_end), mask=inside)
