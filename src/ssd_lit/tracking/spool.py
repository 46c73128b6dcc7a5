"""mlflow.json of a run: what has been sent to MLflow, what is still to be sent, and the run's key and ids there."""

import threading
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssd_lit.support.files import read_json, write_json
from ssd_lit.tracking.metrics_log import points_from


@dataclass
class Record:
    """The content of mlflow.json."""

    key: str
    """Tag that identifies the MLflow run; written here before the run is created."""
    run_id: str | None = None
    experiment: str = ""
    """Id of the MLflow experiment that holds the run."""
    sent: int = 0
    """Bytes of metrics.jsonl whose points have been sent."""
    stages: dict[str, str] = field(default_factory=dict)
    """Ids of the stages' child runs."""
    superseded: list[str] = field(default_factory=list)
    """Ids of runs that this one replaces."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of the run, as of its latest stage."""
    question: str = ""
    """What the experiment asks, shown on MLflow's page of it."""
    data_digest: str = ""
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of stages that are not sent yet: status, time (ms since 1970), and the fields of `Outcome`."""
    delivered: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Results of stages that have been sent, kept for another store."""
    store: str = ""
    """The store's name, to which they and the points have been sent."""


@dataclass(frozen=True)
class Outcome:
    """The results of a stage."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    run_step: int | None = None
    """The step at which the metrics are logged to the run too; None: to the stage's child run only."""
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    """For the run: by name, values over something that is no training step, such as k."""
    tables: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    """For the run: by name, the columns of a table."""


class Spool:
    """The record of one run and its points; thread-safe."""

    def __init__(self, run_dir: Path):
        self.folder = run_dir
        self.points = run_dir / "metrics.jsonl"
        self._path = run_dir / "mlflow.json"
        self._lock = threading.RLock()
        self.record = Record(**(read_json(self._path) if self._path.exists() else {"key": uuid.uuid4().hex}))

    @staticmethod
    def exists(run_dir: Path) -> bool:
        """Whether a stage of the run has begun."""
        return (run_dir / "mlflow.json").exists()

    def update(self, **changes: Any) -> None:
        """Set fields of the record and write it."""
        with self._lock:
            for name, value in changes.items():
                setattr(self.record, name, value)
            write_json(self._path, asdict(self.record))

    def supersede(self, kept: Collection[str]) -> None:
        """Replace the MLflow run by a new one, which takes over the stages that are `kept`."""
        with self._lock:
            old = self.record
            self.update(
                key=uuid.uuid4().hex, run_id=None, sent=0,
                superseded=[*old.superseded, *([] if old.run_id is None else [old.run_id])],
                stages={name: child for name, child in old.stages.items() if name in kept},
                ended={name: ending for name, ending in old.ended.items() if name in kept},
                delivered={name: ending for name, ending in old.delivered.items() if name in kept},
            )  # fmt: skip

    def attach(self, run_id: str, experiment: str, store: str) -> None:
        """Set the MLflow run that takes what is sent; all points go to one that is new, and the results of all stages.

        Not the results that were sent before, if it replaces another run: it takes over that one's children.
        """
        with self._lock:
            old, place = self.record, {"run_id": run_id, "experiment": experiment, "store": store}
            if run_id == old.run_id:
                self.update(**place)
            elif old.superseded and old.store == store:
                self.update(**place, sent=0)
            else:
                self.update(**place, sent=0, ended={**old.delivered, **old.ended}, delivered={})

    def end(self, stage: str, status: str, outcome: Outcome) -> None:
        """Record the results of a stage."""
        ending = {"status": status, "time": time.time_ns() // 1_000_000, **asdict(outcome)}
        with self._lock:
            self.update(ended={**self.record.ended, stage: ending})

    def set_delivered(self, stage: str) -> None:
        """Count the results of a stage as sent."""
        with self._lock:
            ended, delivered = dict(self.record.ended), dict(self.record.delivered)
            delivered.pop(stage, None)  # to its end: the last stage decides the run's status
            self.update(delivered={**delivered, stage: ended.pop(stage)}, ended=ended)

    def waiting(self, store: str) -> str | None:
        """A description of what is not sent yet to the store of that name; None if all is."""
        if self.record.store not in ("", store):
            return "points and results"
        points, _ = points_from(self.points, self.record.sent)
        count = sum(len(point["values"]) for point in points)
        if count:
            return f"{count:,} points"
        return "results of a stage" if self.record.ended or self.record.superseded else None
