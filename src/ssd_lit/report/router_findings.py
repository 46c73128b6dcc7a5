"""What routers that were trained afterwards buy, within what an oracle shows to be possible."""

from collections.abc import Sequence

from ssd_lit.report.arms import Arm, Finding, dynamic_k, in_sparse_mode, run_names
from ssd_lit.report.formatting import PERPLEXITY, compare, listed, number, percent
from ssd_lit.report.settings import AFTERWARDS, alike_but, differences

TRAINED = {
    "mass_mlp": "an MLP that was trained on the experts' activation mass",
    "norm_mlp": "an MLP that was trained on the norm of the experts' outputs",
    "centers": "directions that began as the experts' centres and were trained on their activation mass",
}


def differs_in_trained_router(one: Arm, other: Arm) -> bool:
    """Whether both hold the same weights but for a router that was trained afterwards.

    A post-hoc arm that starts from SSD's model keeps its experts, where they are clusters: other constructions make new
    ones.
    """
    behind_ssd = other.config.method == "ssd" and one.config.parent_arm == other.name
    same_experts = (
        one.config.moe.construction == "kmeans" and differences(one.config, other.config).keys() <= AFTERWARDS
    )
    return (behind_ssd and same_experts) or alike_but(one.config, other.config, AFTERWARDS)


def posthoc_router(arm: Arm, arms: Sequence[Arm]) -> Finding | None:
    """A trained router against the one it replaces and against the oracle, on the same model."""
    mine, oracle = in_sparse_mode(arm), arm.measure(lambda run: run.ppl_oracle)
    kind = arm.config.moe.posthoc_router
    if mine is None or oracle is None or kind is None:
        return None
    text = (
        f"With {arm.experts} chosen by {TRAINED[kind]}, {arm.label}'s perplexity is {mine.text()}, "
        f"{compare(mine.mean, oracle.mean, PERPLEXITY)} the {oracle.text()} of an oracle, which chooses by the "
        "true mass."
    )
    plain = [
        other for other in arms if other.config.moe.posthoc_router is None and differs_in_trained_router(arm, other)
    ]
    for other in plain[:1]:
        theirs = in_sparse_mode(other)
        if theirs is not None:
            text += f" {_gain(mine.mean, other, theirs.mean, oracle.mean)}{mine.overlap(theirs)}"
    text += _dynamic(arm)
    return Finding(f"{arm.label}: what the router buys", text, run_names(arm, *plain[:1]))


def _gain(mine: float, other: Arm, theirs: float, oracle: float) -> str:
    """Which share of the gap to the oracle the trained router closes."""
    told = (
        f"That is {compare(mine, theirs, PERPLEXITY)} the {number(theirs)} of {other.label}, the same model with its "
        f"{other.config.moe.router} router"
    )
    gap = theirs - oracle
    if gap <= 0:
        return f"{told}, which the oracle does not beat: there is no gap to close."
    closed = (theirs - mine) / gap
    if closed < 0:
        return f"{told}: the gap to the oracle grows by {percent(-closed)}."
    return f"{told}: {percent(min(closed, 1.0))} of the gap to the oracle is closed."


def _dynamic(arm: Arm) -> str:
    points = [f"{k.mean:.1f} experts give {value.text()}" for k, value in dynamic_k(arm)]
    return f" With as many experts a token as matter, on average {listed(points)}." if points else ""
