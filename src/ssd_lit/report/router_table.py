"""How well each arm chooses its experts, beside what the best choice and dense mode would give."""

from collections.abc import Callable, Sequence

from ssd_lit.report.arms import Arm, Measure, arms_of, in_dense_mode, in_sparse_mode
from ssd_lit.report.formatting import number, percent
from ssd_lit.report.runs import RunResult

HEADINGS = (
    "routing recall, mean over layers",
    "routing recall, worst layer",
    "perplexity, own router",
    "perplexity, oracle",
    "perplexity, dense mode",
)


def router_rows(results: Sequence[RunResult]) -> list[tuple[Arm, list[str]]]:
    """Every arm with a sparse mode, and what stands below each heading: at the arm's k, over its seeds."""
    arms = [arm for arm in arms_of(results) if arm.runs[0].evaluation.router is not None]
    return [(arm, _row(arm)) for arm in arms]


def _row(arm: Arm) -> list[str]:
    return [
        _told(arm.measure(lambda run: run.recall), percent),
        _told(arm.measure(lambda run: min(run.evaluation.routing_recall, default=None)), percent),
        _told(in_sparse_mode(arm), number),
        _told(arm.measure(lambda run: run.ppl_oracle), number),
        _told(in_dense_mode(arm), number),
    ]


def _told(measure: Measure | None, write: Callable[[float], str]) -> str:
    return "-" if measure is None else measure.text(write)
