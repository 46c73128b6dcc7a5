"""The tracker of a run's stages. Only this package uses MLflow, and imports it where it is needed.

Points are written to the run's metrics.jsonl, and results of stages to its mlflow.json. A thread sends both to MLflow
and records its progress; if the server is unreachable they wait in the files, without delaying training. At its end a
stage waits for the thread for CLOSE_SECONDS, or for CLOSE_SHARE of its run time if that is more; the rest is sent by
the run's next stage, by the report, or by `ssd-lit send`.
"""

import getpass
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ssd_lit.config import RunConfig
from ssd_lit.stages import ALL_STAGES
from ssd_lit.support.signals import Preempted
from ssd_lit.tracking.delivery import Delivery
from ssd_lit.tracking.metrics_log import MetricsLog, drop_points_after
from ssd_lit.tracking.spool import Outcome, Spool
from ssd_lit.tracking.store import connect, masked, reason, store_name, tracking_uri

log = logging.getLogger(__name__)

SEND_SECONDS = 3.0
LONGEST_WAIT = 60.0
CLOSE_SECONDS, CLOSE_SHARE = 10.0, 0.02


@dataclass(frozen=True)
class About:
    """What MLflow shows of a run beside its numbers."""

    description: str
    colour: str
    """Of its curves, as #RRGGBB."""
    question: str
    """What the experiment asks."""


class RunTracker:
    """Tracks a stage of a run in MLflow; a context manager.

    The MLflow run and the stage's child run are found again by a key, written to mlflow.json before they are created.
    `resume_step` is the step the stage starts from: points after it, of an earlier attempt, are dropped. Since MLflow
    cannot drop points, its old run is replaced by a new one (deleted in MLflow's sense, tagged `superseded_by`).
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, results: Path, *, stage: str, data_digest: str, commit: str,
        resume_step: int | None = None, about: About | None = None,
    ):  # fmt: skip
        self._run_dir = run_dir
        self._results = results
        self._config = config
        self._stage = stage
        self._spool = Spool(run_dir)
        if resume_step is not None and drop_points_after(self._spool.points, resume_step):
            self._spool.supersede(ALL_STAGES[: ALL_STAGES.index(stage)])
        tags = {
            "experiment": config.experiment, "arm": config.arm, "method": config.method, "seed": str(config.seed),
            "git_commit": commit, "stage": stage, "mlflow.runName": config.name, **_origin(commit),
        }  # fmt: skip
        if about is not None:
            tags |= {"mlflow.note.content": about.description, "mlflow.runColor": about.colour}
            self._spool.update(question=about.question)
        self._spool.update(tags=tags, data_digest=data_digest)
        self._points = MetricsLog(self._spool.points)
        self._outcome = Outcome()
        self._finished: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; returns at once."""
        self._points.log(step, values)

    def begin(self, stage: str) -> None:
        """Set the stage of the work that follows."""
        if stage != self._stage:
            self._spool.update(tags={**self._spool.record.tags, "stage": stage})
            self._stage = stage

    def finish(self, stage: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """End a stage; its metrics and tags go to its child run."""
        self._spool.end(stage, "FINISHED", Outcome(metrics, tags))
        self._finished.add(stage)

    def outcome(
        self, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None, *, run_step: int | None = None,
        curves: Mapping[str, Sequence[tuple[int, float]]] | None = None,
        tables: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    ) -> None:  # fmt: skip
        """Set the stage's results: see `Outcome`."""
        self._outcome = Outcome(metrics, tags or {}, run_step, curves or {}, tables or {})

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        # MLflow imports it, and while it is being imported no thread can ask for the version of a package.
        import_module("importlib_metadata")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, Preempted) else "FAILED"
        try:
            self._points.close()
            if error is not None or self._stage not in self._finished:
                self._spool.end(self._stage, status, self._outcome)
        finally:  # after an error too: a process that ends while the thread writes leaves half a file
            self._stop.set()
            self._thread.join(max(CLOSE_SECONDS, CLOSE_SHARE * (time.monotonic() - self._began)))
        waiting = self._spool.waiting(store_name())
        if waiting:
            log.warning(
                "%s: %s not sent to MLflow yet; the next stage sends them, or `ssd-lit send %s`",
                self._config.name, waiting, self._run_dir,
            )  # fmt: skip

    def _send_all(self) -> None:
        """The thread: connects, sends what is new every SEND_SECONDS, and once more at the end."""
        wait, warned, stage = SEND_SECONDS, False, ""
        delivery: Delivery | None = None
        system: _SystemWatch | None = None
        while True:
            last = self._stop.is_set()
            try:
                if delivery is None:
                    fresh = Delivery(connect(self._results), self._results, self._config, self._spool)
                    fresh.connect()
                    system, delivery = _SystemWatch(fresh.run_id, self._results), fresh
                if self._stage != stage:
                    delivery.begin(self._stage)
                    stage = self._stage
                delivery.send_points()
                if last:
                    delivery.send_endings()
                    if system is not None:
                        system.finish()
                wait = SEND_SECONDS
            except Exception as error:
                if not warned and not last:
                    uri = masked(tracking_uri(self._results))
                    log.warning("MLflow at %s: %s; points wait in files until it takes them", uri, reason(error))
                warned, wait = True, min(2 * wait, LONGEST_WAIT)
            if last:
                return
            self._stop.wait(wait)


def _origin(commit: str) -> dict[str, str]:
    """MLflow's own tags for who ran what: its pages have columns for them."""
    tags = {"mlflow.source.name": "ssd-lit", "mlflow.source.type": "LOCAL"}
    with suppress(OSError, KeyError):  # a container's user need not have a name
        tags["mlflow.user"] = getpass.getuser()
    if commit != "unknown":
        clean = commit.removesuffix("-dirty")
        tags |= {"mlflow.source.git.commit": clean, "mlflow.source.git.dirty": str(clean != commit)}
    return tags


class _SystemWatch:
    """MLflow's own sampling of processor, memory and GPU; samples are lost while the server is unreachable."""

    def __init__(self, run_id: str, results: Path):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=5, resume_logging=True, tracking_uri=tracking_uri(results)
        )
        self._monitor.start()

    def finish(self) -> None:
        """End the sampling, and send the samples of the last, incomplete interval."""
        self._monitor.finish()
        self._monitor.publish_metrics(self._monitor.aggregate_metrics())
        self._monitor.mlflow_logger.flush()
