"""What a grid of settings says, in one finding."""

from ssd_lit.report.arms import Finding, in_dense_mode, run_names
from ssd_lit.report.formatting import PERPLEXITY, compare
from ssd_lit.report.grid import QUANTITIES, Cell, Grid, Quantity, measured


def over_grid(grid: Grid) -> Finding:
    """The best and the worst cell in each mode, and the best against the dense arm."""
    text = f"{grid.label} was run with {len(grid.cells)} settings of {', '.join(grid.keys)}."
    mentioned = []
    for quantity, mode in zip(QUANTITIES[:2], ("dense mode", "sparse mode"), strict=True):
        scored = [(found.mean, cell) for cell in grid.cells if (found := measured(grid, cell.arm, quantity))]
        if not scored:
            continue
        (low, best), (high, worst) = min(scored, key=lambda one: one[0]), max(scored, key=lambda one: one[0])
        if low == high:
            # As with routers trained behind one model.
            text += f" In {mode} the perplexity is {_told(grid, best, quantity)} with all of them."
            continue
        text += (
            f" In {mode} the lowest perplexity is {_told(grid, best, quantity)} ({_settings(grid, best)}), the highest "
            f"{_told(grid, worst, quantity)} ({_settings(grid, worst)}), {compare(high, low, PERPLEXITY)} the lowest."
        )
        mentioned += [best.arm, worst.arm]
        dense = None if grid.reference is None else in_dense_mode(grid.reference)
        if grid.reference is not None and dense is not None:
            text += f" The lowest is {compare(low, dense.mean, PERPLEXITY)} {grid.reference.label}'s {dense.text()}."
            mentioned.append(grid.reference)
    runs = run_names(*mentioned)
    return Finding(f"Grid: {grid.label}", text, tuple(dict.fromkeys(runs)))


def _told(grid: Grid, cell: Cell, quantity: Quantity) -> str:
    measure = measured(grid, cell.arm, quantity)
    assert measure is not None
    return measure.text(quantity.write)


def _settings(grid: Grid, cell: Cell) -> str:
    names = [key.rpartition(".")[2] for key in grid.keys]
    return ", ".join(f"{name} {value}" for name, value in zip(names, cell.values, strict=True))
