"""MLflow, known to this file only, and imported when it is needed only.

Points go to the run's metrics.jsonl first. A thread takes them from there to MLflow in batches, remembering how
far it came; with the server away they wait in the file, and training never does.
"""

import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock

from ssd_lit.config import RunConfig
from ssd_lit.files import read_json, whole_file, write_json
from ssd_lit.points import PointLog, drop_points_after, points_from
from ssd_lit.stopping import Stopped

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

BATCH = 1000  # the largest number of metrics that MLflow takes in one request
SEND_SECONDS = 3.0
LONGEST_WAIT = 60.0
CLOSE_SECONDS = 15.0
KEY, PARENT = "ssd_lit.key", "mlflow.parentRunId"

# Read by MLflow itself. By default it retries for minutes, and reports its use to its makers.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}.items():
    os.environ.setdefault(_name, _value)


def tracking_uri(results: Path) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite store under results/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.resolve() / 'mlflow.db'}"


def masked(uri: str) -> str:
    """A URI, or text with one in it, without the password or token that it may carry, for people to read."""
    return re.sub(r"://([^/\s:@]*:)\S*@", r"://\1***@", re.sub(r"://[^/\s:@]+@", "://***@", uri))


def ensure_store(results: Path) -> None:
    """Make the local store, once, before several processes use it; a fresh one cannot be made by two at a time.

    It is made aside: MLflow cannot go on from one that it could not finish. Raises OSError if it cannot be made.
    """
    path = Path(tracking_uri(results).removeprefix("sqlite:///"))
    if not tracking_uri(results).startswith("sqlite:///") or path.exists():
        return
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / ".mlflow.lock"):
        if path.exists():
            return
        from mlflow import MlflowClient

        with whole_file(path) as part:
            try:
                MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
            except Exception as error:  # the database's own
                raise OSError(f"{path}: the MLflow store cannot be made: {_first_line(error)}") from None


class RunTracker:
    """The MLflow run of one of our runs, while a stage of it works.

    Use as a context manager. The run is found again by the id in mlflow.json, or by a key written there before
    the run was made; so is the stage's child run. `resume_step` is the step the stage starts from: points beyond
    it, of an earlier attempt that is now replaced, are dropped, and since MLflow cannot drop points its old run is
    set aside (deleted in its sense, tagged `superseded_by`) for a new one.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, results: Path, *, stage: str, data_digest: str, commit: str,
        resume_step: int | None = None,
    ):  # fmt: skip
        self._results = results
        self._config = config
        self._stage = stage
        self._tags = {
            "experiment": config.experiment, "arm": config.arm, "method": config.method, "seed": str(config.seed),
            "git_commit": commit, "phase": stage, "mlflow.runName": config.name,
        }  # fmt: skip
        self._data_digest = data_digest
        self._path = run_dir / "metrics.jsonl"
        self._book = _Book.open(run_dir / "mlflow.json")
        if resume_step is not None and drop_points_after(self._path, resume_step):
            self._book.supersede(stage)
        self._points = PointLog(self._path)
        self._metrics: dict[str, float] = {}
        self._stage_tags: dict[str, str] = {}
        self._run_step: int | None = None
        self._status = "FINISHED"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._monitor: Any = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; returns at once."""
        self._points.log(step, values)

    def outcome(
        self, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None, *, run_step: int | None = None
    ) -> None:
        """What the stage came to: for its child run, and with `run_step` for the run itself at that step."""
        self._metrics, self._stage_tags, self._run_step = dict(metrics), dict(tags or {}), run_step

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status = "FINISHED" if error is None else "KILLED" if isinstance(error, Stopped) else "FAILED"
        self._points.close()
        self._stop.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("MLflow does not answer; the points wait in %s", self._path)

    def _send_all(self) -> None:
        """The thread: connect, send what is new now and then, and once more at the end."""
        wait, connected, warned = SEND_SECONDS, False, False
        while True:
            last = self._stop.is_set()
            try:
                client = _client(self._results)
                if not connected:
                    self._connect(client)
                    connected = True
                self._send(client)
                if last:
                    self._conclude(client)
                wait = SEND_SECONDS
            except Exception as error:
                if not warned:
                    uri = masked(tracking_uri(self._results))
                    log.warning("MLflow at %s: %s; the points wait in %s", uri, _first_line(error), self._path)
                warned, wait = True, min(2 * wait, LONGEST_WAIT)
            if last:
                return
            self._stop.wait(wait)

    def _connect(self, client: "MlflowClient") -> None:
        book = self._book
        with FileLock(self._results / ".mlflow.lock"):
            experiment = _experiment(client, self._results, self._config.experiment)
        book.run_id = _find_or_create(client, experiment, book.run_id, book.key, self._tags)
        for name, value in self._tags.items():
            client.set_tag(book.run_id, name, value)
        client.set_terminated(book.run_id, "RUNNING")
        for old in book.superseded:
            for child in book.stages.values():
                client.set_tag(child, PARENT, book.run_id)
            client.set_tag(old, "superseded_by", book.run_id)
            for stage in client.search_runs([experiment], f"tags.`{PARENT}` = '{old}'"):
                client.delete_run(stage.info.run_id)
            client.delete_run(old)
        book.superseded.clear()
        book.save()
        _log_params(client, book.run_id, self._config)
        with FileLock(self._results / ".mlflow.lock"):  # two runs of one data set would both make its row
            self._log_data(client)
        child_tags = {
            "stage": self._stage,
            PARENT: book.run_id,
            "mlflow.runName": f"{self._config.name} {self._stage}",
        }
        child = _find_or_create(
            client, experiment, book.stages.get(self._stage), f"{book.key}/{self._stage}", child_tags
        )
        client.set_terminated(child, "RUNNING")
        book.stages[self._stage] = child
        book.save()
        self._watch_system()

    def _log_data(self, client: "MlflowClient") -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        assert self._book.run_id is not None
        data = Dataset(
            name=self._config.data.name, digest=self._data_digest, source_type="local",
            source=self._config.data.model_dump_json(include={"sources"}),
        )  # fmt: skip
        tag = InputTag(key="mlflow.data.context", value="training")
        client.log_inputs(self._book.run_id, [DatasetInput(data, [tag])])

    def _watch_system(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)
        self._monitor = SystemMetricsMonitor(
            self._book.run_id,
            sampling_interval=5,
            resume_logging=True,
            tracking_uri=tracking_uri(self._results),
        )
        self._monitor.start()

    def _send(self, client: "MlflowClient") -> None:
        from mlflow.entities import Metric

        assert self._book.run_id is not None

        points, end = points_from(self._path, self._book.sent)
        metrics = [
            Metric(name, value, point["time"], point["step"])
            for point in points
            for name, value in point["values"].items()
        ]
        for i in range(0, len(metrics), BATCH):
            # Sent twice, a point is the same row of the store: a kill before `save` adds nothing.
            client.log_batch(self._book.run_id, metrics=metrics[i : i + BATCH])
        if end != self._book.sent:
            self._book.sent = end
            self._book.save()

    def _conclude(self, client: "MlflowClient") -> None:
        if self._monitor is not None:
            self._monitor.finish()
            # What a stage shorter than the sampling interval has collected is sent too.
            self._monitor.publish_metrics(self._monitor.aggregate_metrics())
            self._monitor.mlflow_logger.flush()
        assert self._book.run_id is not None
        child = self._book.stages[self._stage]
        for name, text in self._stage_tags.items():
            client.set_tag(child, name, text)
        _log_once(client, child, self._metrics, step=0)
        if self._run_step is not None:
            _log_once(client, self._book.run_id, self._metrics, self._run_step)
        for run_id in (child, self._book.run_id):
            client.set_terminated(run_id, self._status)


class _Book:
    """mlflow.json: what must be known to find a run again and to go on sending."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self._path = path
        self.key: str = content["key"]
        self.run_id: str | None = content["run_id"]
        self.sent: int = content["sent"]
        self.stages: dict[str, str] = content["stages"]
        self.superseded: list[str] = content["superseded"]

    @classmethod
    def open(cls, path: Path) -> Self:
        if path.exists():
            return cls(path, read_json(path))
        fresh: dict[str, Any] = {"key": uuid.uuid4().hex, "run_id": None, "sent": 0, "stages": {}, "superseded": []}
        book = cls(path, fresh)
        book.save()
        return book

    def save(self) -> None:
        names = ("key", "run_id", "sent", "stages", "superseded")
        write_json(self._path, {name: getattr(self, name) for name in names})

    def supersede(self, stage: str) -> None:
        """Begin a new run, which takes over the stages before `stage`; by name, phases sort in their order."""
        if self.run_id is not None:
            self.superseded.append(self.run_id)
        self.key, self.run_id, self.sent = uuid.uuid4().hex, None, 0
        self.stages = {name: child for name, child in self.stages.items() if name < stage}
        self.save()


def log_report(results: Path, experiment: str, files: Iterable[Path], folder: str | None = None) -> None:
    """Keep files as artifacts of the experiment's one run named `report`; a warning if MLflow is away."""
    try:
        client = _client(results)
        with FileLock(results / ".mlflow.lock"):
            experiment_id = _experiment(client, results, experiment)
            run_id = _find_or_create(client, experiment_id, None, "report", {"mlflow.runName": "report"})
        for file in files:
            client.log_artifact(run_id, str(file), folder)
        client.set_terminated(run_id)
    except Exception as error:
        log.warning("MLflow at %s: %s; the report is not kept there", masked(tracking_uri(results)), _first_line(error))


def serve(results: Path, port: int) -> list[str]:
    """The command that serves the store and its UI on 127.0.0.1; sets what it needs in the environment."""
    # One worker and no job runner start in a third of the time and a sixth of the memory.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not an argument: everyone on the machine may read those, and a URI may hold a password.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = tracking_uri(results)
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--artifacts-destination", str(results.resolve() / "mlartifacts"),
    ]  # fmt: skip


def _client(results: Path) -> "MlflowClient":
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs a traceback for each error of the database that it raises, which we tell in a line.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri(results))


def _experiment(client: "MlflowClient", results: Path, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri(results).startswith("sqlite:")
    where = (results.resolve() / "mlartifacts" / name).as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=where))


def _find_or_create(
    client: "MlflowClient", experiment: str, run_id: str | None, key: str, tags: Mapping[str, str]
) -> str:
    from mlflow.exceptions import MlflowException

    if run_id is not None:
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    found = client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", max_results=1)
    if found:
        return str(found[0].info.run_id)
    return str(client.create_run(experiment, tags={**tags, KEY: key}).info.run_id)


def _log_once(client: "MlflowClient", run_id: str, metrics: Mapping[str, float], step: int) -> None:
    """Log metrics, but for those whose latest value it is already: a stage that ran twice adds no points."""
    known = client.get_run(run_id).data.metrics
    for name, value in metrics.items():
        if known.get(name) != value:
            client.log_metric(run_id, name, value, step=step)


def _log_params(client: "MlflowClient", run_id: str, config: RunConfig) -> None:
    from mlflow.entities import Param

    flat = dict(_flatten(config.model_dump()))
    known = client.get_run(run_id).data.params
    new = [Param(name, str(value)[:500]) for name, value in flat.items() if name not in known]
    if new:
        client.log_batch(run_id, params=new)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _first_line(error: Exception) -> str:
    # First masked, then cut: half a URI would not be known as one.
    return masked((str(error) or type(error).__name__).splitlines()[0])[:200]
