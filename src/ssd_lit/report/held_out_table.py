"""Perplexity on texts that no run was trained on, in dense mode and over k."""

from collections.abc import Sequence
from typing import NamedTuple

from ssd_lit.report.arms import Arm, arms_of
from ssd_lit.report.formatting import number
from ssd_lit.report.runs import RunResult, perplexity


class HeldOutTable(NamedTuple):
    """One text."""

    name: str
    ks: list[int]
    """Numbers of experts for which there is a column."""
    rows: list[tuple[Arm, list[str]]]
    """Every arm: dense mode, then sparse mode with each of `ks`, over its seeds."""


def held_out_tables(results: Sequence[RunResult]) -> list[HeldOutTable]:
    """A table for each text; empty if the experiment holds none out."""
    names = list(dict.fromkeys(name for run in results for name in run.evaluation.held_out))
    return [_table(name, arms_of(results)) for name in names]


def _table(name: str, arms: Sequence[Arm]) -> HeldOutTable:
    ks = sorted({k for arm in arms for run in arm.runs for k, _ in run.evaluation.held_out[name].curve})

    def told(arm: Arm, k: int | None) -> str:
        measure = arm.measure(lambda run: _perplexity(run, name, k))
        return "-" if measure is None else measure.text(number)

    return HeldOutTable(name, ks, [(arm, [told(arm, k) for k in (None, *ks)]) for arm in arms])


def _perplexity(run: RunResult, name: str, k: int | None) -> float | None:
    loss = run.evaluation.loss_on(name, k)
    return None if loss is None else perplexity(loss)
