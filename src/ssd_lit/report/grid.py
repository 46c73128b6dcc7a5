"""A grid of settings as one page: what every combination costs and gives, beside the dense arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from ssd_lit.config import Experiment, cells
from ssd_lit.report.arms import Arm, Measure, arms_of, cell, measure_of
from ssd_lit.report.formatting import digits, number, percent
from ssd_lit.report.results import RunResult
from ssd_lit.report.settings import shown


@dataclass(frozen=True)
class Cell:
    """One combination of a grid's values, told in the order of its keys, and the arm that has them."""

    values: tuple[str, ...]
    arm: Arm


@dataclass(frozen=True)
class Grid:
    """The cells of one arm's grid, in the order of the YAML."""

    name: str
    label: str
    keys: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    """The values of each key."""
    ordered: tuple[bool, ...]
    """Whether the values of a key are numbers, which a line may join."""
    cells: tuple[Cell, ...]
    reference: Arm | None
    """The experiment's dense arm."""


class Quantity(NamedTuple):
    """A number that the page shows: its heading, its column in the CSV, its column of `_rows`, how it is written."""

    title: str
    column: str
    source: str
    write: Callable[[float], str]


QUANTITIES = (
    Quantity("perplexity, dense mode", "perplexity_dense", "val_ppl_dense", number),
    Quantity("perplexity, sparse mode", "perplexity_sparse", "val_ppl_sparse", number),
    Quantity("sparse steps", "sparse_fraction", "sparse_fraction", percent),
    Quantity("FLOPs, relative to dense", "relative_flops", "relative_flops", percent),
    Quantity("active neurons", "active_neurons", "active_neurons", digits),
    Quantity("routing recall", "routing_recall", "routing_recall", percent),
)


def grids(experiment: Experiment, results: Sequence[RunResult]) -> list[Grid]:
    """Every grid of the experiment, arm by arm."""
    arms = {arm.name: arm for arm in arms_of(results)}
    return [
        _grid(name, settings.label or name, cells(name, settings), arms)
        for name, settings in experiment.arms.items()
        if settings.grid
    ]


def _grid(name: str, label: str, settings: Mapping[str, tuple[Any, dict[str, Any]]], arms: Mapping[str, Arm]) -> Grid:
    """The grid of an arm, from the settings that tell each of its cells apart."""
    keys = tuple(next(iter(settings.values()))[1])
    values = [_distinct([values[key] for _, values in settings.values()]) for key in keys]
    members = tuple(Cell(tuple(shown(own[key]) for key in keys), arms[name]) for name, (_, own) in settings.items())
    return Grid(
        name,
        label,
        keys,
        tuple(tuple(shown(value) for value in of_key) for of_key in values),
        tuple(all(_is_number(value) for value in of_key) for of_key in values),
        members,
        _reference(members[0].arm, list(arms.values())),
    )


def _distinct(values: Sequence[Any]) -> list[Any]:
    """The values in their order, each once; a list or a mapping may be among them."""
    return [value for place, value in enumerate(values) if value not in values[:place]]


def measured(grid: Grid, arm: Arm, quantity: Quantity) -> Measure | None:
    """A number of the page over the seeds of an arm; None where it does not apply."""
    return measure_of(_rows(grid, arm)[quantity.source])


def page(grid: Grid) -> list[tuple[Arm, tuple[str, ...], list[str]]]:
    """The rows of the page's table, the dense arm first: arm, its values, and every quantity as it is written."""
    rows = [(member.arm, member.values) for member in grid.cells]
    if grid.reference is not None:
        rows.insert(0, (grid.reference, ("",) * len(grid.keys)))
    return [
        (arm, values, [cell(measured(grid, arm, quantity), quantity.write) for quantity in QUANTITIES])
        for arm, values in rows
    ]


def table(grid: Grid) -> pd.DataFrame:
    """One row a run, those of the dense arm last; a cell that does not apply stays empty."""
    rows = [(member.values, member.arm) for member in grid.cells]
    if grid.reference is not None:
        rows.append((("",) * len(grid.keys), grid.reference))
    parts = [_rows(grid, arm).assign(**dict(zip(grid.keys, values, strict=True))) for values, arm in rows]
    columns = ["run", "arm", "seed", *grid.keys, "experts", "top_k", "train_flops"]
    whole = pd.concat(parts)[[*columns, *(quantity.source for quantity in QUANTITIES)]]
    whole.columns = pd.Index([*columns, *(quantity.column for quantity in QUANTITIES)])
    numbers = {quantity.column: float for quantity in QUANTITIES}
    return whole.astype({**numbers, "seed": int, "experts": "Int64", "top_k": "Int64"})


def _rows(grid: Grid, arm: Arm) -> pd.DataFrame:
    """The arm's rows of `run_frame`, with training FLOPs as a fraction of the dense arm's mean."""
    dense = None if grid.reference is None else grid.reference.measure("train_flops")
    flops = None if dense is None else arm.rows["train_flops"] / dense.mean
    return arm.rows.assign(relative_flops=flops)


def _reference(cell: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm that a grid is compared with: trained for all its steps, of the same model if there is one."""
    dense = [arm for arm in arms if arm.method == "dense" and arm.config.match_flops_of_arm is None]
    dense = [arm for arm in dense if not arm.runs[0].is_cell and arm.config.model.family == cell.config.model.family]
    dense.sort(key=lambda arm: arm.config.model != cell.config.model)
    return dense[0] if dense else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
