"""Balanced assignment: the cheapest way to give every row a column, all columns equally often.

A balanced assignment is a transport problem. Its dual has one price for each column: every row takes the column
with the smallest cost - price, and any such assignment is the cheapest one for its own column counts. So the task is
to find prices that make the counts equal (Bertsekas' auction, 1988, raises them bid by bid). Here they come from
Newton's method on the dual, smoothed by an entropy term that is lowered step by step (Cuturi, 2013,
arXiv 1306.0895): some twenty passes over [n, E], which run for all layers at once and on a GPU. The prices need not be
exact: rows that they leave in the wrong column are moved by an exact method afterwards. Shape letters: P problems, n
rows, E columns.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ssd_lit.moe.kernels import runs_on

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

TEMPERATURES = [2.0**-level for level in range(-2, 17)]
"""Entropy of the smoothed dual, from high to low, in units of the spread of the costs; one of Newton's steps at each.

Half as many temperatures and more steps at each, or a lower first one, sometimes leave a column hundreds of rows off.
"""

FOLLOWING = 7
"""The first of the temperatures that do from the prices of nearly the same costs, such as those of the round before.

A column that these prices leave far from balance would stay there: at low temperatures steps are small.
"""

FREE_ROWS = 8
"""Rows for each column that may move in the first exact attempt, if prices leave some in the wrong column."""

MOST_COLUMNS = 64
KERNEL_ROWS = 256
"""More columns, or more rows that may move, do not fit into the registers of a kernel's program."""

SETTLED = 1 - 1e-6
"""A row with this share in one column keeps that column at lower temperatures."""


def nearest(cost: Tensor) -> Tensor:
    """The column [...] in which each row of cost [..., n, E] is least; the first of equals."""
    return cost.min(-1).indices  # twice as fast as argmin on a CPU


def centred_costs(cost: Tensor) -> Tensor:
    """Cost [P, n, E] less the means of its columns and rows: only differences within a row or column matter."""
    cost = cost - cost.mean(1, keepdim=True)
    return cost.sub_(cost.mean(2, keepdim=True))


def assign(cost: Tensor, prices: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The cheapest way to give each row one column, every column n/E rows: labels [P, n], and the prices [P, E].

    Exact, for any cost [P, n, E] that is finite. With the `prices` of nearly the same costs it is found sooner.
    """
    n, n_columns = cost.shape[1:]
    cost = centred_costs(cost.double())
    if prices is None:
        prices = find_prices(cost, cost.new_zeros(len(cost), n_columns), TEMPERATURES)
    else:
        prices = find_prices(cost, prices.double(), TEMPERATURES, first=FOLLOWING)
    reduced = cost - prices[:, None]
    labels = nearest(reduced)
    size = n // n_columns
    surplus = (labels[..., None] == torch.arange(n_columns, device=cost.device)).sum(1) - size
    unbalanced = (surplus != 0).any(-1)
    if in_kernels(cost, n_columns):
        unbalanced = _settle_together(reduced, labels, surplus)
    for problem, to_settle in enumerate(unbalanced.tolist()):
        if to_settle:
            _settle(reduced[problem], labels[problem], size)
    return labels, prices


def in_kernels(x: Tensor, n_columns: int) -> bool:
    """Whether problems of so many columns on the device of x are solved by Triton kernels."""
    return x.is_cuda and runs_on(x) and 1 < n_columns <= MOST_COLUMNS


def find_prices(cost: Tensor, prices: Tensor, temperatures: Sequence[float], first: int = 0) -> Tensor:
    """Prices [P, E] under which the columns of cost [P, n, E] are taken about equally often.

    Starts from `prices` and takes a step at each of the temperatures, which are in units of the costs' spread. Centred
    costs are expected. With `first`, steps begin at that temperature; where the prices leave a column far from balance,
    they begin from no prices at the first temperature of all.
    """
    n, n_columns = cost.shape[1:]
    size = n // n_columns
    spread = cost.std((1, 2), correction=0).clamp(min=1e-30)
    if in_kernels(cost, n_columns):
        from ssd_lit.moe.kernels.prices import newton_steps

        return newton_steps(cost, prices, spread, temperatures, first)
    if first:
        counts = torch.stack([own.bincount(minlength=n_columns) for own in nearest(cost - prices[:, None])])
        if (counts / size).log().abs().amax() >= 1:
            prices, first = torch.zeros_like(prices), 0
    capacity = torch.full_like(prices, size)
    for level, following in pairwise([*temperatures[first:], 0.0]):
        prices, share = newton_step(cost, size, capacity, prices, level * spread[:, None])
        if 0 < following < level and not cost.is_cuda:  # on a GPU the test takes longer than a pass
            cost, capacity = _unsettled(cost, capacity, share)
    return prices


def newton_step(
    cost: Tensor, size: int, capacity: Tensor, prices: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """Prices [P, E] after a step at a temperature [P, 1], and the share [P, n, E] of each row in each column before it.

    The columns take `capacity` [P, E] of the rows of cost [P, n, E], and `size` of all rows.
    """
    n_columns = cost.shape[-1]
    # Prices are defined up to a constant, so the Hessian is singular along it.
    fix = 1e-3 * torch.eye(n_columns, dtype=cost.dtype, device=cost.device) + 1 / n_columns
    share = torch.softmax((prices[:, None] - cost) / temperature[:, None], -1)
    gram = share.mT @ share
    count = gram.sum(-1)  # a row's shares add up to 1
    missing = capacity - count
    hessian = fix - gram
    hessian.diagonal(dim1=1, dim2=2).add_(count)
    newton = torch.cholesky_solve(missing[..., None], torch.linalg.cholesky_ex(hessian).L)[..., 0]
    # Far from balance the quadratic model is wrong; Sinkhorn's step is safe there, and slow elsewhere.
    sinkhorn = -(1 - missing / size).clamp(min=1e-30).log()
    near = (sinkhorn.abs() < 1).all(-1, keepdim=True)
    return prices + torch.where(near, newton.clamp(-4, 4), sinkhorn) * temperature, share


def _unsettled(cost: Tensor, capacity: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of cost [P, n, E] that may still change columns, and the capacity [P, E] left for them.

    share [P, n, E]: the share of each row in each column at the present temperature.
    """
    settled = share.amax(-1) > SETTLED
    most = cost.shape[1] - int(settled.sum(-1).min())
    if most > cost.shape[1] // 2:
        return cost, capacity
    rows = settled.byte().argsort(dim=-1, stable=True)[:, :most, None].expand(-1, -1, cost.shape[-1])
    taken = share.sum(1) - share.gather(1, rows).sum(1)
    return cost.gather(1, rows), capacity - taken.round()


def _settle_together(reduced: Tensor, labels: Tensor, surplus: Tensor) -> Tensor:
    """`_settle` of all problems, with the same number of free rows; the problems [P] that need more are left alone.

    reduced [P, n, E], labels [P, n], surplus [P, E]: how many rows more than wanted are in each column.
    """
    from ssd_lit.moe.kernels.settling import move_rows

    n, n_columns = reduced.shape[1:]
    count = min(n, KERNEL_ROWS)
    least, second = reduced.topk(2, largest=False).values.unbind(-1)
    margins, narrowest = (second - least).sort(stable=True)
    free = narrowest[:, :count]
    costs = reduced.gather(1, free[..., None].expand(-1, -1, n_columns))
    choices = labels.gather(1, free)
    moved, left = move_rows(costs, choices, surplus)
    added = (costs.gather(2, moved[..., None]) - costs.gather(2, choices[..., None])).sum((1, 2))
    needs_more = (left != 0).any(-1)
    if count < n:
        needs_more |= margins[:, count] < added
    labels.scatter_(1, free, torch.where(needs_more[:, None], choices, moved))
    return needs_more


def _settle(reduced: Tensor, labels: Tensor, size: int) -> None:
    """Make the assignment of one problem balanced, at the least cost, in place.

    reduced [n, E] is cost - price, labels [n] the columns where it is least. Only rows with a small margin between
    their first and second choice move. The sum of all rows' least reduced costs is a lower bound for any balanced
    assignment. A row whose margin exceeds a solution's distance to that bound keeps its first choice in every optimum.
    So a solution is optimal once all rows with smaller margins were free to move in it.
    """
    n, columns = reduced.shape
    if columns == 1:
        return
    least, second = reduced.topk(2, largest=False).values.unbind(-1)
    margin, narrowest = (second - least).sort(stable=True)
    margins, choices = margin.cpu().numpy(), labels[narrowest].cpu().numpy()
    surplus = np.bincount(choices, minlength=columns) - size
    # A column that too many rows prefer must be able to lose as many.
    must = max(int(np.flatnonzero(choices == a)[surplus[a] - 1]) + 1 for a in np.flatnonzero(surplus > 0))
    count = min(n, max(FREE_ROWS * columns, must))
    while True:
        costs = reduced[narrowest[:count]].cpu().numpy()
        moved = _move(costs, choices[:count].copy(), surplus)
        rows = np.arange(count)
        needed = int(np.searchsorted(margins, (costs[rows, moved] - costs[rows, choices[:count]]).sum()))
        if needed <= count:
            break
        count = min(needed, 4 * count)
    labels[narrowest[:count]] = torch.from_numpy(moved).to(labels.device)


def _move(cost: Floats, labels: Labels, surplus: Labels) -> Labels:
    """Move rows from columns with a surplus to columns with too few; cost [m, E], labels [m], surplus [E] -> labels.

    One at a time along the shortest path of moves (successive shortest paths on the graph of columns): exact when
    every row starts at its cheapest column.
    """
    columns = cost.shape[1]
    surplus = surplus.copy()
    move = np.empty((columns, columns))  # move[a, b]: what it costs to move the best row of a to b
    row = np.zeros((columns, columns), dtype=np.int64)  # the index of that row
    for a in range(columns):
        _cheapest_moves(cost, labels, a, move, row)
    for _ in range(int(surplus.clip(0).sum())):
        path = _shortest_path(move, surplus > 0, surplus < 0)
        moved = [row[a, b] for a, b in pairwise(path)]
        labels[moved] = path[1:]
        for a in path:
            _cheapest_moves(cost, labels, a, move, row)
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
    return labels


def _cheapest_moves(cost: Floats, labels: Labels, a: int, move: Floats, row: Labels) -> None:
    """Fill line a of `move` and `row`."""
    members = np.flatnonzero(labels == a)
    if len(members) == 0:
        move[a] = np.inf
        return
    change = cost[members] - cost[members, a, None]
    cheapest = change.argmin(axis=0)
    move[a], row[a] = change[cheapest, np.arange(len(move))], members[cheapest]


def _shortest_path(move: Floats, sources: npt.NDArray[np.bool_], targets: npt.NDArray[np.bool_]) -> list[int]:
    """The cheapest chain of columns from a source to a target (Bellman-Ford; there are no negative cycles)."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(move), -1)
    for _ in range(len(move)):
        through = distance[:, None] + move
        nearest = through.argmin(axis=0)
        reached = through[nearest, np.arange(len(move))]
        # Rounding must not make a cycle of moves that cost nothing.
        closer = reached < distance - 1e-12
        if not closer.any():
            break
        distance[closer], before[closer] = reached[closer], nearest[closer]
    path = [int(np.where(targets, distance, np.inf).argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path
