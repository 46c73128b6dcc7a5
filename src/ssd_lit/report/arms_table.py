"""arms.csv: what the seeds of every arm give together, one row a number."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ssd_lit.config import RunConfig
from ssd_lit.report.arms import Arm, arms_of, dense_peer
from ssd_lit.report.runs import RunResult, load_results, perplexity
from ssd_lit.support.files import write_text

COLUMNS = ("arm", "label", "text", "mode", "measure", "mean", "lowest", "highest", "seeds")

Get = Callable[[RunResult], float | None]


class _Row(NamedTuple):
    """A number: of which text, if of one, in which mode, and what it is."""

    text: str
    mode: str
    measure: str
    get: Get


def write_arms(exp_dir: Path, runs: Sequence[RunConfig]) -> Path:
    """Write arms.csv for the finished runs: mean, lowest and highest over an arm's seeds of

    - what training took: `sparse_fraction` of all steps, `flops`, `seconds`, `tokens_per_second`;
    - `perplexity` of each text in dense mode, in sparse mode with each number of experts that was scored, and were the
      best experts chosen (oracle);
    - `over_dense_arm`, that perplexity relative to the dense arm's of the same seed, less one; and `over_dense_mode`,
      relative to the same model's in dense mode.

    A number that not every seed of the arm has gives no row.
    """
    arms = arms_of(load_results(exp_dir, runs))
    rows = []
    for arm in arms:
        for text, mode, measure, get in _numbers(arm, _dense_arm(arm, arms)):
            found = arm.measure(get)
            if found is not None:
                rows.append(
                    (arm.name, arm.label, text, mode, measure, found.mean, found.low, found.high, len(found.values))
                )
    path = exp_dir / "arms.csv"
    write_text(path, pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n"))
    return path


def _dense_arm(arm: Arm, arms: Sequence[Arm]) -> Arm | None:
    """The dense arm of the same model and data; for a smaller model that matches an arm's FLOPs, that arm's."""
    matched = next((other for other in arms if other.name == arm.config.match_flops_of_arm), None)
    return dense_peer(arm, arms) or (None if matched is None else dense_peer(matched, arms))


def _numbers(arm: Arm, dense: Arm | None) -> Iterator[_Row]:
    yield _Row("", "", "sparse_fraction", lambda run: run.sparse_fraction)
    yield _Row("", "", "flops", lambda run: run.total.flops)
    yield _Row("", "", "seconds", lambda run: run.total.seconds)
    yield _Row("", "", "tokens_per_second", lambda run: run.total.tokens / run.total.seconds)
    theirs = {} if dense is None else {run.config.seed: run for run in dense.runs}
    evaluation = arm.runs[0].evaluation
    for text in (evaluation.split, *evaluation.held_out):
        yield from _perplexities(text, "dense", _scored(text), theirs)
        for k in sorted({k for run in arm.runs for k in run.evaluation.ks_on(text)}):
            yield from _perplexities(text, f"sparse, k {k}", _scored(text, k), theirs)
    for k in sorted({k for run in arm.runs for k, _ in run.evaluation.oracle_curve}):
        yield from _perplexities(evaluation.split, f"oracle, k {k}", _scored_by_oracle(k), theirs)


def _perplexities(text: str, mode: str, loss: Get, theirs: dict[int, RunResult]) -> Iterator[_Row]:
    in_dense_mode = _scored(text)
    yield _Row(text, mode, "perplexity", lambda run: None if (mine := loss(run)) is None else perplexity(mine))
    yield _Row(
        text, mode, "over_dense_arm",
        lambda run: _over(loss(run), in_dense_mode(theirs[run.config.seed]) if run.config.seed in theirs else None),
    )  # fmt: skip
    if mode != "dense":
        yield _Row(text, mode, "over_dense_mode", lambda run: _over(loss(run), in_dense_mode(run)))


def _scored(text: str, k: int | None = None) -> Get:
    return lambda run: run.evaluation.loss_on(text, k)


def _scored_by_oracle(k: int) -> Get:
    return lambda run: dict(run.evaluation.oracle_curve).get(k)


def _over(loss: float | None, other: float | None) -> float | None:
    """How much higher a perplexity is than another, as a share of that; from their losses."""
    return None if loss is None or other is None else perplexity(loss - other) - 1
