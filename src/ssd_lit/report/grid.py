"""A grid of settings as one page: what every combination costs and gives, beside the dense arm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ssd_lit.config import Experiment, cells
from ssd_lit.report.arms import Arm, Measure, arms_of
from ssd_lit.report.formatting import digits, number, percent
from ssd_lit.report.runs import RunResult
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


@dataclass(frozen=True)
class Quantity:
    """A number of a run that the page shows: its heading, its column in the CSV, and how it is written."""

    title: str
    column: str
    get: Callable[[RunResult, Arm | None], float | None]
    write: Callable[[float], str]


def _relative_flops(run: RunResult, reference: Arm | None) -> float | None:
    """Training FLOPs as a share of the dense arm's mean."""
    if reference is None:
        return None
    return run.total.flops / reference.measured(lambda other: other.total.flops).mean


QUANTITIES = (
    Quantity("perplexity, dense mode", "perplexity_dense", lambda run, _: run.ppl_dense, number),
    Quantity("perplexity, sparse mode", "perplexity_sparse", lambda run, _: run.ppl_sparse, number),
    Quantity("sparse steps", "sparse_fraction", lambda run, _: run.sparse_fraction, percent),
    Quantity("FLOPs, relative to dense", "relative_flops", _relative_flops, percent),
    Quantity("active neurons", "active_neurons", lambda run, _: run.evaluation.active_neurons, digits),
    Quantity("routing recall", "routing_recall", lambda run, _: run.recall, percent),
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
    values = [_distinct([told[key] for _, told in settings.values()]) for key in keys]
    members = tuple(Cell(tuple(shown(told[key]) for key in keys), arms[cell]) for cell, (_, told) in settings.items())
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
    return arm.measure(lambda run: quantity.get(run, grid.reference))


def page(grid: Grid) -> list[tuple[Arm, tuple[str, ...], list[str]]]:
    """The rows of the page's table, the dense arm first: arm, its values, and every quantity in words."""
    rows = [(cell.arm, cell.values) for cell in grid.cells]
    if grid.reference is not None:
        rows.insert(0, (grid.reference, ("",) * len(grid.keys)))
    return [(arm, values, [_told(measured(grid, arm, one), one) for one in QUANTITIES]) for arm, values in rows]


def table(grid: Grid) -> pd.DataFrame:
    """One row a run, those of the dense arm last; a cell that does not apply stays empty."""
    rows = [(cell.values, run) for cell in grid.cells for run in cell.arm.runs]
    if grid.reference is not None:
        rows += [(("",) * len(grid.keys), run) for run in grid.reference.runs]
    return pd.DataFrame(
        [
            {
                "run": run.name,
                "arm": run.arm,
                "seed": run.config.seed,
                **dict(zip(grid.keys, values, strict=True)),
                "experts": run.evaluation.experts,
                "top_k": run.evaluation.top_k,
                "train_flops": run.total.flops,
                **{one.column: one.get(run, grid.reference) for one in QUANTITIES},
            }
            for values, run in rows
        ]
    ).astype({"experts": "Int64", "top_k": "Int64"})


def _reference(cell: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm that a grid is compared with: trained for all its steps, of the same model if there is one."""
    dense = [arm for arm in arms if arm.method == "dense" and arm.config.match_flops_of_arm is None]
    dense = [arm for arm in dense if not arm.runs[0].is_cell and arm.config.model.family == cell.config.model.family]
    dense.sort(key=lambda arm: arm.config.model != cell.config.model)
    return dense[0] if dense else None


def _told(measure: Measure | None, quantity: Quantity) -> str:
    return "-" if measure is None else measure.text(quantity.write)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
