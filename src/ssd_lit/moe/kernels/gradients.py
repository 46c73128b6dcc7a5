"""Gradients of the experts' weights and biases, over grouped pairs (`kernels.grouping`).

An expert with many rows is computed in parts by different programs, so that the busiest expert does not hold up the
device; the parts are then added up in a fixed order. Shape letters: T tokens, D model width, E experts,
H neurons of one expert, K experts a token, N = T * K pairs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_lit.moe.kernels import precision
from ssd_lit.moe.kernels.descriptors import can_describe, describe
from ssd_lit.moe.kernels.grouping import Groups

ADDED = 2048
"""Weights that one program adds up over the parts of an expert."""


class Plan(NamedTuple):
    """How gradients of weights are computed."""

    sizes: dict[str, int]
    """Of a tile, with its warps and pipeline stages."""
    part_rows: int
    """An expert of more rows is computed in parts."""


def plan(d_model: int, neurons: int, rows: int, dtype: torch.dtype) -> Plan:
    """What was fastest on an H200 in bfloat16, for a model width, neurons an expert and the rows of an even load."""
    h, d = (max(16, triton.next_power_of_2(size)) for size in (neurons, d_model))
    even_parts = 1
    if dtype.itemsize > 2:
        sizes = {"ROWS": 32, "NEURONS": min(64, h), "COLUMNS": min(64, d), "num_warps": 4, "num_stages": 3}
    elif rows < 512:
        sizes = {"ROWS": 32, "NEURONS": min(128, h), "COLUMNS": min(128, d), "num_warps": 4, "num_stages": 5}
    elif d_model <= 1024:
        # Reading a row's token before the row itself takes half of the stages.
        sizes = {"ROWS": 64, "NEURONS": min(128, h), "COLUMNS": min(128, d), "num_warps": 4, "num_stages": 5}
    else:
        # A wide model has enough tiles for all multiprocessors, and adding up parts of them costs more.
        even_parts = 2
        if h >= 256:
            sizes = {"ROWS": 32, "NEURONS": 256, "COLUMNS": 128, "num_warps": 8, "num_stages": 9}
        else:
            sizes = {"ROWS": 64, "NEURONS": h, "COLUMNS": 256, "num_warps": 8, "num_stages": 5}
    step = sizes["ROWS"]
    return Plan(sizes, max(step, even_parts * rows // step * step))


def weight_gradient(a: Tensor, b: Tensor, groups: Groups, k: int, dtype: torch.dtype) -> Tensor:
    """dw [E, H, D]: a[rows of e].T @ b[their tokens] for every expert e, of a [N, H] and b [T, D]."""
    (n, h), d, experts = a.shape, b.shape[1], len(groups.bounds) - 1
    sizes, part_rows = plan(d, h, n // experts, a.dtype)
    dw = a.new_empty(experts, h, d, dtype=dtype)
    # What there can be at most, whatever the load: parts at all, and parts of experts that have several.
    parts, shared = n // part_rows + experts, 2 * (n // part_rows)
    kept = a.new_empty(shared, h, d, dtype=torch.float32)
    pieces = triton.cdiv(h, sizes["NEURONS"]) * triton.cdiv(d, sizes["COLUMNS"])
    padded = triton.next_power_of_2(experts)
    described = can_describe(a)
    _parts_of_gradient[(parts * pieces,)](
        a, describe(a, [sizes["ROWS"], sizes["NEURONS"]]) if described else None, b, dw, kept,
        groups.pairs, groups.bounds,
        D=d, H=h, K=k, E=experts, PADDED=padded, PART=part_rows, PRECISION=precision(), DESCRIBED=described, **sizes,
    )  # fmt: skip
    _add_parts[(experts, triton.cdiv(h * d, ADDED))](
        dw, kept, groups.bounds, SIZE=h * d, E=experts, PADDED=padded, PART=part_rows, BLOCK=ADDED
    )
    return dw


def bias_gradient(dpre: Tensor, groups: Groups, like: Tensor, tile_rows: int) -> Tensor:
    """The sums of dpre [N, H] over each expert's rows, [E, H], of the dtype of `like`."""
    most, h = len(groups.tiles) - 1, dpre.shape[1]
    db_tiles = dpre.new_empty(most, h, dtype=torch.float32)
    _sum_tiles[(most, triton.cdiv(h, 64))](
        dpre, groups.tiles, db_tiles, most, H=h, ROWS=tile_rows, NEURONS=64
    )  # fmt: skip
    return add_tiles(db_tiles, groups.bounds, like, tile_rows)


def add_tiles(db_tiles: Tensor, bounds: Tensor, like: Tensor, tile_rows: int) -> Tensor:
    """The sums of each expert's tiles, as `up_backward` wrote them, [E, H], of the dtype of `like`."""
    db, (experts, h) = torch.empty_like(like), like.shape
    _add_tiles[(experts, triton.cdiv(h, 32))](db_tiles, bounds, db, H=h, ROWS=tile_rows, TILES=32, NEURONS=32)
    return db


@triton.jit
def _parts(bounds, E: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr):
    """Of every expert: its first row, the row after its last, and its number of parts, at least one."""
    experts = tl.arange(0, PADDED)
    begin = tl.load(bounds + experts, mask=experts < E, other=0)
    end = tl.load(bounds + experts + 1, mask=experts < E, other=0)
    parts = tl.where(experts < E, tl.maximum((end - begin + PART - 1) // PART, 1), 0)
    return experts, begin, end, parts


@triton.jit
def _of(expert, experts, values):
    return tl.sum(tl.where(experts == expert, values, 0), axis=0)


@triton.jit
def _first_shared(expert, experts, parts):
    """Index of the first part of an expert among the parts of all experts with several."""
    return tl.sum(tl.where((experts < expert) & (parts > 1), parts, 0), axis=0)


@triton.jit
def _add_rows(
    product, first, end, neuron, column, a, described, b, pairs,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """product + a[rows, neurons].T @ b[tokens of rows, columns], for ROWS rows from `first`.

    DESCRIBED: all of the rows stand before the end.
    """
    row = first + tl.arange(0, ROWS)
    there = row < end
    columns = column + tl.arange(0, COLUMNS)
    if DESCRIBED:
        left = described.load([first, neuron]).T
        token = tl.load(pairs + row) // K
    else:
        neurons = neuron + tl.arange(0, NEURONS)
        token = tl.load(pairs + row, mask=there, other=0) // K
        left_at = a + row.to(tl.int64)[None, :] * H + neurons[:, None]
        left = tl.load(left_at, mask=there[None, :] & (neurons < H)[:, None], other=0.0)
    # Rows behind the last meet zeros of `left`; masking only what the tile's shape asks for keeps loads wide.
    right_at = b + token.to(tl.int64)[:, None] * D + columns[None, :]
    if D % COLUMNS == 0:
        right = tl.load(right_at)
    else:
        right = tl.load(right_at, mask=(columns < D)[None, :], other=0.0)
    return tl.dot(left, right, product, input_precision=PRECISION)


@triton.jit
def _parts_of_gradient(
    a, described, b, dw, kept, pairs, bounds,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """An expert's gradient goes to dw if it has one part; of several, each goes to kept [shared, H, D]."""
    down_pieces: tl.constexpr = (H + NEURONS - 1) // NEURONS
    across: tl.constexpr = (D + COLUMNS - 1) // COLUMNS
    piece = tl.program_id(0) % (down_pieces * across)
    number = tl.program_id(0) // (down_pieces * across)
    experts, begins, ends, parts = _parts(bounds, E, PADDED, PART)
    behind = tl.cumsum(parts, axis=0)
    expert = tl.sum((behind <= number).to(tl.int32), axis=0)
    if expert >= E:
        return
    mine = _of(expert, experts, parts)
    part = number - _of(expert, experts, behind) + mine
    begin = _of(expert, experts, begins) + part * PART
    end = tl.minimum(begin + PART, _of(expert, experts, ends))
    neuron = piece // across * NEURONS
    column = piece % across * COLUMNS
    product = tl.zeros([NEURONS, COLUMNS], tl.float32)
    # A descriptor knows no end of an expert's rows: the last few are loaded otherwise.
    last = begin
    if DESCRIBED:
        last = begin + (end - begin) // ROWS * ROWS
        for first in range(begin, last, ROWS):
            product = _add_rows(
                product, first, end, neuron, column, a, described, b, pairs,
                D, H, K, ROWS, NEURONS, COLUMNS, PRECISION, True,
            )  # fmt: skip
    for first in range(last, end, ROWS):
        product = _add_rows(
            product, first, end, neuron, column, a, described, b, pairs,
            D, H, K, ROWS, NEURONS, COLUMNS, PRECISION, False,
        )  # fmt: skip
    neurons = neuron + tl.arange(0, NEURONS)
    columns = column + tl.arange(0, COLUMNS)
    mask = (neurons < H)[:, None] & (columns < D)[None, :]
    at = neurons[:, None] * D + columns[None, :]
    if mine == 1:
        tl.store(dw + expert.to(tl.int64) * (H * D) + at, product.to(dw.dtype.element_ty), mask=mask)
    else:
        slot = _first_shared(expert, experts, parts) + part
        tl.store(kept + slot.to(tl.int64) * (H * D) + at, product, mask=mask)


@triton.jit
def _add_parts(
    dw, kept, bounds,
    SIZE: tl.constexpr, E: tl.constexpr, PADDED: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of experts with several parts, SIZE = H * D weights each."""
    expert = tl.program_id(0)
    experts, _, _, parts = _parts(bounds, E, PADDED, PART)
    mine = _of(expert, experts, parts)
    if mine > 1:
        place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        first = _first_shared(expert, experts, parts)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(mine):
            total += tl.load(kept + (first + part).to(tl.int64) * SIZE + place, mask=place < SIZE, other=0.0)
        tl.store(dw + expert.to(tl.int64) * SIZE + place, total.to(dw.dtype.element_ty), mask=place < SIZE)


@triton.jit
def bias_slot(expert, first, ROWS: tl.constexpr):
    """A unique number of an expert's tile that begins at a row; tiles of one expert have consecutive numbers."""
    return first // ROWS + expert


@triton.jit
def _sum_tiles(
    dpre, tiles, db_tiles, most_tiles, H: tl.constexpr, ROWS: tl.constexpr, NEURONS: tl.constexpr
):  # fmt: skip
    """db_tiles: the sums of dpre [N, H] over each tile's rows, at the tile's slot."""
    number = tl.program_id(0)
    if number >= tl.load(tiles + most_tiles * 3):
        return
    expert = tl.load(tiles + number * 3)
    first = tl.load(tiles + number * 3 + 1)
    row = first + tl.arange(0, ROWS)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    mask = (row < tl.load(tiles + number * 3 + 2))[:, None] & (neuron < H)[None, :]
    rows = tl.load(dpre + row.to(tl.int64)[:, None] * H + neuron[None, :], mask=mask, other=0.0)
    tl.store(db_tiles + bias_slot(expert, first, ROWS) * H + neuron, tl.sum(rows.to(tl.float32), axis=0), neuron < H)


@triton.jit
def _add_tiles(db_tiles, bounds, db, H: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, NEURONS: tl.constexpr):
    """db [E, H]: each expert's sum over its tiles of ROWS rows."""
    expert = tl.program_id(0)
    neuron = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    tile = tl.arange(0, TILES)
    begin = tl.load(bounds + expert)
    count = (tl.load(bounds + expert + 1) - begin + ROWS - 1) // ROWS
    total = tl.zeros([TILES, NEURONS], tl.float32)
    for number in range(0, count, TILES):
        slot = bias_slot(expert, begin, ROWS) + number + tile
        mask = (number + tile < count)[:, None] & (neuron < H)[None, :]
        total += tl.load(db_tiles + slot[:, None] * H + neuron[None, :], mask=mask, other=0.0)
    tl.store(db + expert * H + neuron, tl.sum(total, axis=0).to(db.dtype.element_ty), mask=neuron < H)
