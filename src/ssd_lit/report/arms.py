"""An arm's numbers over its seeds, and how they are told."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssd_lit.config import Method, RunConfig
from ssd_lit.report.formatting import number
from ssd_lit.report.runs import RunResult, by_arm, perplexity


@dataclass(frozen=True)
class Finding:
    """A sentence or two, and the runs whose numbers they hold."""

    topic: str
    text: str
    runs: tuple[str, ...]


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

    def text(self, write: Callable[[float], str] = number) -> str:
        """The mean, and the range if the seeds differ in what is written."""
        low, high = write(self.low), write(self.high)
        return low if low == high else f"{write(self.mean)} ({low} to {high})"

    def overlap(self, other: "Measure") -> str:
        """Whether seeds alone could explain the difference; empty without several seeds."""
        if min(len(self.values), len(other.values)) < 2:
            return ""
        if self.high < other.low or other.high < self.low:
            return " The ranges over seeds do not overlap."
        return " The ranges over seeds overlap, so the difference may be chance."


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, one a seed."""

    runs: tuple[RunResult, ...]

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

    @property
    def experts(self) -> str:
        """How many experts a token runs through in use."""
        moe = self.config.moe
        return f"{moe.top_k} of {moe.experts} experts"

    def measure(self, get: Callable[[RunResult], float | None]) -> Measure | None:
        """A number of every run, None if one of them lacks it."""
        values = [value for run in self.runs if (value := get(run)) is not None]
        return Measure(tuple(values)) if len(values) == len(self.runs) else None

    def measured(self, get: Callable[[RunResult], float]) -> Measure:
        """A number that every run has."""
        return Measure(tuple(get(run) for run in self.runs))


def dense_peer(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm of the same model and data that trained for all its steps."""
    return next((other for other in peers(arm, arms, "dense") if other.config.match_flops_of_arm is None), None)


def peers(arm: Arm, arms: Sequence[Arm], *methods: Method) -> list[Arm]:
    """Arms of those methods with the same model and data: only these can be compared."""
    return [
        other
        for other in arms
        if other.method in methods and other.config.model == arm.config.model and other.config.data == arm.config.data
    ]


def of_methods(arms: Sequence[Arm], *methods: Method) -> list[Arm]:
    return [arm for arm in arms if arm.method in methods]


def flops(arm: Arm) -> Measure:
    """FLOPs spent in training, those of the run that it starts from included."""
    return arm.measured(lambda run: run.total.flops)


def seconds(arm: Arm) -> Measure:
    """Wall-clock seconds of training, those of the run that it starts from included."""
    return arm.measured(lambda run: run.total.seconds)


def in_dense_mode(arm: Arm) -> Measure | None:
    """Perplexity in dense mode."""
    return arm.measure(lambda run: run.ppl_dense)


def in_sparse_mode(arm: Arm) -> Measure | None:
    """Perplexity in sparse mode with the arm's k."""
    return arm.measure(lambda run: run.ppl_sparse)


def dynamic_k(arm: Arm) -> list[tuple[Measure, Measure]]:
    """The mean number of experts and the perplexity at each threshold, where tokens take as many as matter."""
    points = zip(*(run.evaluation.threshold_curve for run in arm.runs), strict=True)
    return [
        (Measure(tuple(k for _, k, _ in point)), Measure(tuple(perplexity(loss) for _, _, loss in point)))
        for point in points
    ]


def arms_of(results: Sequence[RunResult]) -> list[Arm]:
    """The arms, in the order they first appear."""
    return [Arm(tuple(runs)) for runs in by_arm(results).values()]


def run_names(*arms: Arm) -> tuple[str, ...]:
    return tuple(run.name for arm in arms for run in arm.runs)
