"""An arm's numbers over its seeds, and how numbers are written."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pandas as pd

from ssd_lit.config import Method, RunConfig
from ssd_lit.report.results import RunResult, by_arm, run_frame

PREFIXES = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")


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
    for other in arms:
        same = other.config.model == arm.config.model and other.config.data == arm.config.data
        if same and other.method == "dense" and other.config.match_flops_of_arm is None:
            return other
    return None


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


def scaled(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 1.23 G."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g} {unit}".strip()
    power = min(max(int(math.log10(abs(value)) // 3), 0), len(PREFIXES) - 1)
    mantissa = value / 1000.0**power
    # 999.7 rounds to 1000: one prefix further.
    if round(abs(mantissa)) >= 1000 and power + 1 < len(PREFIXES):
        mantissa, power = mantissa / 1000, power + 1
    return f"{digits(mantissa)} {PREFIXES[power]}{unit}".strip()


def digits(value: float) -> str:
    """About three digits that matter, without an exponent."""
    if not math.isfinite(value):
        return f"{value:g}"
    size = abs(value)
    return f"{value:.{2 if size < 10 else 1 if size < 100 else 0}f}"


def number(value: float | None) -> str:
    """Perplexities in tables: two decimals, fewer once they are large; a dash for none."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(fraction: float) -> str:
    """A fraction as a percentage with one decimal."""
    return f"{100 * fraction:.1f}%"


def change(fraction: float) -> str:
    """A relative difference in per cent, with its sign; no sign where it rounds to nothing."""
    return f"{100 * fraction:+.1f}%".replace("+0.0%", "0.0%").replace("-0.0%", "0.0%")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def shortened(text: str, most: int = 32) -> str:
    """A name that fits beside a figure: the middle of a long one is left out, for names differ at their ends."""
    return text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-(most // 2) :]}"
