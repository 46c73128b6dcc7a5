"""The records of a run: its phases, its totals and the stages that are done."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from ssd_lit.paths import checkpoint_path, phase_dir, phase_name, stage_path
from ssd_lit.support.files import (
    archive_digest,
    read_json,
    read_json_checked,
    size_of,
    write_json,
    write_json_checked,
)
from ssd_lit.support.signals import Preempted

FIRST_MODE = {"dense": "dense", "ssd": "dense", "sparse": "moefy", "upcycle": "moefy", "posthoc": "moefy"}
"""Mode of the first phase of each method."""


@dataclass(frozen=True)
class Totals:
    """What a run has spent, including the run that it started from."""

    steps: int = 0
    sparse_steps: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0

    def plus(self, spent: "Totals") -> "Totals":
        return Totals(**{name: value + getattr(spent, name) for name, value in vars(self).items()})


@dataclass(frozen=True)
class PhaseRecord:
    """phase.json: steps and costs of a phase, why it ended, and the next phase's mode."""

    index: int
    mode: str
    first_step: int
    """The run's own steps before the phase; those of the run that it started from are in `total` only."""
    last_step: int
    steps: int
    tokens: int
    flops: float
    seconds: float
    ended_by: str
    similarity: list[list[float]] = field(default_factory=list)
    """[global step, activation pattern similarity] of every check."""
    next: str | None = None
    """Mode of the next phase, None after the last."""
    total: Totals = Totals()
    inputs: dict[str, str | None] = field(default_factory=dict)
    """What the run is made from: see `Run.made_from`."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Code, packages, machine, seed: see `ssd_lit.support.provenance`."""

    @property
    def name(self) -> str:
        return phase_name(self.index, self.mode)

    def write(self, run_dir: Path) -> None:
        write_json_checked(phase_dir(run_dir, self.index, self.mode) / "phase.json", asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError if the file is missing, damaged or of another shape."""
        content = read_json_checked(path)
        try:
            return cls(**{**content, "total": Totals(**content["total"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a phase record ({error}); delete it and run again") from None


def read_phases(run_dir: Path, method: str) -> list[PhaseRecord]:
    """The recorded phases of a run in order, up to the first that is missing."""
    records: list[PhaseRecord] = []
    mode: str | None = FIRST_MODE[method]
    while mode is not None:
        path = phase_dir(run_dir, len(records), mode) / "phase.json"
        if not path.exists():
            break
        records.append(PhaseRecord.read(path))
        mode = records[-1].next
    return records


def read_chain(run_dir: Path, method: str) -> list[PhaseRecord]:
    """All phases of a run in order. Raises ValueError if one of them is not done."""
    records = read_phases(run_dir, method)
    missing = records[-1].next if records else FIRST_MODE[method]
    if missing is not None:
        path = phase_dir(run_dir, len(records), missing) / "phase.json"
        raise ValueError(f"{path}: not found; `ssd-lit train {run_dir}` trains the run to its end")
    return records


@dataclass(frozen=True)
class StageRecord:
    """stages/STAGE.json: a training stage that is done."""

    stage: str
    phase: int
    """Index of its last phase."""
    step: int
    weights: str
    """The digest of its checkpoint: see `archive_digest`."""
    size: int
    """Bytes of its checkpoint."""
    inputs: dict[str, str | None]
    """What the run is made from: see `Run.made_from`."""

    def write(self, path: Path) -> None:
        write_json_checked(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises ValueError if the file is missing, damaged or of another shape."""
        content = read_json_checked(path)
        try:
            return cls(**content)
        except TypeError as error:
            raise ValueError(f"{path}: not a stage record ({error}); delete it and run again") from None


@dataclass(frozen=True)
class Ending:
    """.ended: why the last call of a stage of a run came to no end; gone as soon as another begins."""

    how: Literal["failed", "stopped"]
    stage: str
    why: str
    when: str

    @classmethod
    def read(cls, run_dir: Path) -> Self | None:
        try:
            return cls(**read_json(run_dir / ".ended"))
        except (ValueError, TypeError):
            return None


@contextmanager
def noting_end(run_dir: Path, stage: str) -> Iterator[None]:
    """Leave an `Ending` in a run's folder if the work within is stopped or fails."""
    path = run_dir / ".ended"
    path.unlink(missing_ok=True)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, Preempted | KeyboardInterrupt)
        known = isinstance(error, Preempted | ValueError | OSError) and str(error)
        why = str(error) if known else f"{type(error).__name__}: {error}".rstrip(": ")
        ending = Ending("stopped" if stopped else "failed", stage, why, time.strftime("%Y-%m-%d %H:%M:%S"))
        with suppress(OSError):
            write_json(path, asdict(ending))
        raise


def close_stage(run_dir: Path, stage: str, record: PhaseRecord) -> None:
    """Write the record of a training stage; `record` is its last phase's, and its checkpoint must exist."""
    path = checkpoint_path(run_dir, stage)
    digest, size = archive_digest(path), size_of(path)
    StageRecord(stage, record.index, record.last_step, digest, size, record.inputs).write(stage_path(run_dir, stage))
