"""Newton's steps of a balanced assignment, all of them in one launch; `moe.assignment` says what they are for.

One program takes one problem through all steps: a step reads the costs once, and a launch of every operation of a step
would take longer. Costs are float32, which is a hundredth of the lowest temperature; prices are added up in float64.
The Hessian is a sum of TF32 products: it stays a matrix whose rows add up to zero, with entries right to a thousandth,
and so are the steps. Shape letters: P problems, n rows, E columns.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128
WARPS = 8


def newton_steps(cost: Tensor, prices: Tensor, spread: Tensor, temperatures: Sequence[float], first: int = 0) -> Tensor:
    """Prices [P, E] after a step at each of the temperatures, in units of the spread [P], for cost [P, n, E].

    With `first`, steps begin at that temperature; where the prices leave a column far from balance there, they begin
    from no prices at the first temperature of all.
    """
    n_problems, n, n_columns = cost.shape
    result = prices.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
    levels = _on_device(tuple(temperatures), cost.device)
    _newton_steps[(n_problems,)](
        cost.float().contiguous(), result, spread.double(), levels, n, n_columns, first, len(levels),
        ROWS=ROWS, COLUMNS=max(16, triton.next_power_of_2(n_columns)), num_warps=WARPS,
    )  # fmt: skip
    return result.to(prices.dtype)


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A copy to the GPU makes the CPU wait, so there is one a process."""
    return torch.tensor(values, dtype=torch.float64, device=device)


@triton.jit
def _newton_steps(cost, prices, spread, levels, n, E, first, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    problem = tl.program_id(0)
    unit = tl.load(spread + problem)
    column = tl.arange(0, COLUMNS)
    inside = column < E
    eye = column[:, None] == column[None, :]
    both = inside[:, None] & inside[None, :]
    size = (n // E).to(tl.float32)
    # The Hessian is singular along equal prices; columns that are only padding stay by themselves.
    fix = tl.where(both, 1.0 / E, 0.0) + tl.where(eye, tl.where(inside[:, None], 1e-3, 1.0), 0.0)
    cost += problem.to(tl.int64) * n * E
    price = tl.load(prices + problem * E + column, mask=inside, other=0.0)
    step = first
    tries = tl.where(first > 0, 1, 0)
    while step < steps:
        temperature = unit * tl.load(levels + step)
        scale = (1.0 / temperature).to(tl.float32)
        now = price.to(tl.float32)
        gram = tl.zeros([COLUMNS, COLUMNS], tl.float32)
        count = tl.zeros([COLUMNS], tl.float32)
        for start in range(0, n, ROWS):
            row = start + tl.arange(0, ROWS)
            there = (row < n)[:, None] & inside[None, :]
            value = tl.load(cost + row[:, None] * E + column[None, :], mask=there, other=0.0)
            reduced = tl.where(inside[None, :], now[None, :] - value, float("-inf"))
            power = tl.exp((reduced - tl.max(reduced, axis=1)[:, None]) * scale)
            share = tl.where(there, power / tl.sum(power, axis=1)[:, None], 0.0)
            gram += tl.dot(tl.trans(share), share, input_precision="tf32")
            count += tl.sum(share, axis=0)
        # The rows of the Hessian add up to zero, and sums do not cancel as count - gram does.
        others = tl.where(eye, 0.0, gram)
        hessian = fix - others + tl.where(eye, tl.sum(others, axis=1)[:, None], 0.0)
        newton = _solve(hessian, tl.where(inside, size - count, 0.0), E, column)
        sinkhorn = tl.where(inside, -tl.log(tl.maximum(count / size, 1e-30)), 0.0)
        worst = tl.max(tl.abs(sinkhorn), axis=0)
        change = tl.where(worst < 1.0, tl.minimum(tl.maximum(newton, -4.0), 4.0), sinkhorn)
        lost = (tries > 0) & (worst >= 1.0)
        price = tl.where(lost, 0.0, price + change.to(tl.float64) * temperature)
        step = tl.where(lost, 0, step + 1)
        tries *= 0
    tl.store(prices + problem * E + column, price, mask=inside)


@triton.jit
def _solve(matrix, right, E, column):
    """The solution of matrix x = right by Gauss and Jordan's elimination, without pivots: the matrix is definite."""
    for k in range(E):
        own = column == k
        line = tl.sum(tl.where(own[:, None], matrix, 0.0), axis=0)
        pivot = tl.sum(tl.where(own, line, 0.0), axis=0)
        factor = tl.where(own, 0.0, tl.sum(tl.where(own[None, :], matrix, 0.0), axis=1) / pivot)
        matrix -= factor[:, None] * line[None, :]
        right -= factor * tl.sum(tl.where(own, right, 0.0), axis=0)
    return right / tl.sum(tl.where(column[:, None] == column[None, :], matrix, 0.0), axis=1)
