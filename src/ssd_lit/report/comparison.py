"""The table that leads the report: every arm in dense and in sparse mode, beside the dense arm, and what it cost."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ssd_lit.report.arms import Arm, Measure, cell, reference_arm
from ssd_lit.report.formatting import change, duration, number, percent, scaled
from ssd_lit.report.results import RunResult
from ssd_lit.report.tables import over_reference
from ssd_lit.stages import MEASUREMENTS
from ssd_lit.support.files import read_json_checked

MOST_ROWS = 24
"""With more arms the cells of grids are left to the tables of their grids."""


class Cell(NamedTuple):
    """What is written, whether it is the best of its column, and the number by which the column sorts."""

    text: str
    best: bool
    value: float | None


@dataclass(frozen=True)
class Row:
    """An arm, whether others are compared with it, and a cell for each heading."""

    arm: Arm
    is_reference: bool
    cells: Sequence[Cell]


@dataclass(frozen=True)
class Comparison:
    """The table, and what must be said about it."""

    headings: Sequence[str]
    rows: Sequence[Row]
    measured_on: str
    """The number of validation blocks."""
    has_seconds: bool
    left_out: int
    """Cells of grids that have no row."""


class Column(NamedTuple):
    """One number of an arm, given the arm it is compared with and the runs that had their devices to themselves."""

    heading: str
    get: Callable[[Arm, Arm | None, set[str]], Measure | None]
    write: Callable[[float], str]
    lowest_is_best: bool = True


def _relative_flops(arm: Arm, reference: Arm | None, alone: set[str]) -> Measure | None:
    flops, of_reference = arm.measure("train_flops"), None if reference is None else reference.measure("train_flops")
    if flops is None or of_reference is None:
        return None
    return Measure(tuple(value / of_reference.mean for value in flops.values))


def _seconds(arm: Arm, reference: Arm | None, alone: set[str]) -> Measure | None:
    return arm.measure("train_seconds") if alone.issuperset(arm.rows["run"]) else None


def _ratio(value: float) -> str:
    return f"{value:.2f}"


COLUMNS = (
    Column("perplexity, dense mode", lambda arm, *_: arm.measure("val_ppl_dense"), number),
    Column("to reference", lambda arm, reference, _: over_reference(arm, reference, "val_loss_dense"), change),
    Column("perplexity, sparse mode", lambda arm, *_: arm.measure("val_ppl_sparse"), number),
    Column("to reference", lambda arm, reference, _: over_reference(arm, reference, "val_loss_sparse"), change),
    Column("training FLOPs", lambda arm, *_: arm.measure("train_flops"), scaled),
    Column("to reference", _relative_flops, _ratio),
    Column("training time", _seconds, duration),
    Column("sparse steps", lambda arm, *_: arm.measure("sparse_fraction"), percent, lowest_is_best=False),
)
TIME = "training time"


def comparison(arms: Sequence[Arm]) -> Comparison:
    """A row an arm; the best of a column is that among arms that predict the same targets."""
    crowded = len(arms) > MOST_ROWS
    shown = [arm for arm in arms if not (crowded and arm.runs[0].is_cell)] or list(arms)
    alone = alone_on_device([run for arm in arms for run in arm.runs])
    references = {arm.name: reference_arm(arm, arms) for arm in shown}
    is_reference = {reference.name for reference in references.values() if reference is not None}
    measures = {
        place: {arm.name: column.get(arm, references[arm.name], alone) for arm in shown}
        for place, column in enumerate(COLUMNS)
    }
    places = [place for place, column in enumerate(COLUMNS) if column.heading != TIME or any(measures[place].values())]
    best = {place: _best(shown, measures[place], COLUMNS[place]) for place in places}
    rows = [
        Row(
            arm,
            arm.name in is_reference,
            [_cell(measures[place][arm.name], COLUMNS[place], arm.name in best[place]) for place in places]
            + [_experts(arm)],
        )
        for arm in shown
    ]
    headings = [*(COLUMNS[place].heading for place in places), "k/E"]
    blocks = sorted({run.evaluation.blocks for arm in arms for run in arm.runs})
    length = arms[0].config.data.sequence_length
    return Comparison(
        headings,
        rows,
        f"{' or '.join(str(count) for count in blocks)} validation blocks of {length} tokens",
        any(COLUMNS[place].heading == TIME for place in places),
        len(arms) - len(shown),
    )


def _cell(measure: Measure | None, column: Column, best: bool) -> Cell:
    return Cell(cell(measure, column.write), best, None if measure is None else measure.mean)


def _best(arms: Sequence[Arm], measures: dict[str, Measure | None], column: Column) -> set[str]:
    """The arms with the lowest mean, as written, of those that predict the same; none where nothing differs."""
    best: set[str] = set()
    if not column.lowest_is_best:
        return best
    for targets in {_targets(arm) for arm in arms}:
        means = {
            arm.name: measure.mean
            for arm in arms
            if _targets(arm) == targets and (measure := measures[arm.name]) is not None
        }
        lowest = column.write(min(means.values(), default=inf))
        leading = {name for name, mean in means.items() if column.write(mean) == lowest}
        best |= leading if len(leading) < len(means) else set()
    return best


def _targets(arm: Arm) -> str:
    """What an arm's model predicts: losses over other targets cannot be compared."""
    family: str = arm.config.model.family
    return {"bert": "masked tokens", "t5": "cut-out spans"}.get(family, "the next token")


def _experts(arm: Arm) -> Cell:
    k, experts = arm.config.moe.top_k, arm.config.moe.experts
    return Cell("-", False, None) if arm.method == "dense" else Cell(f"{k}/{experts}", False, k / experts)


def alone_on_device(results: Sequence[RunResult]) -> set[str]:
    """The names of the runs that shared no device with another run of the experiment while they trained.

    The run that one started from counts as a part of it. A run whose records do not say when and where it trained, or
    that was interrupted, is not known to have been alone; it may have been beside any other.
    """
    work = pd.DataFrame(
        [row for result in results for row in _work(result)],
        columns=["run", "training", "known", "host", "device", "began", "ended"],
    )
    run, training, known, host, device, began, ended = (work[name].to_numpy() for name in work)
    disturbed = set(run[training & ~known])
    for place in np.flatnonzero(training & known):
        same_device = (host == host[place]) & (device == device[place]) | pd.isna(host)
        at_once = (began < ended[place]) & (ended > began[place])
        # A first phase that runs share stands in the records of each.
        same_work = (began == began[place]) & (ended == ended[place])
        if (same_device & at_once & ~same_work & (run != run[place])).any():
            disturbed.add(run[place])
    by_name = {result.name: result for result in results}

    def was_alone(result: RunResult) -> bool:
        parent = result.config.parent_run
        return result.name not in disturbed and (parent is None or was_alone(by_name[parent]))

    return {result.name for result in results if was_alone(result)}


def _work(result: RunResult) -> list[tuple[Any, ...]]:
    """Where and when the phases and measurements of a run were done, a row for each device.

    Of a phase that was interrupted only the end is known: it began after the phase before it.
    """
    done = [(True, record.provenance) for record in result.chain]
    paths = [result.folder / name for _, name in MEASUREMENTS.values()]
    done += [(False, read_json_checked(path).get("provenance", {})) for path in paths if path.is_file()]
    rows, before = [], -inf
    for training, origin in done:
        began, ended = origin.get("began"), origin.get("ended", inf)
        for device in origin.get("devices", [None]):
            times = (before if began is None else began, ended)
            rows.append((result.name, training, began is not None, origin.get("host"), device, *times))
        before = origin.get("ended", -inf)
    return rows
