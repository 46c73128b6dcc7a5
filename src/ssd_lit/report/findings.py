"""What the numbers say, in sentences computed from them, whichever way they point."""

from collections.abc import Sequence

from ssd_lit.config import RunConfig
from ssd_lit.records import PhaseRecord
from ssd_lit.report.arms import (
    Arm,
    Finding,
    Measure,
    arms_of,
    dense_peer,
    flops,
    in_dense_mode,
    in_sparse_mode,
    of_methods,
    peers,
    run_names,
    seconds,
)
from ssd_lit.report.budget_findings import matched, upcycled
from ssd_lit.report.formatting import (
    AMOUNT,
    COUNT,
    PERPLEXITY,
    compare,
    digits,
    duration,
    flop,
    listed,
    number,
    percent,
    scaled,
    told_differences,
)
from ssd_lit.report.grid import Grid
from ssd_lit.report.grid_findings import over_grid
from ssd_lit.report.router_findings import differs_in_trained_router, posthoc_router
from ssd_lit.report.runs import RunResult, perplexity
from ssd_lit.report.settings import differences

CLOSE = 0.01
"""A sparse mode this near its own dense mode is called close."""


def findings(results: Sequence[RunResult], grids: Sequence[Grid] = ()) -> list[Finding]:
    """Every finding the experiment's arms allow, SSD first, what they do not allow last.

    The cells of a grid have one finding together, but a grid of nothing but trained routers one for each as well.
    """
    every = arms_of(results)
    arms = [arm for arm in every if not arm.config.grid]
    routed = [
        arm for arm in every if arm.config.moe.posthoc_router and arm.config.grid.keys() <= {"moe.posthoc_router"}
    ]
    found: list[Finding | None] = []
    for arm in of_methods(arms, "ssd"):
        found += _ssd(arm, arms)
    for arm in of_methods(arms, "sparse"):
        found += [_scratch(arm, arms), _cost(arm, arms)]
    found += [upcycled(arm, arms) for arm in of_methods(arms, "upcycle")]
    found += [_sparse_mode(arm) for arm in of_methods(arms, "posthoc") if arm.config.moe.posthoc_router is None]
    found += [posthoc_router(arm, every) for arm in routed]
    found += [matched(arm, arms) for arm in arms if arm.config.match_flops_of_arm is not None]
    found += [over_grid(grid) for grid in grids]
    found.append(_limits(every))
    return [finding for finding in found if finding is not None]


def _ssd(arm: Arm, arms: Sequence[Arm]) -> list[Finding | None]:
    """All about the first SSD arm of a model; of the others, how they differ from it."""
    first = peers(arm, arms, "ssd")[0]
    if arm is not first:
        return [] if differs_in_trained_router(first, arm) else [_variant(arm, first), _switches(arm)]
    found = [_dense_mode(arm, arms), _cost(arm, arms), _sparse_mode(arm)]
    others = [other for other in peers(arm, arms, "posthoc", "sparse") if other.config.moe.posthoc_router is None]
    return [*found, *(_sparse_modes(arm, other) for other in others), _activation(arm, arms), _switches(arm)]


def _dense_mode(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine, dense = in_dense_mode(arm), dense_peer(arm, arms)
    if mine is None:
        return None
    split = arm.runs[0].evaluation.split
    text = f"In dense mode {arm.label} reaches a {split} perplexity of {mine.text()}"
    theirs = None if dense is None else in_dense_mode(dense)
    if dense is None or theirs is None:
        return Finding(f"{arm.label} in dense mode", f"{text}.", run_names(arm))
    text += f", {compare(mine.mean, theirs.mean, PERPLEXITY)} {dense.label}'s {theirs.text()}.{mine.overlap(theirs)}"
    return Finding(f"{arm.label} in dense mode", text, run_names(arm, dense))


def _cost(arm: Arm, arms: Sequence[Arm]) -> Finding:
    spent, took, dense = flops(arm), seconds(arm), dense_peer(arm, arms)
    share = arm.measured(lambda run: run.sparse_fraction)
    text = f"{share.text(percent)} of {arm.label}'s training steps were sparse. Training cost {spent.text(flop)}"
    if dense is None:
        return Finding(f"{arm.label}: cost", f"{text} and took {took.text(duration)}.", run_names(arm))
    their_flops, their_seconds = flops(dense), seconds(dense)
    text += (
        f", {compare(spent.mean, their_flops.mean, AMOUNT)} {dense.label}'s {their_flops.text(flop)}, "
        f"and took {took.text(duration)}, {compare(took.mean, their_seconds.mean, AMOUNT)} "
        f"its {their_seconds.text(duration)}."
    )
    tokens, their_tokens = (one.measured(lambda run: float(run.total.tokens)).mean for one in (arm, dense))
    if tokens != their_tokens:
        text += f" They did not train on the same text: {scaled(tokens)} against {scaled(their_tokens)} tokens."
    return Finding(f"{arm.label}: cost", text, run_names(arm, dense))


def _sparse_mode(arm: Arm) -> Finding | None:
    sparse, dense = in_sparse_mode(arm), in_dense_mode(arm)
    if sparse is None or dense is None:
        return None
    how = f"{compare(sparse.mean, dense.mean, PERPLEXITY)} its own dense mode's {number(dense.mean)}"
    text = f"With {arm.experts}, {arm.label}'s perplexity is {sparse.text()}, {how}. {_close(arm, dense.mean)}"
    recall = arm.measure(lambda run: run.recall)
    if recall is not None:
        text += f" The chosen experts hold {percent(recall.mean)} of the activation mass that the best ones would."
    oracle = arm.measure(lambda run: run.ppl_oracle)
    if oracle is not None:
        how = compare(oracle.mean, sparse.mean, PERPLEXITY)
        text += f" Choosing by the true activation mass would give {oracle.text()}, {how} the router's."
    return Finding(f"{arm.label} in sparse mode", text, run_names(arm))


def _close(arm: Arm, dense: float) -> str:
    """From which k on the sparse mode is close to the dense mode."""
    ks = sorted(set.intersection(*({k for k, _ in run.evaluation.curve} for run in arm.runs)))
    ks = [k for k in ks if k < arm.config.moe.experts]
    if not ks:
        return "Other numbers of experts were not scored."
    close = [k for k in ks if _at(arm, k).mean <= (1 + CLOSE) * dense]
    if close:
        return f"The smallest k scored that comes within {CLOSE:.0%} of dense mode is {close[0]}."
    return f"No k scored (up to {ks[-1]}) comes within {CLOSE:.0%} of dense mode."


def _at(arm: Arm, k: int) -> Measure:
    """Perplexity in sparse mode with k experts."""
    return arm.measured(lambda run: perplexity(dict(run.evaluation.curve)[k]))


def _sparse_modes(arm: Arm, other: Arm) -> Finding | None:
    mine, theirs = in_sparse_mode(arm), in_sparse_mode(other)
    if mine is None or theirs is None:
        return None
    how = compare(mine.mean, theirs.mean, PERPLEXITY)
    text = (
        f"With {arm.experts}, {arm.label}'s perplexity of {mine.text()} is {how} that of {other.label} with "
        f"{other.experts}, {theirs.text()}.{mine.overlap(theirs)}"
    )
    return Finding(f"{arm.label} against {other.label}, both in sparse mode", text, run_names(arm, other))


def _variant(arm: Arm, first: Arm) -> Finding:
    """What another SSD arm of the same model changes."""
    changed = told_differences(differences(arm.config, first.config))
    text = f"{arm.label} differs from {first.label} in {changed}."
    for mode, measure in (("dense mode", in_dense_mode), (f"sparse mode, with {arm.experts},", in_sparse_mode)):
        mine, theirs = measure(arm), measure(first)
        if mine is not None and theirs is not None:
            how = compare(mine.mean, theirs.mean, PERPLEXITY)
            text += f" In {mode} its perplexity of {mine.text()} is {how} {first.label}'s {theirs.text()}."
            text += mine.overlap(theirs)
    spent, theirs = flops(arm), flops(first)
    text += f" It cost {spent.text(flop)}, {compare(spent.mean, theirs.mean, AMOUNT)} {first.label}'s."
    return Finding(f"{arm.label} against {first.label}", text, run_names(arm, first))


def _scratch(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine, dense = in_sparse_mode(arm), dense_peer(arm, arms)
    theirs = None if dense is None else in_dense_mode(dense)
    if mine is None or dense is None or theirs is None:
        return None
    text = (
        f"{arm.label}, with {_experts_in_training(arm.config)}, reaches a perplexity of {mine.text()}, "
        f"{compare(mine.mean, theirs.mean, PERPLEXITY)} {dense.label}'s {theirs.text()}.{mine.overlap(theirs)}"
    )
    return Finding(f"{arm.label} in its sparse mode", text, run_names(arm, dense))


def _experts_in_training(config: RunConfig) -> str:
    moe, schedule = config.moe, config.moe.k_schedule
    if schedule.kind == "constant":
        return f"{moe.top_k} of {moe.experts} experts in training and in use"
    end = schedule.end or moe.top_k
    in_training = f"k from {schedule.start} to {end} in training ({schedule.kind})"
    return f"{in_training} and {moe.top_k} of {moe.experts} experts in use"


def _activation(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    mine, dense = _active(arm), dense_peer(arm, arms)
    if mine is None:
        return None
    neurons = arm.config.model.d_ff
    text = (
        f"In {arm.label}'s final model {mine.text(digits)} of {neurons} neurons of an FFN are active for a token "
        f"({percent(mine.mean / neurons)})"
    )
    theirs = None if dense is None else _active(dense)
    if dense is None or theirs is None:
        return Finding(f"{arm.label}: activation", f"{text}.", run_names(arm))
    text += f", {compare(mine.mean, theirs.mean, COUNT)} {dense.label}'s {theirs.text(digits)}.{mine.overlap(theirs)}"
    return Finding(f"{arm.label}: activation", text, run_names(arm, dense))


def _active(arm: Arm) -> Measure | None:
    return arm.measure(lambda run: run.evaluation.active_neurons)


def _switches(arm: Arm) -> Finding:
    switching = arm.config.switching
    counts = sorted({len(run.sparse_spans()) for run in arm.runs})
    phases = "1 sparse phase" if counts == [1] else f"{' or '.join(str(count) for count in counts)} sparse phases"
    if switching.switch_points is not None:
        steps = listed([str(step) for step in switching.switch_points])
        text = f"{arm.label} changed its mode at steps fixed beforehand, {steps}: {phases}."
    else:
        told = [f"{_first_switch(run.chain[0], switching.tau)} ({run.name})" for run in arm.runs]
        text = f"{arm.label}'s first dense phase ended {listed(told)}; {phases} followed."
    return Finding(f"{arm.label}: switching", text, run_names(arm))


def _first_switch(record: PhaseRecord, tau: float) -> str:
    last = f"similarity {record.similarity[-1][1]:.2f}" if record.similarity else "similarity not measured"
    why = "as the pattern was stable" if record.ended_by == "stable" else f"not by stability but by {record.ended_by}"
    return f"after {record.steps} steps {why}, {last} against tau {tau:g}"


def _limits(arms: Sequence[Arm]) -> Finding:
    """What this experiment cannot say, and what its numbers stand for."""
    limits = []
    if not of_methods(arms, "ssd"):
        limits.append("No SSD arm was run.")
    alone = [
        arm.label
        for arm in of_methods(arms, "ssd", "sparse", "upcycle")
        if not arm.config.grid and not peers(arm, arms, "dense")
    ]
    if alone:
        limits.append(
            f"No dense arm of the same model and data was run beside {listed(alone)}: nothing here says how dense "
            "training would compare."
        )
    families: list[str] = list(dict.fromkeys(arm.config.model.family for arm in arms))
    if len(families) > 1:
        limits.append(
            f"{listed(families)} predict different targets (the next token, a masked token, a cut-out span): their "
            "losses and perplexities cannot be compared with one another."
        )
    pretrained = [arm.label for arm in arms if arm.config.model.pretrained is not None]
    if pretrained:
        limits.append(f"What the checkpoint behind {listed(pretrained)} cost to train is not counted.")
    if any(len(arm.runs) == 1 for arm in arms):
        limits.append("With one seed an arm, how much of a difference is chance is not known.")
    seeds = sorted({len(arm.runs) for arm in arms} - {1})
    if seeds:
        count = listed([str(number) for number in seeds])
        limits.append(f"Numbers are means over {count} seeds, the lowest and highest in brackets where they differ.")
    return Finding("How far this goes", " ".join(limits), ())
