"""Where everything of an experiment lies under results/, and the chain of phases of a run.

results/data/<name>-<digest>/        documents/, tokenizer/, tokens/, config.yaml
results/<experiment>/                experiment.yaml, summary.csv, figures/, report.html
results/<experiment>/runs/<run>/     config.yaml, evaluation.yaml, metrics.jsonl, evaluation.json, analysis/
    phases/<NN>-<mode>/              last.ckpt, phase.json
    downstream/                      downstream.json, and pieces/ while it is made
    snapshots/                       step-<NNNNNNNN>.pt, if any are wanted
    work/<NN>-<mode>/                the phase at work, or the last one: its config, rolling.ckpt and previous.ckpt
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssd_lit.config import DataConfig, Experiment, RunConfig, dump, load_run
from ssd_lit.files import read_sealed, sha256, write_if_changed, write_sealed

FIRST_MODE = {"dense": "dense", "ssd": "dense", "sparse": "moefy", "upcycle": "moefy", "posthoc": "moefy"}
"""Mode of the first phase of each method."""


@dataclass(frozen=True)
class Totals:
    """What a run has spent, that of the run it started from included."""

    steps: int = 0
    sparse_steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class PhaseRecord:
    """phase.json: what a phase did, why it ended and what comes next."""

    index: int
    mode: str
    first_step: int
    """Steps of the run itself before the phase; those of a run it started from are in `total` only."""
    last_step: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    ended_by: str
    similarity: list[list[float]] = field(default_factory=list)
    """[global step, activation pattern similarity] of every check."""
    next: str | None = None
    """Mode of the phase that follows, None after the last."""
    total: Totals = Totals()
    weights: str = ""
    """SHA-256 of last.ckpt."""
    inputs: dict[str, str | None] = field(default_factory=dict)
    """What the phase was made from: see `phase_inputs`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Code, packages, machine, seed: see `ssd_lit.provenance`."""

    @property
    def name(self) -> str:
        return phase_name(self.index, self.mode)

    def write(self, path: Path) -> None:
        write_sealed(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "PhaseRecord":
        """Raises ValueError if the file is missing, damaged or of another shape."""
        content = read_sealed(path)
        try:
            return cls(**{**content, "total": Totals(**content["total"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a phase record ({error}); delete it and run again") from None


def phase_name(index: int, mode: str) -> str:
    """Folder name of a phase: its place in the run, then its mode."""
    return f"{index:02d}-{mode}"


def phase_dir(run_dir: Path, index: int, mode: str) -> Path:
    return run_dir / "phases" / phase_name(index, mode)


def work_dir(run_dir: Path, index: int, mode: str) -> Path:
    """Where a phase keeps what it needs to go on after an interruption; gone once the next stage begins."""
    return run_dir / "work" / phase_name(index, mode)


def rolling_checkpoint(run_dir: Path, index: int, mode: str) -> Path:
    """What a phase goes on from after an interruption."""
    return work_dir(run_dir, index, mode) / "rolling.ckpt"


def previous_checkpoint(rolling: Path) -> Path:
    """The rolling checkpoint before, for the case that the newest one is damaged."""
    return rolling.with_name("previous.ckpt")


def snapshot_path(run_dir: Path, step: int) -> Path:
    """The weights as they were after a step."""
    return run_dir / "snapshots" / f"step-{step:08d}.pt"


def snapshots(run_dir: Path) -> list[tuple[int, Path]]:
    """The snapshots of a run with their steps, in order."""
    return [(int(path.stem.removeprefix("step-")), path) for path in sorted((run_dir / "snapshots").glob("step-*.pt"))]


def read_chain(run_dir: Path, method: str, before: int | None = None) -> list[PhaseRecord]:
    """The phases of a run in order, each named by its predecessor; up to index `before`, or to the last.

    Raises ValueError when one of them is not done.
    """
    chain: list[PhaseRecord] = []
    mode: str | None = FIRST_MODE[method]
    while mode is not None and len(chain) != before:
        chain.append(PhaseRecord.read(phase_dir(run_dir, len(chain), mode) / "phase.json"))
        mode = chain[-1].next
    return chain


def weights_before(run_dir: Path, config: RunConfig, history: Sequence[PhaseRecord]) -> str | None:
    """SHA-256 of the checkpoint that the phase after `history` goes on from; None where that is the first weights.

    It is that of the phase before; for a first phase that of another run, where it starts from one.
    """
    if history:
        return history[-1].weights
    if config.shares_warmup is not None:
        return read_chain(run_dir.parent / config.shares_warmup, config.method, before=1)[0].weights
    if config.starts_from is not None:
        other = run_dir.parent / config.starts_from
        return read_chain(other, load_run(other / "config.yaml").method)[-1].weights
    return None


def phase_inputs(
    run_dir: Path, config: RunConfig, history: Sequence[PhaseRecord], tokens: str
) -> dict[str, str | None]:
    """What the phase after `history` is made from: SHA-256 of config and checkpoint before, the digest of all tokens.

    Where the run matches the FLOPs of another, also the other's final weights. Raises ValueError if a phase that it
    needs is not done.
    """
    inputs = {
        "config": sha256(run_dir / "config.yaml"),
        "tokens": tokens,
        "before": weights_before(run_dir, config, history),
    }
    if config.matches is not None:
        other = run_dir.parent / config.matches
        inputs["matched"] = read_chain(other, load_run(other / "config.yaml").method)[-1].weights
    return inputs


def measured_inputs(run_dir: Path, chain: Sequence[PhaseRecord], settings: str, tokens: str) -> dict[str, str]:
    """What a measurement of the final model is made from: its weights, the settings file of that name, the tokens."""
    return {"weights": chain[-1].weights, "settings": sha256(run_dir / settings), "tokens": tokens}


def data_dir(results: Path, data: DataConfig) -> Path:
    return results / "data" / f"{data.name}-{data.digest()}"


def run_dir(results: Path, run: RunConfig) -> Path:
    return results / run.experiment / "runs" / run.name


def write_configs(experiment: Experiment, results: Path) -> list[RunConfig]:
    """Give every run and data set its own resolved config file, touched only if its content changes.

    A measurement that the experiment does not ask for any more loses its settings; what it found stays.
    """
    runs = experiment.runs()
    write_if_changed(results / experiment.experiment / "experiment.yaml", dump(experiment))
    write_if_changed(data_dir(results, experiment.data) / "config.yaml", dump(experiment.data))
    evaluation = dump(experiment.evaluation)
    analysis = None if experiment.analysis is None else dump(experiment.analysis)
    tried = {run.name for run in experiment.tried_runs()}
    downstream = None if experiment.downstream is None else dump(experiment.downstream)
    for run in runs:
        write_if_changed(run_dir(results, run) / "config.yaml", dump(run))
        write_if_changed(run_dir(results, run) / "evaluation.yaml", evaluation)
        mine = downstream if run.name in tried else None
        for name, settings in (("analysis.yaml", analysis), ("downstream.yaml", mine)):
            if settings is None:
                (run_dir(results, run) / name).unlink(missing_ok=True)
            else:
                write_if_changed(run_dir(results, run) / name, settings)
    return runs
