"""What a run left behind: its config, phases, curves and evaluation, read from files."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssd_lit.config import RunConfig
from ssd_lit.files import read_json
from ssd_lit.layout import PhaseRecord, Totals, read_chain
from ssd_lit.points import read_points

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Evaluation:
    """evaluation.json: what the final model scores; losses are nats per token."""

    loss_dense: float | None
    loss_sparse: float | None
    """None for a model that was never given experts."""
    experts: int | None
    top_k: int | None
    curve: tuple[tuple[int, float], ...]
    """(k, loss in sparse mode with k experts)."""
    active_ratio: tuple[float, ...]
    """Share of the neurons above zero for a token, layer by layer."""
    active_neurons: float | None
    routing_recall: tuple[float, ...]
    """Share of the active neurons that the chosen experts hold, layer by layer or one number for all."""
    tokens: int
    split: str

    @classmethod
    def read(cls, path: Path) -> "Evaluation":
        """Raises ValueError if the file is missing, cut short or of another shape."""
        content = read_json(path)
        try:
            return cls(
                loss_dense=content["loss_dense"],
                loss_sparse=content["loss_sparse"],
                experts=content["experts"],
                top_k=content["top_k"],
                curve=tuple(sorted((point["top_k"], point["loss"]) for point in content["curve"])),
                active_ratio=tuple(content["active_ratio"]),
                active_neurons=content["active_neurons"],
                routing_recall=_as_tuple(content.get("routing_recall")),
                tokens=content["tokens"],
                split=content["split"],
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
    def sparse_share(self) -> float:
        return self.total.sparse_steps / self.total.steps if self.total.steps else 0.0

    @property
    def trained(self) -> bool:
        """Whether the run took steps of its own."""
        return any(record.steps for record in self.chain)

    @property
    def ppl_dense(self) -> float | None:
        return perplexity(self.evaluation.loss_dense)

    @property
    def ppl_sparse(self) -> float | None:
        return perplexity(self.evaluation.loss_sparse)

    def flops_at(self, steps: Sequence[float]) -> "np.ndarray[Any, np.dtype[np.float64]]":
        """FLOPs spent at those steps: every step of a phase costs the same, so straight lines join its ends."""
        known = [(0, 0.0)] + [(record.total.steps, record.total.flops) for record in self.chain]
        return np.interp(steps, [step for step, _ in known], [flops for _, flops in known])

    def sparse_spans(self) -> list[tuple[int, int]]:
        """First and last step of every sparse phase."""
        return [(record.first_step, record.last_step) for record in self.chain if record.mode == "sparse"]


def perplexity(loss: float | None) -> float | None:
    """e to the loss; infinite where a float cannot hold it."""
    if loss is None:
        return None
    return math.exp(loss) if loss < 700 else math.inf


def load_results(exp_dir: Path, runs: Sequence[RunConfig]) -> list[RunResult]:
    """Every run of the experiment, in the order given; raises ValueError naming the first file amiss."""
    return [_load(exp_dir / "runs" / run.name, run) for run in runs]


def by_arm(results: Sequence[RunResult]) -> dict[str, list[RunResult]]:
    """The runs of each arm, arms in the order they first appear."""
    arms: dict[str, list[RunResult]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    return arms


def _load(run_dir: Path, run: RunConfig) -> RunResult:
    chain = read_chain(run_dir, run.method)
    evaluation = Evaluation.read(run_dir / "evaluation.json")
    points = {} if run.method == "posthoc" else _read_metrics(run_dir / "metrics.jsonl")
    return RunResult(run, tuple(chain), points, evaluation)


def _read_metrics(path: Path) -> dict[str, Points]:
    """Curves by name; a step replayed after a resume counts once, with its last value."""
    if not path.is_file():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    return {name: sorted(dict(points).items()) for name, points in read_points(path).items()}


def _as_tuple(value: Any) -> tuple[float, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
