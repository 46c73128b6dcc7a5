"""What the same FLOPs give otherwise: upcycled models, and dense ones trained for as much as another arm cost."""

from collections.abc import Sequence

from ssd_lit.report.arms import (
    Arm,
    Finding,
    dense_peer,
    flops,
    in_dense_mode,
    in_sparse_mode,
    run_names,
)
from ssd_lit.report.formatting import AMOUNT, PERPLEXITY, compare, flop, told_differences
from ssd_lit.report.settings import differences


def upcycled(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    """An upcycled model against dense training, with all that it cost, the run it starts from included."""
    mine, start = in_sparse_mode(arm), _arm(arms, arm.config.parent_arm)
    if mine is None:
        return None
    spent = flops(arm)
    text = (
        f"{arm.label} reaches a perplexity of {mine.text()} with {arm.experts}, each a copy of the whole FFN, for "
        f"{spent.text(flop)}; "
    )
    if start is None:
        text += "what its checkpoint cost is not counted."
    else:
        text += f"{flops(start).text(flop)} of these are {start.label}'s, which it starts from."
    dense = dense_peer(arm, arms)
    theirs = None if dense is None else in_dense_mode(dense)
    if dense is None or theirs is None:
        return Finding(f"{arm.label}: upcycling", text, run_names(arm, *([] if start is None else [start])))
    cost = flops(dense)
    text += (
        f" That is {compare(spent.mean, cost.mean, AMOUNT)} {dense.label}'s {cost.text(flop)}, for a perplexity "
        f"{compare(mine.mean, theirs.mean, PERPLEXITY)} {dense.label}'s {theirs.text()}.{mine.overlap(theirs)}"
    )
    if not any(other.config.match_flops_of_arm == arm.name for other in arms):
        text += " What dense training would make of the same FLOPs was not tried."
    return Finding(f"{arm.label}: upcycling", text, run_names(arm, dense))


def matched(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    """A dense arm that trained for the FLOPs of another, against that one."""
    other = _arm(arms, arm.config.match_flops_of_arm)
    mine = in_dense_mode(arm)
    if other is None or mine is None:
        return None
    steps = arm.measured(lambda run: float(run.last_step)).text(lambda step: f"{step:.0f}")
    text = (
        f"{arm.label} trained for {steps} steps, all that {other.label}'s {flops(other).text(flop)} pay for "
        f"({flops(arm).text(flop)} spent)"
    )
    changed = {key: values for key, values in differences(arm.config, other.config).items() if key.startswith("model.")}
    text += f", with another model: {told_differences(changed)}." if changed else "."
    topic = f"{other.label} against {arm.label}, for the same FLOPs"
    if arm.config.model.family != other.config.model.family:
        text += " Models of different families predict different targets: their perplexities cannot be compared."
        return Finding(topic, text, run_names(arm, other))
    modes = [(f"in sparse mode with {other.experts}", in_sparse_mode(other))]
    # From scratch, dense mode is what no step was trained in.
    if other.method in ("dense", "ssd") and other.runs[0].serves_densely:
        modes.insert(0, ("in dense mode", in_dense_mode(other)))
    for mode, theirs in modes:
        if theirs is not None:
            text += (
                f" {other.label}'s perplexity {mode}, {theirs.text()}, is "
                f"{compare(theirs.mean, mine.mean, PERPLEXITY)} the {mine.text()} of {arm.label}.{theirs.overlap(mine)}"
            )
    return Finding(topic, text, run_names(other, arm))


def _arm(arms: Sequence[Arm], name: str | None) -> Arm | None:
    return next((arm for arm in arms if arm.name == name), None)
