"""mlflow.json of a run: what MLflow has been told, what it is still to hear, and how the run is found there again."""

import threading
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ssd_lit.support.files import read_json, write_json
from ssd_lit.tracking.metrics_log import points_from


@dataclass
class Record:
    """The content of mlflow.json."""

    key: str
    """The tag by which the run is found again; written here before the run is made."""
    run_id: str | None = None
    sent: int = 0
    """Bytes of metrics.jsonl whose points have arrived."""
    stages: dict[str, str] = field(default_factory=dict)
    """Ids of the stages' child runs."""
    superseded: list[str] = field(default_factory=list)
    """Ids of runs that this one replaces."""
    tags: dict[str, str] = field(default_factory=dict)
    """Those of the run, as of its latest stage."""
    data_digest: str = ""
    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What stages came to that MLflow does not know yet: status, time (ms since 1970), metrics, tags, run_step."""


class Spool:
    """The record of one run and its points. Two threads may work with it: what one has written, the other keeps."""

    def __init__(self, run_dir: Path):
        self.points = run_dir / "metrics.jsonl"
        self._path = run_dir / "mlflow.json"
        self._lock = threading.RLock()
        known = read_json(self._path) if self._path.exists() else {"key": uuid.uuid4().hex}
        self.record = Record(**known)

    @staticmethod
    def exists(run_dir: Path) -> bool:
        """Whether a stage of the run has begun."""
        return (run_dir / "mlflow.json").exists()

    def update(self, **changes: Any) -> None:
        """Set fields of the record and write it."""
        with self._lock:
            for name, value in changes.items():
                setattr(self.record, name, value)
            self._save()

    def supersede(self, kept: Collection[str]) -> None:
        """Begin a new run, which takes over the stages that are `kept`."""
        with self._lock:
            old = self.record
            self.update(
                key=uuid.uuid4().hex, run_id=None, sent=0,
                superseded=[*old.superseded, *([] if old.run_id is None else [old.run_id])],
                stages={name: child for name, child in old.stages.items() if name in kept},
                ended={name: ending for name, ending in old.ended.items() if name in kept},
            )  # fmt: skip

    def end(
        self, stage: str, status: str, metrics: Mapping[str, float], tags: Mapping[str, str], run_step: int | None
    ) -> None:
        """Keep what a stage came to; with `run_step` its metrics are those of the run at that step as well."""
        now = time.time_ns() // 1_000_000
        ending = {"status": status, "time": now, "metrics": dict(metrics), "tags": dict(tags), "run_step": run_step}
        with self._lock:
            self.update(ended={**self.record.ended, stage: ending})

    def told(self, stage: str) -> None:
        """Forget the ending of a stage, which has arrived."""
        with self._lock:
            self.update(ended={name: ending for name, ending in self.record.ended.items() if name != stage})

    def waiting(self) -> str | None:
        """What has not arrived yet, in words; None if all has."""
        points, _ = points_from(self.points, self.record.sent)
        count = sum(len(point["values"]) for point in points)
        if count:
            return f"{count:,} points"
        return "the end of a stage" if self.record.ended or self.record.superseded else None

    def _save(self) -> None:
        write_json(self._path, asdict(self.record))
