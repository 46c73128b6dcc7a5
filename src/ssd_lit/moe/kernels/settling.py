"""The last moves of a balanced assignment, of all problems in one launch; `moe.assignment` says what they are for.

One program settles one problem: it moves one row after the other along the cheapest chain of columns. Shape letters: P
problems, m rows, E columns.
"""

import triton
import triton.language as tl
from torch import Tensor


def move_rows(cost: Tensor, labels: Tensor, surplus: Tensor) -> tuple[Tensor, Tensor]:
    """Labels [P, m] after rows moved from columns with a surplus to those with too few, and the surplus that is left.

    cost [P, m, E] in float64, labels [P, m], each row's cheapest column, surplus [P, E]. Some is left where the rows
    are too few.
    """
    problems, m, n_columns = cost.shape
    labels, surplus = labels.int(), surplus.int()
    _move_rows[(problems,)](
        cost.contiguous(), labels, surplus, m, n_columns,
        ROWS=triton.next_power_of_2(m), COLUMNS=max(16, triton.next_power_of_2(n_columns)), num_warps=8,
    )  # fmt: skip
    return labels.long(), surplus


@triton.jit
def _move_rows(cost, labels, surplus, m, E, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    problem = tl.program_id(0)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    label = tl.load(labels + problem * m + row, mask=row < m, other=-1)
    over = tl.load(surplus + problem * E + column, mask=column < E, other=0)
    cost += problem.to(tl.int64) * m * E
    # change[a, b]: what it costs to move the best row of a to b; best[a, b]: that row.
    change = tl.full([COLUMNS, COLUMNS], float("inf"), tl.float64)
    best = tl.zeros([COLUMNS, COLUMNS], tl.int32)
    going = tl.max(over, axis=0) > 0
    a = 0
    while going & (a < E):
        change, best = _cheapest_moves(cost, label, a, change, best, m, E, row, column)
        a += 1
    while going:
        # Bellman and Ford's shortest paths from the columns with a surplus; there are no negative cycles.
        distance = tl.where(over > 0, 0.0, float("inf")).to(tl.float64)
        before = tl.full([COLUMNS], -1, tl.int32)
        passes = 0
        while passes < E:
            through = distance[:, None] + change
            reached = tl.min(through, axis=0)
            nearest = tl.argmin(through, axis=0)
            # Rounding must not make a cycle of moves that cost nothing.
            closer = reached < distance - 1e-12
            distance = tl.where(closer, reached, distance)
            before = tl.where(closer, nearest, before)
            passes = tl.where(tl.max(closer.to(tl.int32), axis=0) > 0, passes + 1, E)
        ends = tl.where(over < 0, distance, float("inf"))
        going = tl.min(ends, axis=0) < float("inf")
        if going:
            end = tl.argmin(ends, axis=0)
            target = end
            source = _at(before, target, column)
            while source >= 0:
                pair = (column == source)[:, None] & (column == target)[None, :]
                moved = tl.sum(tl.sum(tl.where(pair, best, 0), axis=1), axis=0)
                label = tl.where(row == moved, target, label)
                target = source
                source = _at(before, target, column)
            over += (column == end).to(tl.int32) - (column == target).to(tl.int32)
            # The columns of the path have other rows now.
            a = end
            while a >= 0:
                change, best = _cheapest_moves(cost, label, a, change, best, m, E, row, column)
                a = _at(before, a, column)
            going = tl.max(over, axis=0) > 0
    tl.store(labels + problem * m + row, label, mask=row < m)
    tl.store(surplus + problem * E + column, over, mask=column < E)


@triton.jit
def _cheapest_moves(cost, label, a, change, best, m, E, row, column):
    """`change` and `best` with the line of column a anew."""
    there = (row < m)[:, None] & (column < E)[None, :]
    value = tl.load(cost + row[:, None] * E + column[None, :], mask=there, other=float("inf"))
    own = tl.load(cost + row * E + a, mask=row < m, other=0.0)
    moves = tl.where((label == a)[:, None], value - own[:, None], float("inf"))
    line = (column == a)[:, None]
    change = tl.where(line, tl.min(moves, axis=0)[None, :], change)
    best = tl.where(line, tl.argmin(moves, axis=0)[None, :], best)
    return change, best


@triton.jit
def _at(values, place, column):
    return tl.sum(tl.where(column == place, values, 0), axis=0)
