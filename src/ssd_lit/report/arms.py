"""An arm: its runs, and its numbers over their seeds."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from ssd_lit.config import Method, RunConfig
from ssd_lit.report.formatting import number
from ssd_lit.report.results import RunResult, by_arm, run_frame


@dataclass(frozen=True)
class Measure:
    """One number over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


@dataclass(frozen=True, eq=False)
class Arm:
    """The runs of one arm, one a seed, and their rows of `run_frame`."""

    runs: tuple[RunResult, ...]
    rows: pd.DataFrame

    @property
    def name(self) -> str:
        return self.config.arm

    @property
    def label(self) -> str:
        return self.config.label

    @property
    def method(self) -> Method:
        return self.config.method

    @property
    def config(self) -> RunConfig:
        """The settings of the arm, which all its runs share."""
        return self.runs[0].config

    def measure(self, column: str) -> Measure | None:
        """A column of `run_frame` over the seeds, None if one of them lacks it."""
        return measure_of(self.rows[column])

    def over(self, get: Callable[[RunResult], float | None]) -> Measure | None:
        """Another number of every run, None if one of them lacks it."""
        return measure_of([get(run) for run in self.runs])


def measure_of(values: "Sequence[float | None] | pd.Series[float]") -> Measure | None:
    """None if there is no value, or if one of them is missing."""
    present = [float(value) for value in values if value is not None]
    return Measure(tuple(present)) if present and len(present) == len(values) else None


def arms_of(results: Sequence[RunResult]) -> list[Arm]:
    """The arms, in the order they first appear."""
    frame = run_frame(results)
    return [Arm(tuple(runs), frame[frame["arm"] == name]) for name, runs in by_arm(results).items()]


def dense_peer(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm of the same model and data that trained for all its steps."""
    return next((other for other in arms if other.config.is_dense_training_of(arm.config)), None)


def reference_arm(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm that an arm is compared with: of the same model; for one that matches an arm's FLOPs that arm's."""
    matched = next((other for other in arms if other.name == arm.config.match_flops_of_arm), None)
    return dense_peer(arm, arms) or (None if matched is None else dense_peer(matched, arms))


def cell(measure: Measure | None, write: "Callable[[float], str] | None" = None) -> str:
    """A cell of a table: the mean, and the range if the seeds differ in what is written; a dash for none."""
    if measure is None:
        return "-"
    write = write or number
    low, high = write(measure.low), write(measure.high)
    return low if low == high else f"{write(measure.mean)} ({low} to {high})"
