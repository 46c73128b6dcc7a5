"""summary.csv and arms.csv, and the report's tables of routers, other texts and tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ssd_lit.config import RunConfig
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.report.arms import Arm, Measure, arms_of, cell, measure_of, reference_arm
from ssd_lit.report.formatting import percent
from ssd_lit.report.results import RunResult, by_arm, has_table, load_results, perplexity_of, read_table, run_frame
from ssd_lit.support.files import write_text

SUMMARY_COLUMNS = [
    "experiment", "arm", "method", "model", "seed", "steps", "tokens", "sparse_fraction", "train_flops",
    "train_seconds", "val_loss_dense", "val_loss_sparse", "val_ppl_dense", "val_ppl_sparse", "experts", "top_k",
    "active_neurons",
]  # fmt: skip
ARMS_COLUMNS = ["arm", "label", "text", "mode", "measure", "mean", "lowest", "highest", "seeds"]
COSTS = {
    "sparse_fraction": "sparse_fraction", "flops": "train_flops", "seconds": "train_seconds",
    "tokens_per_second": "tokens_per_second",
}  # fmt: skip
"""What training took: the measure in arms.csv, and its column of `run_frame`."""
ROUTER_COLUMNS = (
    ("routing recall, mean over layers", "routing_recall", percent),
    ("routing recall, worst layer", "worst_recall", percent),
    ("perplexity, own router", "val_ppl_sparse", None),
    ("perplexity, oracle", "val_ppl_oracle", None),
    ("perplexity, dense mode", "val_ppl_dense", None),
)
LINE_BREAK = "\u21b5 "
BUSIEST = 8
"""Experts shown of a layer, at most; those that no token chooses are left out."""


def write_summary(exp_dir: Path, runs: Sequence[RunConfig]) -> Path:
    """Write summary.csv for the finished runs, a row each; a cell that does not apply stays empty."""
    path = exp_dir / "summary.csv"
    write_text(path, _summary(exp_dir, runs))
    return path


def check_summary(exp_dir: Path, runs: Sequence[RunConfig]) -> None:
    """Raise ValueError if the rows of these runs in summary.csv are not what their own files give."""
    path = exp_dir / "summary.csv"
    if not path.is_file():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    there = path.read_bytes().decode("utf-8", "replace").splitlines()
    missing = [row for row in _summary(exp_dir, runs).splitlines() if row not in there]
    if missing:
        raise ValueError(f"{path}: has no row {missing[0]!r}, which the runs' files give; delete it and run again")


def _summary(exp_dir: Path, runs: Sequence[RunConfig]) -> str:
    frame = run_frame(load_results(exp_dir, runs))
    return frame[SUMMARY_COLUMNS].to_csv(index=False, lineterminator="\n")


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
    rows = [
        (arm.name, arm.label, *names, measure.mean, measure.low, measure.high, len(measure.values))
        for arm in arms
        for *names, measure in _arm_numbers(arm, reference_arm(arm, arms))
        if measure is not None
    ]
    path = exp_dir / "arms.csv"
    write_text(path, pd.DataFrame(rows, columns=ARMS_COLUMNS).to_csv(index=False, lineterminator="\n"))
    return path


def _arm_numbers(arm: Arm, reference: Arm | None) -> Iterator[tuple[str, str, str, Measure | None]]:
    """Text, mode, measure and its values."""
    for name, column in COSTS.items():
        yield "", "", name, arm.measure(column)
    references = {} if reference is None else {run.config.seed: run for run in reference.runs}
    for text, mode, losses in _losses(arm):
        in_dense_mode = [run.evaluation.loss_on(text) for run in arm.runs]
        of_reference = [
            references[run.config.seed].evaluation.loss_on(text) if run.config.seed in references else None
            for run in arm.runs
        ]
        yield text, mode, "perplexity", measure_of([perplexity_of(loss) for loss in losses])
        yield text, mode, "over_dense_arm", _over(losses, of_reference)
        if mode != "dense":
            yield text, mode, "over_dense_mode", _over(losses, in_dense_mode)


def _losses(arm: Arm) -> Iterator[tuple[str, str, list[float | None]]]:
    """Every text and mode in which the arm was scored, with the loss of each seed."""
    evaluations = [run.evaluation for run in arm.runs]
    split = evaluations[0].split
    for text in (split, *evaluations[0].held_out):
        yield text, "dense", [scored.loss_on(text) for scored in evaluations]
        for k in sorted({k for scored in evaluations for k in scored.ks_on(text)}):
            yield text, f"sparse, k {k}", [scored.loss_on(text, k) for scored in evaluations]
    if arm.runs[0].config.method == "upcycle":  # results of earlier versions have an oracle's, which means nothing
        return
    for k in sorted({k for scored in evaluations for k, _ in scored.oracle_curve}):
        yield split, f"oracle, k {k}", [dict(scored.oracle_curve).get(k) for scored in evaluations]


def _over(losses: Sequence[float | None], others: Sequence[float | None]) -> Measure | None:
    """How much higher perplexities are than others, as a fraction of these; from their losses."""
    pairs = zip(losses, others, strict=True)
    return measure_of([None if a is None or b is None else perplexity(a - b) - 1 for a, b in pairs])


def over_reference(arm: Arm, reference: Arm | None, loss_column: str) -> Measure | None:
    """How much higher perplexity is, by a column of losses, than the reference arm's of the same seed in dense mode."""
    if reference is None:
        return None
    dense = dict(zip(reference.rows["seed"], reference.rows["val_loss_dense"], strict=True))
    return _over(list(arm.rows[loss_column]), [dense.get(seed) for seed in arm.rows["seed"]])


def router_rows(arms: Sequence[Arm]) -> list[tuple[Arm, list[str]]]:
    """Every arm with a sparse mode, and its cells below the headings of ROUTER_COLUMNS: at the arm's k."""
    return [
        (arm, [cell(arm.measure(column), write) for _, column, write in ROUTER_COLUMNS])
        for arm in arms
        if arm.runs[0].evaluation.router is not None
    ]


class HeldOutTable(NamedTuple):
    """Perplexity on a text that no run was trained on."""

    name: str
    blocks: int
    """How many were scored, from the text's beginning."""
    ks: list[int]
    """Numbers of experts for which there is a column."""
    rows: list[tuple[Arm, list[str]]]
    """Every arm: dense mode, then sparse mode with each of `ks`, over its seeds."""


def held_out_tables(arms: Sequence[Arm]) -> list[HeldOutTable]:
    """A table for each text; empty if the experiment holds none out."""
    return [_held_out(name, arms) for name in arms[0].runs[0].evaluation.held_out]


def _held_out(text: str, arms: Sequence[Arm]) -> HeldOutTable:
    ks = sorted({k for arm in arms for run in arm.runs for k in run.evaluation.ks_on(text)})

    def scored(arm: Arm, k: int | None) -> str:
        return cell(arm.over(lambda run: perplexity_of(run.evaluation.loss_on(text, k))))

    blocks = arms[0].runs[0].evaluation.held_out[text].blocks
    return HeldOutTable(text, blocks, ks, [(arm, [scored(arm, k) for k in (None, *ks)]) for arm in arms])


class Sample(NamedTuple):
    """A prompt, and for each arm by its label the text with which it goes on in each mode."""

    prompt: str
    arms: list[tuple[str, list[tuple[str, str]]]]


def sample_texts(arms: Sequence[Arm]) -> list[Sample]:
    """What one run of each arm writes, prompt by prompt, line breaks made visible; empty if none wrote any."""
    samples: dict[str, Sample] = {}
    for arm in arms:
        for texts in arm.runs[0].evaluation.samples:
            prompt, *others = [(key, text.replace("\n", LINE_BREAK)) for key, text in texts.items()]
            samples.setdefault(prompt[1], Sample(prompt[1], [])).arms.append((arm.label, others))
    return list(samples.values())


@dataclass(frozen=True)
class TokenLift:
    """A token that chooses an expert more often than others do."""

    text: str
    lift: float
    seen: int
    count: int


class ExpertTokens(NamedTuple):
    """An expert, the fraction of tokens that choose it, and those with the highest lift."""

    layer: int
    expert: int
    load: float
    tokens: tuple[TokenLift, ...]


def token_tables(results: Sequence[RunResult]) -> list[tuple[RunResult, list[ExpertTokens]]]:
    """The busiest experts of the first and of the last layer, of one run of each arm that has them."""
    first = [runs[0] for runs in by_arm([result for result in results if has_table(result, "tokens")]).values()]
    return [(result, _busiest(read_table(result, "load"), read_table(result, "tokens"))) for result in first]


def _busiest(load: pd.DataFrame, tokens: pd.DataFrame) -> list[ExpertTokens]:
    load, tokens = load.astype({"layer": int}), tokens.astype({"layer": int})
    ends = load[load["layer"].isin([load["layer"].min(), load["layer"].max()]) & (load["load"] > 0)]
    busiest = ends.sort_values(["layer", "load", "expert"], ascending=[True, False, True]).groupby("layer")
    return [
        ExpertTokens(int(layer), int(expert), float(fraction), _tokens_of(tokens, int(layer), int(expert)))
        for layer, expert, fraction in busiest.head(BUSIEST)[["layer", "expert", "load"]].itertuples(index=False)
    ]


def _tokens_of(tokens: pd.DataFrame, layer: int, expert: int) -> tuple[TokenLift, ...]:
    own = tokens[(tokens["layer"] == layer) & (tokens["expert"] == expert)].sort_values("rank")
    rows = own[["token", "lift", "seen", "count"]].itertuples(index=False)
    return tuple(TokenLift(str(text), float(lift), int(seen), int(count)) for text, lift, seen, count in rows)
