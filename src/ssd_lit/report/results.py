"""What the runs of an experiment left behind, read from files: their records, and one table of their numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ssd_lit.config import ModelConfig, RunConfig
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.records import PhaseRecord, Totals, read_chain
from ssd_lit.support.files import check_digests, read_json_checked
from ssd_lit.tracking.metrics_log import read_metrics

Points = list[tuple[int, float]]
Array = np.ndarray[Any, np.dtype[np.float64]]

RUN = ["run", "arm", "seed"]
"""Columns that name a run in the tables of curves and analyses."""


@dataclass(frozen=True)
class HeldOut:
    """What a final model scores on another text; losses are nats per target."""

    loss_dense: float | None
    curve: tuple[tuple[int, float], ...]
    """(k, loss in sparse mode with k experts)."""
    blocks: int
    """How many were scored, from its beginning."""


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: what the final model scores; losses are nats per target."""

    loss_dense: float | None
    """None where the experts are copies."""
    loss_sparse: float | None
    """None for a model that was never given experts."""
    experts: int | None
    top_k: int | None
    curve: tuple[tuple[int, float], ...]
    """(k, loss in sparse mode with k experts)."""
    oracle_curve: tuple[tuple[int, float], ...]
    """The same, were the best k experts chosen."""
    threshold_curve: tuple[tuple[float, float, float], ...]
    """(threshold, mean k, loss), where every token takes as many experts as matter."""
    router: str | None
    """What chose the experts."""
    active_ratio: tuple[float, ...]
    """Fraction of the neurons above zero for a token, layer by layer."""
    active_neurons: float | None
    routing_recall: tuple[float, ...]
    """Fraction of the oracle's activation mass that the chosen experts hold, layer by layer."""
    blocks: int
    """Validation blocks on which all of this was measured."""
    split: str
    held_out: dict[str, HeldOut]
    """Losses on other texts, by name."""
    samples: tuple[dict[str, str], ...]
    """A prompt, and its continuation in each mode; none of models that do not predict the next token."""

    def loss_on(self, text: str, k: int | None = None) -> float | None:
        """The loss on the split or another text, in dense mode or in sparse mode with k experts; None if not scored."""
        scored = self if text == self.split else self.held_out[text]
        return scored.loss_dense if k is None else dict(scored.curve).get(k)

    def ks_on(self, text: str) -> list[int]:
        """The numbers of experts with which sparse mode was scored on the split or another text."""
        return [k for k, _ in (self.curve if text == self.split else self.held_out[text].curve)]

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Raises ValueError if the file is missing, cut short or of another shape."""
        content = read_json_checked(path)
        try:
            return cls(
                loss_dense=content["loss_dense"],
                loss_sparse=content["loss_sparse"],
                experts=content["experts"],
                top_k=content["top_k"],
                curve=_over_k(content["curve"]),
                oracle_curve=_over_k(content["oracle_curve"]),
                threshold_curve=tuple(
                    sorted((point["threshold"], point["mean_k"], point["loss"]) for point in content["threshold_curve"])
                ),
                router=content["router"],
                active_ratio=_as_tuple(content["active_ratio"]),
                active_neurons=content["active_neurons"],
                routing_recall=_as_tuple(content.get("routing_recall")),
                blocks=content["blocks"],
                split=content["split"],
                held_out={
                    name: HeldOut(scored["loss_dense"], _over_k(scored["curve"]), scored["blocks"])
                    for name, scored in content["held_out"].items()
                },
                samples=tuple(content.get("samples", ())),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not an evaluation ({error!r}); delete it and run again") from None


@dataclass(frozen=True)
class RunResult:
    """One finished run."""

    config: RunConfig
    chain: tuple[PhaseRecord, ...]
    points: dict[str, Points]
    """Curves over the global step; empty for a run that trains nothing itself."""
    evaluation: Evaluation
    folder: Path

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def arm(self) -> str:
        return self.config.arm

    @property
    def label(self) -> str:
        return self.config.label

    @property
    def total(self) -> Totals:
        """What the run has spent, the run it started from included."""
        return self.chain[-1].total

    @property
    def last_step(self) -> int:
        """The steps of the run itself."""
        return self.chain[-1].last_step

    @property
    def sparse_fraction(self) -> float:
        return self.total.sparse_steps / self.total.steps if self.total.steps else 0.0

    @property
    def trained(self) -> bool:
        """Whether the run took steps of its own."""
        return any(record.steps for record in self.chain)

    @property
    def is_cell(self) -> bool:
        """Whether the run is one cell of a grid."""
        return bool(self.config.grid)

    @property
    def serves_densely(self) -> bool:
        """Whether the model can be meant to run in dense mode: not where experts are copies or a gate weighs them."""
        return self.config.method != "upcycle" and self.evaluation.router != "gate"

    @property
    def ppl_dense(self) -> float | None:
        return perplexity_of(self.evaluation.loss_dense)

    @property
    def ppl_sparse(self) -> float | None:
        return perplexity_of(self.evaluation.loss_sparse)

    @property
    def ppl_oracle(self) -> float | None:
        """In sparse mode with the arm's k, were the experts with the largest activation mass chosen.

        None where experts are copies: their outputs are weighed, which an oracle that only chooses does not do.
        """
        if self.config.method == "upcycle":
            return None
        return perplexity_of(dict(self.evaluation.oracle_curve).get(self.config.moe.top_k))

    def tokens_at(self, steps: Sequence[float]) -> Array:
        """Tokens read at those steps of the run, those of a run it started from included."""
        return self._spent_at(steps, "train/tokens", lambda total: total.tokens)

    def flops_at(self, steps: Sequence[float]) -> Array:
        """FLOPs spent at those steps of the run, those of a run it started from included."""
        return self._spent_at(steps, "train/flops", lambda total: total.flops)

    def seconds_at(self, steps: Sequence[float]) -> Array:
        """Wall-clock seconds of training spent at those steps, those of a run it started from included."""
        return self._spent_at(steps, "train/seconds", lambda total: total.seconds)

    def _spent_at(self, steps: Sequence[float], curve: str, get: Callable[[Totals], float]) -> Array:
        """Straight lines between the recorded points and the ends of phases; where both are, the later end counts."""
        first = self.chain[0]
        known = {0: get(first.total) if not first.steps else 0.0} | dict(self.points.get(curve, []))
        known |= {record.last_step: get(record.total) for record in self.chain}
        at = sorted(known)
        return np.interp(steps, at, [known[step] for step in at])

    def sparse_spans(self) -> list[tuple[int, int]]:
        """First and last step of every sparse phase."""
        return [(record.first_step, record.last_step) for record in self.chain if record.mode == "sparse"]


def perplexity_of(loss: float | None) -> float | None:
    """The perplexity of a loss, None for none."""
    return None if loss is None else perplexity(loss)


def load_results(exp_dir: Path, runs: Sequence[RunConfig]) -> list[RunResult]:
    """Every run of the experiment, in the order given; raises ValueError naming the first file amiss."""
    return [_load(exp_dir / "runs" / run.name, run) for run in runs]


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The runs of each arm, arms in the order they first appear."""
    arms: dict[str, list[RunResult]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return arms


def run_frame(results: Sequence[RunResult]) -> pd.DataFrame:
    """All numbers of the runs that tables, CSVs and figures share, a row a run, indexed by its name.

    Steps, tokens, FLOPs and seconds include those of the run that it started from. A cell that does not apply is None;
    columns are of objects, so that a whole number stays whole where another row has none.
    """
    rows = [_row(result) for result in results]
    return pd.DataFrame(rows, index=[result.name for result in results], dtype=object)


def _row(result: RunResult) -> dict[str, Any]:
    config, total, evaluation = result.config, result.total, result.evaluation
    has_experts, recall = config.method != "dense", evaluation.routing_recall
    return {
        "experiment": config.experiment,
        "run": result.name,
        "arm": config.arm,
        "method": config.method,
        "model": model_name(config.model),
        "seed": config.seed,
        "steps": total.steps,
        "tokens": total.tokens,
        "sparse_fraction": result.sparse_fraction,
        "train_flops": total.flops,
        "train_seconds": total.seconds,
        "tokens_per_second": total.tokens / total.seconds,
        "val_loss_dense": evaluation.loss_dense,
        "val_loss_sparse": evaluation.loss_sparse,
        "val_ppl_dense": result.ppl_dense,
        "val_ppl_sparse": result.ppl_sparse,
        "val_ppl_oracle": result.ppl_oracle,
        "router": evaluation.router,
        "experts": config.moe.experts if has_experts else None,
        "top_k": config.moe.top_k if has_experts else None,
        "active_neurons": evaluation.active_neurons,
        "routing_recall": sum(recall) / len(recall) if recall else None,
        "worst_recall": min(recall, default=None),
    }


def model_name(model: ModelConfig) -> str:
    """The backbone and its shape in one word."""
    return f"{model.family}-L{model.layers}-D{model.d_model}-F{model.d_ff}"


def has_table(result: RunResult, name: str) -> bool:
    """Whether analysis/NAME.csv was written for the run."""
    return (result.folder / "analysis" / f"{name}.csv").is_file()


def read_table(result: RunResult, name: str) -> pd.DataFrame:
    """analysis/NAME.csv of a run, which it must have. Raises ValueError if it is not what the analysis wrote."""
    folder = result.folder / "analysis"
    check_digests(folder, {f"{name}.csv": read_json_checked(folder / "analysis.json")["digests"][f"{name}.csv"]})
    # A token may be called "NA", which is no missing number.
    return pd.read_csv(folder / f"{name}.csv", dtype={"token": str, "layer": str}, na_filter=False)


def joined(tables: Sequence[tuple[RunResult, pd.DataFrame]], columns: Sequence[str]) -> pd.DataFrame:
    """The tables of several runs one below the other, each row with its run, and with those columns."""
    named = [
        table.assign(run=result.name, arm=result.arm, seed=result.config.seed)[[*RUN, *columns]]
        for result, table in tables
    ]
    return pd.concat(named, ignore_index=True) if named else pd.DataFrame(columns=[*RUN, *columns])


def _load(run_dir: Path, run: RunConfig) -> RunResult:
    chain = read_chain(run_dir, run.method)
    evaluation = Evaluation.read(run_dir / "evaluation.json")
    points = {} if run.method == "posthoc" else _read_metrics(run_dir / "metrics.jsonl")
    return RunResult(run, tuple(chain), points, evaluation, run_dir)


def _read_metrics(path: Path) -> dict[str, Points]:
    """Curves by name; a step replayed after a resume counts once, with its last value."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    return {name: sorted(dict(points).items()) for name, points in read_metrics(path).items()}


def _over_k(curve: Sequence[dict[str, Any]]) -> tuple[tuple[int, float], ...]:
    return tuple(sorted((point["top_k"], point["loss"]) for point in curve))


def _as_tuple(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
