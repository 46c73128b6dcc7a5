"""MLflow, known to this file only, and imported when it is needed only.

Points go to the run's metrics.jsonl first, and what a stage came to into its mlflow.json. A thread takes both from
there to MLflow, remembering how far it came; with the server away they wait in the files, and training never does. A
stage waits at its end for CLOSE_SECONDS, or for CLOSE_SHARE of the time it took if that is more; what is left goes with
the next stage of the run, with the report, or with `ssd-lit send`.
"""

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from filelock import FileLock, Timeout

from ssd_lit.config import RunConfig, load_run
from ssd_lit.records import ALL_STAGES
from ssd_lit.support.files import whole_file
from ssd_lit.support.signals import Preempted
from ssd_lit.tracking.artifacts import artifact_place, follow_results
from ssd_lit.tracking.metrics_log import MetricsLog, drop_points_after, points_from
from ssd_lit.tracking.spool import Spool

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from ssd_lit.run import Run

log = logging.getLogger(__name__)

BATCH = 1000  # the largest number of metrics that MLflow takes in one request
SEND_SECONDS = 3.0
LONGEST_WAIT = 60.0
CLOSE_SECONDS, CLOSE_SHARE = 10.0, 0.02
REPORT_SECONDS = 60.0
KEY, PARENT = "ssd_lit.key", "mlflow.parentRunId"

# Read by MLflow itself. By default it retries for minutes; here the thread tries again, and first looks whether a
# request that got no answer was carried out. A slow server has half a minute for each. By default it also reports its
# use to its makers, and prints addresses into the stages' logs.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
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

        for left in path.parent.glob(f".{path.name}.*"):
            left.unlink()  # by one who was killed
        with whole_file(path) as part:
            try:
                MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
            except Exception as error:  # the database's own
                raise OSError(f"{path}: the MLflow store cannot be made: {_first_line(error)}") from None


class RunTracker:
    """The MLflow run of one of our runs, while a stage of it works.

    Use as a context manager. The run is found again by a key that mlflow.json held before the run was made; so is the
    stage's child run. `resume_step` is the step the stage starts from: points beyond it, of an earlier attempt that is
    now replaced, are dropped, and since MLflow cannot drop points its old run is set aside (deleted in its sense,
    tagged `superseded_by`) for a new one.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, results: Path, *, stage: str, data_digest: str, commit: str,
        resume_step: int | None = None,
    ):  # fmt: skip
        self._run_dir = run_dir
        self._results = results
        self._config = config
        self._stage = stage
        self._outbox = Spool(run_dir)
        if resume_step is not None and drop_points_after(self._outbox.points, resume_step):
            self._outbox.supersede(ALL_STAGES[: ALL_STAGES.index(stage)])
        tags = {
            "experiment": config.experiment, "arm": config.arm, "method": config.method, "seed": str(config.seed),
            "git_commit": commit, "stage": stage, "mlflow.runName": config.name,
        }  # fmt: skip
        self._outbox.update(tags=tags, data_digest=data_digest)
        self._points = MetricsLog(self._outbox.points)
        self._outcome: tuple[Mapping[str, float], Mapping[str, str], int | None] = ({}, {}, None)
        self._finished: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)

    @classmethod
    def of(cls, run: "Run", stage: str, resume_step: int | None = None) -> Self:
        """The tracker of a stage of a run."""
        from ssd_lit.support.provenance import git_commit

        return cls(
            run.folder, run.config, run.results,
            stage=stage, data_digest=run.tokens_digest[:36], commit=git_commit(), resume_step=resume_step,
        )  # fmt: skip

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record values at a step; returns at once."""
        self._points.log(step, values)

    def begin(self, stage: str) -> None:
        """The work that follows is of this stage."""
        if stage != self._stage:
            self._outbox.update(tags={**self._outbox.record.tags, "stage": stage})
            self._stage = stage

    def finish(self, stage: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> None:
        """A stage is done; what it came to is for its child run."""
        self._outbox.end(stage, "FINISHED", metrics, tags, None)
        self._finished.add(stage)

    def outcome(
        self, metrics: Mapping[str, float], tags: Mapping[str, str] | None = None, *, run_step: int | None = None
    ) -> None:
        """What the stage came to: for its child run, and with `run_step` for the run itself at that step."""
        self._outcome = metrics, tags or {}, run_step

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, Preempted) else "FAILED"
        try:
            self._points.close()
            if error is not None or self._stage not in self._finished:
                self._outbox.end(self._stage, status, *self._outcome)
        finally:
            self._stop.set()  # a full disk must not keep the thread going
        self._thread.join(max(CLOSE_SECONDS, CLOSE_SHARE * (time.monotonic() - self._began)))
        waiting = self._outbox.waiting()
        if waiting:
            log.warning(
                "MLflow has not got all of %s: %s wait for the next stage, or for `ssd-lit send %s`",
                self._config.name, waiting, self._run_dir,
            )  # fmt: skip

    def _send_all(self) -> None:
        """The thread: connect, send what is new now and then, and once more at the end."""
        wait, warned, shown = SEND_SECONDS, False, ""
        delivery: _Delivery | None = None
        system: _SystemWatch | None = None
        while True:
            last = self._stop.is_set()
            try:
                if delivery is None:
                    fresh = _Delivery(_client(self._results), self._results, self._config, self._outbox)
                    fresh.connect()
                    system, delivery = _SystemWatch(fresh.run_id, self._results), fresh
                if self._stage != shown:
                    delivery.begin(self._stage)
                    shown = self._stage
                delivery.send_points()
                if last:
                    delivery.send_endings()
                    if system is not None:
                        system.finish()
                wait = SEND_SECONDS
            except Exception as error:
                if not warned and not last:
                    uri = masked(tracking_uri(self._results))
                    log.warning("MLflow at %s: %s; what there is to send waits in files", uri, _first_line(error))
                warned, wait = True, min(2 * wait, LONGEST_WAIT)
            if last:
                return
            self._stop.wait(wait)


class _Delivery:
    """Brings to MLflow what the spool of a run holds. Every step may be repeated: its answer may have been lost."""

    def __init__(self, client: "MlflowClient", results: Path, config: RunConfig, spool: Spool):
        self._client = client
        self._results = results
        self._config = config
        self._outbox = spool
        self._experiment = ""

    @property
    def run_id(self) -> str:
        assert self._outbox.record.run_id is not None
        return self._outbox.record.run_id

    def connect(self) -> None:
        """Find the run or make it, and tell what describes it."""
        client, spool, record = self._client, self._outbox, self._outbox.record
        with FileLock(self._results / ".mlflow.lock"):
            self._experiment = _experiment(client, self._results, self._config.experiment)
        run = _find_or_create(client, self._experiment, record.key, record.tags, record.run_id)
        if record.run_id != run.info.run_id:
            # A run that MLflow does not have any more, or another store: it is told everything.
            spool.update(run_id=run.info.run_id, sent=0)
        self._set_aside_superseded()
        _log_new(client, run, self._config, record.tags)
        known = run.inputs.dataset_inputs if run.inputs else []
        if record.data_digest not in {one.dataset.digest for one in known}:
            with FileLock(self._results / ".mlflow.lock"):  # two runs of one data set would both make its row
                self._log_data()

    def begin(self, stage: str) -> None:
        """Show the run and the stage's child run as running."""
        for run_id in (self.run_id, self._child(stage).info.run_id):
            self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(self.run_id, "stage", stage)

    def send_points(self) -> None:
        """Send the points that are new."""
        from mlflow.entities import Metric

        while True:
            points, end = points_from(self._outbox.points, self._outbox.record.sent, BATCH)
            if not points:
                return
            metrics = [
                Metric(name, value, point["time"], point["step"])
                for point in points
                for name, value in point["values"].items()
            ]
            for i in range(0, len(metrics), BATCH):
                # Sent twice, a point is the same row of the store: an answer or a record that is lost adds nothing.
                self._client.log_batch(self.run_id, metrics=metrics[i : i + BATCH])
            self._outbox.update(sent=end)

    def send_endings(self) -> None:
        """Tell what the stages came to that ended."""
        for stage, ending in list(self._outbox.record.ended.items()):
            child = self._child(stage)
            _log_outcome(self._client, child, ending, step=0)
            if ending["run_step"] is not None:
                run = self._client.get_run(self.run_id)
                _log_outcome(self._client, run, {**ending, "tags": {}}, ending["run_step"])
            for run_id in (child.info.run_id, self.run_id):
                self._client.set_terminated(run_id, ending["status"], ending["time"])
            self._outbox.told(stage)

    def _child(self, stage: str) -> "MlflowRun":
        record = self._outbox.record
        name = f"{self._config.name} {stage}"
        tags = {"stage": stage, PARENT: self.run_id, "mlflow.runName": name}
        child = _find_or_create(self._client, self._experiment, f"{record.key}/{stage}", tags, record.stages.get(stage))
        self._outbox.update(stages={**record.stages, stage: child.info.run_id})
        return child

    def _set_aside_superseded(self) -> None:
        """Hand the children of replaced runs over, and delete those runs with the children that are left to them."""
        client, record = self._client, self._outbox.record
        for old in record.superseded:
            if not _is_active(client, old):
                continue
            for child in record.stages.values():
                client.set_tag(child, PARENT, self.run_id)
            client.set_tag(old, "superseded_by", self.run_id)
            for stage in client.search_runs([self._experiment], f"tags.`{PARENT}` = '{old}'"):
                client.delete_run(stage.info.run_id)
            client.delete_run(old)
        if record.superseded:
            self._outbox.update(superseded=[])

    def _log_data(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=self._config.data.name, digest=self._outbox.record.data_digest, source_type="local",
            source=self._config.data.model_dump_json(include={"sources"}),
        )  # fmt: skip
        tag = InputTag(key="mlflow.data.context", value="training")
        self._client.log_inputs(self.run_id, [DatasetInput(data, [tag])])


class _SystemWatch:
    """MLflow's own sampling of processor, memory and GPU; what a server that is away misses of it is not kept."""

    def __init__(self, run_id: str, results: Path):
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
        self._monitor = SystemMetricsMonitor(
            run_id, sampling_interval=5, resume_logging=True, tracking_uri=tracking_uri(results)
        )
        self._monitor.start()

    def finish(self) -> None:
        """End the sampling; what a stage shorter than the sampling interval has collected is sent too."""
        self._monitor.finish()
        self._monitor.publish_metrics(self._monitor.aggregate_metrics())
        self._monitor.mlflow_logger.flush()


def send_runs(results: Path, run_dirs: Iterable[Path]) -> int:
    """Send what waits in runs, however long it takes; returns how many runs had anything.

    A run that a stage works on is left to that stage. Raises ValueError if MLflow is away.
    """
    sent = 0
    for run_dir in run_dirs:
        if not Spool.exists(run_dir) or not Spool(run_dir).waiting():
            continue
        try:
            with FileLock(run_dir / ".lock", timeout=0):
                delivery = _Delivery(_client(results), results, load_run(run_dir / "config.yaml"), Spool(run_dir))
                delivery.connect()
                delivery.send_points()
                delivery.send_endings()
        except Timeout:
            continue
        except Exception as error:
            raise ValueError(f"MLflow at {masked(tracking_uri(results))}: {_first_line(error)}") from None
        sent += 1
    return sent


def send_report(results: Path, experiment: str, files: Mapping[str | None, Sequence[Path]]) -> None:
    """Keep files, by folder, as artifacts of the experiment's one run named `report`.

    Raises ValueError if MLflow is away.
    """
    try:
        client = _client(results)
        with FileLock(results / ".mlflow.lock"):
            experiment_id = _experiment(client, results, experiment)
            run = _find_or_create(client, experiment_id, "report", {"mlflow.runName": "report"}, None)
        for folder, paths in files.items():
            for path in paths:
                client.log_artifact(run.info.run_id, str(path), folder)
        client.set_terminated(run.info.run_id)
    except Exception as error:
        raise ValueError(f"MLflow at {masked(tracking_uri(results))}: {_first_line(error)}") from None


def try_for(seconds: float, send: Callable[[], object]) -> str | None:
    """Send for at most so long; None if all went, or why not. What goes on after that ends with the process."""
    failed: list[str] = []

    def work() -> None:
        try:
            send()
        except ValueError as error:
            failed.append(str(error))

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"MLflow takes more than {seconds:.0f} s"
    return failed[0] if failed else None


def serve(results: Path, port: int) -> list[str]:
    """The command that serves the store and its UI on 127.0.0.1; sets what it needs in the environment."""
    # One worker and no job runner start in a third of the time and a sixth of the memory.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not an argument: everyone on the machine may read those, and a URI may hold a password.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = _store_uri(results)
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

    return MlflowClient(_store_uri(results))


def _store_uri(results: Path) -> str:
    """The tracking URI, to be used at once: our own store knows by then where the results lie."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        follow_results(results)
    return tracking_uri(results)


def _experiment(client: "MlflowClient", results: Path, name: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    local = tracking_uri(results).startswith("sqlite:")
    where = artifact_place(results, name) if local else None
    return str(client.create_experiment(name, artifact_location=where))


def _find_or_create(
    client: "MlflowClient", experiment: str, key: str, tags: Mapping[str, str], known: str | None
) -> "MlflowRun":
    """The run that carries the key: the `known` one, else the oldest, else a new one; any others are deleted.

    Others were made by requests that were carried out although their answers never came.
    """
    found = list(client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", order_by=["attributes.start_time ASC"]))
    if not found:
        return client.create_run(experiment, tags={**tags, KEY: key})
    kept = next((run for run in found if run.info.run_id == known), found[0])
    for twin in found:
        if twin is not kept:
            client.delete_run(twin.info.run_id)
    return kept


def _is_active(client: "MlflowClient", run_id: str) -> bool:
    """Whether MLflow has the run, and not as a deleted one."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return False


def _log_outcome(client: "MlflowClient", run: "MlflowRun", ending: Mapping[str, Any], step: int) -> None:
    """Log what a stage came to, but for metrics whose latest value it is already: a stage that ran twice adds none."""
    from mlflow.entities import Metric, RunTag

    known = run.data.metrics
    fresh = {name: value for name, value in ending["metrics"].items() if known.get(name) != value}
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, ending["time"], step) for name, value in fresh.items()],
        tags=[RunTag(name, text) for name, text in ending["tags"].items()],
    )


def _log_new(client: "MlflowClient", run: "MlflowRun", config: RunConfig, tags: Mapping[str, str]) -> None:
    """Log the settings that the run has not got yet, and the tags."""
    from mlflow.entities import Param, RunTag

    flat = dict(_flatten(config.model_dump()))
    params = [Param(name, str(value)[:500]) for name, value in flat.items() if name not in run.data.params]
    client.log_batch(run.info.run_id, params=params, tags=[RunTag(name, text) for name, text in tags.items()])


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flatten(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", inner


def _first_line(error: Exception) -> str:
    # First masked, then cut: half a URI would not be known as one.
    return masked((str(error) or type(error).__name__).splitlines()[0])[:200]
