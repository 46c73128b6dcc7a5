"""What the numbers say, in sentences computed from them, whichever way they point."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ssd_lit.config import Method
from ssd_lit.layout import PhaseRecord
from ssd_lit.reporting.runs import RunResult, by_arm, perplexity
from ssd_lit.reporting.words import (
    AMOUNT,
    COUNT,
    PERPLEXITY,
    compare,
    digits,
    duration,
    listed,
    number,
    percent,
    scaled,
)

CLOSE = 0.01
"""A sparse mode this near its own dense mode is called close."""


@dataclass(frozen=True)
class Finding:
    """A sentence or two, and the runs whose numbers they hold."""

    topic: str
    text: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class Arm:
    """The runs of one arm, one a seed."""

    runs: tuple[RunResult, ...]

    @property
    def label(self) -> str:
        return self.runs[0].label

    @property
    def method(self) -> Method:
        return self.runs[0].config.method

    @property
    def experts(self) -> str:
        moe = self.runs[0].config.moe
        return f"{moe.top_k} of {moe.experts} experts"

    def measure(self, get: Callable[[RunResult], float | None]) -> "Measure | None":
        """A number of every run, None if one of them lacks it."""
        values = [value for run in self.runs if (value := get(run)) is not None]
        return Measure(tuple(values)) if len(values) == len(self.runs) else None


@dataclass(frozen=True)
class Measure:
    """One number over the seeds."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    def text(self, write: Callable[[float], str] = number) -> str:
        """The mean, and the range if the seeds differ in what is written."""
        low, high = write(min(self.values)), write(max(self.values))
        return low if low == high else f"{write(self.mean)} ({low} to {high})"

    def overlap(self, other: "Measure") -> str:
        """Whether seeds alone could explain the difference; empty without several seeds."""
        if min(len(self.values), len(other.values)) < 2:
            return ""
        if max(self.values) < min(other.values) or max(other.values) < min(self.values):
            return " The ranges over seeds do not overlap."
        return " The ranges over seeds overlap, so the difference may be chance."


def findings(results: Sequence[RunResult]) -> list[Finding]:
    """Every finding the experiment's arms allow, SSD first, what they do not allow last."""
    arms = [Arm(tuple(runs)) for runs in by_arm(results).values()]
    found: list[Finding | None] = []
    for arm in _of(arms, "ssd"):
        found += [_dense_mode(arm, arms), _cost(arm, arms), _sparse_mode(arm)]
        found += [_sparse_modes(arm, other) for other in _peers(arm, arms, "posthoc", "sparse")]
        found += [_activation(arm, arms), _switches(arm)]
    for arm in _of(arms, "sparse"):
        found += [_scratch(arm, arms), _cost(arm, arms)]
    found += [_sparse_mode(arm) for arm in _of(arms, "posthoc")]
    return [finding for finding in [*found, *_limits(arms)] if finding is not None]


def _of(arms: Sequence[Arm], *methods: Method) -> list[Arm]:
    return [arm for arm in arms if arm.method in methods]


def _peers(arm: Arm, arms: Sequence[Arm], *methods: Method) -> list[Arm]:
    """Arms of those methods with the same model and data: only these can be compared."""
    mine = arm.runs[0].config
    return [
        other
        for other in _of(arms, *methods)
        if other.runs[0].config.model == mine.model and other.runs[0].config.data == mine.data
    ]


def _dense_mode(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine = arm.measure(lambda run: run.ppl_dense)
    if mine is None:
        return None
    split = arm.runs[0].evaluation.split
    text = f"In dense mode {arm.label} reaches a {split} perplexity of {mine.text()}"
    for dense in _peers(arm, arms, "dense")[:1]:
        theirs = dense.measure(lambda run: run.ppl_dense)
        if theirs is not None:
            how = f"{compare(mine.mean, theirs.mean, PERPLEXITY)} {dense.label}'s {theirs.text()}"
            text += f", {how}.{mine.overlap(theirs)}"
            return Finding(f"{arm.label} in dense mode", text, _names(arm, dense))
    return Finding(f"{arm.label} in dense mode", f"{text}.", _names(arm))


def _cost(arm: Arm, arms: Sequence[Arm]) -> Finding:
    flops, seconds = _flops(arm), _seconds(arm)
    share = _measured(arm, lambda run: run.sparse_share)
    text = f"{share.text(percent)} of {arm.label}'s training steps were sparse. Training cost {flops.text(_flop)}"
    for dense in _peers(arm, arms, "dense")[:1]:
        their_flops, their_seconds = _flops(dense), _seconds(dense)
        how_dear = compare(flops.mean, their_flops.mean, AMOUNT)
        how_long = compare(seconds.mean, their_seconds.mean, AMOUNT)
        text += (
            f", {how_dear} {dense.label}'s {their_flops.text(_flop)}, "
            f"and took {seconds.text(duration)}, {how_long} its {their_seconds.text(duration)}."
        )
        tokens, their_tokens = (_measured(one, lambda run: float(run.total.tokens)).mean for one in (arm, dense))
        if tokens != their_tokens:
            text += f" They did not train on the same text: {scaled(tokens)} against {scaled(their_tokens)} tokens."
        return Finding(f"{arm.label}: cost", text, _names(arm, dense))
    return Finding(f"{arm.label}: cost", f"{text} and took {seconds.text(duration)}.", _names(arm))


def _sparse_mode(arm: Arm) -> Finding | None:
    sparse, dense = arm.measure(lambda run: run.ppl_sparse), arm.measure(lambda run: run.ppl_dense)
    if sparse is None or dense is None:
        return None
    how = f"{compare(sparse.mean, dense.mean, PERPLEXITY)} its own dense mode's {number(dense.mean)}"
    text = f"With {arm.experts}, {arm.label}'s perplexity is {sparse.text()}, {how}. {_close(arm, dense.mean)}"
    recall = arm.measure(_mean_recall)
    if recall is not None:
        text += f" The chosen experts hold {percent(recall.mean)} of the active neurons."
    return Finding(f"{arm.label} in sparse mode", text, _names(arm))


def _close(arm: Arm, dense: float) -> str:
    """From which k on the sparse mode is close to the dense mode."""
    ks = sorted(set.intersection(*({k for k, _ in run.evaluation.curve} for run in arm.runs)))
    ks = [k for k in ks if k < arm.runs[0].config.moe.experts]
    if not ks:
        return "Other numbers of experts were not scored."
    close = [k for k in ks if _at(arm, k) <= (1 + CLOSE) * dense]
    if close:
        return f"The smallest k scored that comes within {CLOSE:.0%} of dense mode is {close[0]}."
    return f"No k scored (up to {ks[-1]}) comes within {CLOSE:.0%} of dense mode."


def _at(arm: Arm, k: int) -> float:
    """Mean perplexity in sparse mode with k experts."""
    return _measured(arm, lambda run: perplexity(dict(run.evaluation.curve)[k])).mean


def _sparse_modes(arm: Arm, other: Arm) -> Finding | None:
    mine, theirs = arm.measure(lambda run: run.ppl_sparse), other.measure(lambda run: run.ppl_sparse)
    if mine is None or theirs is None:
        return None
    how = compare(mine.mean, theirs.mean, PERPLEXITY)
    text = (
        f"With {arm.experts}, {arm.label}'s perplexity of {mine.text()} is {how} that of {other.label} with "
        f"{other.experts}, {theirs.text()}.{mine.overlap(theirs)}"
    )
    return Finding(f"{arm.label} against {other.label}, both in sparse mode", text, _names(arm, other))


def _scratch(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine = arm.measure(lambda run: run.ppl_sparse)
    for dense in _peers(arm, arms, "dense")[:1]:
        theirs = dense.measure(lambda run: run.ppl_dense)
        if mine is not None and theirs is not None:
            text = (
                f"{arm.label}, with {arm.experts} in training and in use, reaches a perplexity of {mine.text()}, "
                f"{compare(mine.mean, theirs.mean, PERPLEXITY)} {dense.label}'s {theirs.text()}"
                f".{mine.overlap(theirs)}"
            )
            return Finding(f"{arm.label} in its sparse mode", text, _names(arm, dense))
    return None


def _activation(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine = arm.measure(lambda run: run.evaluation.active_neurons)
    if mine is None:
        return None
    neurons = arm.runs[0].config.model.d_ff
    text = (
        f"In {arm.label}'s final model {mine.text(digits)} of {neurons} neurons of an FFN are active for a token "
        f"({percent(mine.mean / neurons)})"
    )
    for dense in _peers(arm, arms, "dense")[:1]:
        theirs = dense.measure(lambda run: run.evaluation.active_neurons)
        if theirs is not None:
            how = compare(mine.mean, theirs.mean, COUNT)
            text += f", {how} {dense.label}'s {theirs.text(digits)}.{mine.overlap(theirs)}"
            return Finding(f"{arm.label}: activation", text, _names(arm, dense))
    return Finding(f"{arm.label}: activation", f"{text}.", _names(arm))


def _switches(arm: Arm) -> Finding:
    tau = arm.runs[0].config.switching.tau
    told = [f"{_first_switch(run.chain[0], tau)} ({run.name})" for run in arm.runs]
    counts = sorted({len(run.sparse_spans()) for run in arm.runs})
    phases = "1 sparse phase" if counts == [1] else f"{' or '.join(str(count) for count in counts)} sparse phases"
    text = f"{arm.label}'s first dense phase ended {listed(told)}; {phases} followed."
    return Finding(f"{arm.label}: switching", text, _names(arm))


def _first_switch(record: PhaseRecord, tau: float) -> str:
    last = f"similarity {record.similarity[-1][1]:.2f}" if record.similarity else "similarity not measured"
    why = "as the pattern was stable" if record.ended_by == "stable" else f"not by stability but by {record.ended_by}"
    return f"after {record.steps} steps {why}, {last} against tau {tau:g}"


def _limits(arms: Sequence[Arm]) -> list[Finding]:
    """What this experiment cannot say, and what its numbers stand for."""
    limits = []
    if not _of(arms, "ssd"):
        limits.append("No SSD arm was run.")
    alone = [arm.label for arm in _of(arms, "ssd", "sparse") if not _peers(arm, arms, "dense")]
    if alone:
        limits.append(
            f"No dense arm of the same model and data was run beside {listed(alone)}: nothing here says how dense "
            "training would compare."
        )
    if any(len(arm.runs) == 1 for arm in arms):
        limits.append("With one seed an arm, how much of a difference is chance is not known.")
    seeds = sorted({len(arm.runs) for arm in arms} - {1})
    if seeds:
        count = listed([str(number) for number in seeds])
        limits.append(f"Numbers are means over {count} seeds, the lowest and highest in brackets where they differ.")
    return [Finding("How far this goes", " ".join(limits), ())]


def _flops(arm: Arm) -> Measure:
    return _measured(arm, lambda run: run.total.flops)


def _seconds(arm: Arm) -> Measure:
    return _measured(arm, lambda run: run.total.seconds)


def _flop(value: float) -> str:
    return scaled(value, "FLOP")


def _measured(arm: Arm, get: Callable[[RunResult], float | None]) -> Measure:
    """A number that every run has."""
    measure = arm.measure(get)
    assert measure is not None
    return measure


def _mean_recall(run: RunResult) -> float | None:
    recall = run.evaluation.routing_recall
    return sum(recall) / len(recall) if recall else None


def _names(*arms: Arm) -> tuple[str, ...]:
    return tuple(run.name for arm in arms for run in arm.runs)
