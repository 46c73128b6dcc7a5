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

PAIRS_PER_BLOCK = 256


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
    blocks = triton.cdiv(n, PAIRS_PER_BLOCK)
    padded = max(2, triton.next_power_of_2(n_experts + ragged))
    counts = torch.empty(padded, blocks, dtype=torch.int32, device=chosen.device)
    _count[(blocks,)](chosen, counts, n, blocks, PADDED=padded, BLOCK=PAIRS_PER_BLOCK)
    # Expert after expert, and block after block within one: the running total is where the next one begins.
    ends = counts.view(-1).cumsum(0, dtype=torch.int32)
    pairs = torch.empty(n, dtype=torch.int32, device=chosen.device)
    _place[(blocks,)](chosen, counts, ends, pairs, n, blocks, PADDED=padded, BLOCK=PAIRS_PER_BLOCK)
    bounds = torch.empty(n_experts + 1, dtype=torch.int32, device=chosen.device)
    tiles = torch.empty(most_tiles(n, n_experts, tile_rows) + 1, 3, dtype=torch.int32, device=chosen.device)
    _cut[(n_experts,)](
        ends, bounds, tiles, blocks, len(tiles) - 1, n_experts, window,
        PADDED=padded, ROWS=tile_rows, BLOCK=64,
    )  # fmt: skip
    return Groups(pairs, bounds, tiles)


def most_tiles(n_pairs: int, n_experts: int, tile_rows: int) -> int:
    """The largest possible number of tiles, for any load of the experts."""
    return n_pairs // tile_rows + n_experts


@triton.jit
def _count(chosen, counts, n, blocks, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    place = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + place, mask=place < n, other=PADDED).to(tl.int32)
    experts = tl.arange(0, PADDED)
    count = tl.sum((expert[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts + experts * blocks + block, count)


@triton.jit
def _place(chosen, counts, ends, pairs, n, blocks, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    pair = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(chosen + pair, mask=pair < n, other=PADDED).to(tl.int32)
    experts = tl.arange(0, PADDED)
    mine = (expert[:, None] == experts[None, :]).to(tl.int32)
    begin = tl.load(ends + experts * blocks + block) - tl.load(counts + experts * blocks + block)
    # Its row: where its expert's pairs of this block begin, and how many of them stand before it.
    row = tl.sum(mine * (begin[None, :] + tl.cumsum(mine, axis=0) - 1), axis=1)
    tl.store(pairs + row, pair, mask=pair < n)


@triton.jit
def _cut(
    ends, bounds, tiles, blocks, most, n_experts, window,
    PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    me = tl.program_id(0)
    experts = tl.arange(0, PADDED)
    end = tl.load(ends + experts * blocks + blocks - 1)
    begin = tl.load(ends + experts * blocks - 1, mask=experts > 0, other=0)
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
