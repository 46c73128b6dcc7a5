"""Sends runs and reports to MLflow, from their files."""

import json
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ssd_lit.config import RunConfig, load_run
from ssd_lit.stages import MEASUREMENTS
from ssd_lit.tracking.metrics_log import points_from
from ssd_lit.tracking.models import log_models
from ssd_lit.tracking.spool import Spool
from ssd_lit.tracking.store import artifact_place, connect, masked, reason, store_name, tracking_uri
from ssd_lit.tracking.view import VIEW_TAG, chart_view, shown_as

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

log = logging.getLogger(__name__)

BATCH = 1000  # the largest number of metrics that MLflow accepts in one request
REPORT_SECONDS = 60.0
KEY, PARENT, TABLES = "ssd_lit.key", "mlflow.parentRunId", "mlflow.loggedArtifacts"


class Delivery:
    """Sends a run's spool to MLflow. Every method may be repeated, because a response may be lost."""

    def __init__(self, client: "MlflowClient", results: Path, config: RunConfig, spool: Spool):
        self._client = client
        self._results = results
        self._config = config
        self._spool = spool
        self._experiment = ""

    @property
    def run_id(self) -> str:
        assert self._spool.record.run_id is not None
        return self._spool.record.run_id

    def connect(self) -> None:
        """Find the run or create it, and log its settings, tags and data set."""
        client, spool, record = self._client, self._spool, self._spool.record
        with FileLock(self._results / ".mlflow.lock"):
            self._experiment = _experiment(client, self._results, self._config.experiment, record.question)
        run = _find_or_create(client, self._experiment, record.key, record.tags, record.run_id)
        spool.attach(run.info.run_id, self._experiment, store_name())
        self._set_aside_superseded()
        _log_new(client, run, self._config, record.tags)
        inputs = run.inputs.dataset_inputs if run.inputs else []
        if record.data_digest not in {data.dataset.digest for data in inputs}:
            with FileLock(self._results / ".mlflow.lock"):  # two runs of one data set would both create its row
                self._log_data()

    def begin(self, stage: str) -> None:
        """Mark the run and the stage's child run as running."""
        for run_id in (self.run_id, self._child(stage).info.run_id):
            self._client.update_run(run_id, status="RUNNING")
        self._client.set_tag(self.run_id, "stage", stage)

    def send_points(self) -> None:
        """Send the points that are new."""
        from mlflow.entities import Metric

        while True:
            points, end = points_from(self._spool.points, self._spool.record.sent, BATCH)
            if not points:
                return
            metrics = [
                Metric(shown_as(name), value, point["time"], point["step"])
                for point in points
                for name, value in point["values"].items()
            ]
            for i in range(0, len(metrics), BATCH):
                # A point that is sent again, after a lost response or record, is the same row of the store.
                self._client.log_batch(self.run_id, metrics=metrics[i : i + BATCH])
            self._spool.update(sent=end)

    def send_endings(self) -> None:
        """Send the results of the stages that ended: their numbers, then their files."""
        ended = list(self._spool.record.ended.items())
        for stage, ending in ended:
            child = self._child(stage)
            _log_outcome(self._client, child, ending, step=0)
            if ending["run_step"] is not None:
                run = self._client.get_run(self.run_id)
                _log_outcome(self._client, run, {**ending, "tags": {}}, ending["run_step"])
            _log_curves(self._client, self.run_id, ending)
            for run_id in (child.info.run_id, self.run_id):
                self._client.set_terminated(run_id, ending["status"], ending["time"])
        for stage, ending in ended:
            self._send_files(stage, ending)
            if stage == "evaluate":
                log_models(
                    self._client, self._experiment, self.run_id, self._config, self._spool.folder, self._results,
                    ending,
                )  # fmt: skip
            self._spool.set_delivered(stage)

    def _send_files(self, stage: str, ending: Mapping[str, Any]) -> None:
        """Upload the run's settings, and what the stage measured."""
        for name in ("config.yaml", *MEASUREMENTS.get(stage, ())):
            path = self._spool.folder / name
            if path.exists():
                _upload(self._client, self.run_id, path, None)
        _log_tables(self._client, self.run_id, ending.get("tables", {}))

    def _child(self, stage: str) -> "MlflowRun":
        record = self._spool.record
        name = f"{self._config.name} {stage}"
        tags = {"stage": stage, PARENT: self.run_id, "mlflow.runName": name}
        child = _find_or_create(self._client, self._experiment, f"{record.key}/{stage}", tags, record.stages.get(stage))
        self._spool.update(stages={**record.stages, stage: child.info.run_id})
        return child

    def _set_aside_superseded(self) -> None:
        """Move the children that are kept to this run, and delete the replaced runs with their other children."""
        client, record = self._client, self._spool.record
        for old in record.superseded:
            if not _is_active(client, old):
                continue
            for child in record.stages.values():
                client.set_tag(child, PARENT, self.run_id)
            client.set_tag(old, "superseded_by", self.run_id)
            for stage in client.search_runs([self._experiment], f"tags.`{PARENT}` = '{old}'"):
                _delete(client, stage.info.run_id)
            _delete(client, old)
        if record.superseded:
            self._spool.update(superseded=[])

    def _log_data(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(
            name=self._config.data.name, digest=self._spool.record.data_digest, source_type="local",
            source=self._config.data.model_dump_json(include={"sources"}),
        )  # fmt: skip
        tag = InputTag(key="mlflow.data.context", value="training")
        self._client.log_inputs(self.run_id, [DatasetInput(data, [tag])])


def send_runs(results: Path, run_dirs: Iterable[Path]) -> int:
    """Send what is not sent yet of several runs; returns the number of runs that had anything.

    That is all of a run which the store does not have, because it was made anew. Skips a run whose stage is running,
    which sends it. Raises ValueError if MLflow is unreachable.
    """
    sent, client = 0, None
    for run_dir in run_dirs:
        if not Spool.exists(run_dir):
            continue
        try:
            client = client or connect(results)
            with FileLock(run_dir / ".lock", timeout=0):
                spool = Spool(run_dir)
                if not spool.waiting(store_name()) and _is_known(client, spool.record.run_id):
                    continue
                delivery = Delivery(client, results, load_run(run_dir / "config.yaml"), spool)
                delivery.connect()
                delivery.send_points()
                delivery.send_endings()
        except Timeout:
            continue
        except Exception as error:
            raise ValueError(f"MLflow at {masked(tracking_uri(results))}: {reason(error)}") from None
        sent += 1
    return sent


def send_report(
    results: Path,
    experiment: str,
    files: Mapping[str | None, Sequence[Path]],
    tables: Mapping[str, Mapping[str, Sequence[Any]]] | None = None,
    parent: str | None = None,
) -> None:
    """Upload files, by folder, and tables as artifacts of the experiment's one run named `report`.

    As a child of the run `parent` it does not show among the runs that charts draw. Raises ValueError if MLflow is
    unreachable.
    """
    try:
        client = connect(results)
        with FileLock(results / ".mlflow.lock"):
            experiment_id = _experiment(client, results, experiment)
            run = _find_or_create(client, experiment_id, "report", {"mlflow.runName": "report"}, None)
        if parent is not None and run.data.tags.get(PARENT) != parent:
            client.set_tag(run.info.run_id, PARENT, parent)
        for folder, paths in files.items():
            for path in paths:
                _upload(client, run.info.run_id, path, folder)
        _log_tables(client, run.info.run_id, tables or {})
        client.set_terminated(run.info.run_id)
    except Exception as error:
        raise ValueError(f"MLflow at {masked(tracking_uri(results))}: {reason(error)}") from None


def try_for(seconds: float, send: Callable[[], object]) -> str | None:
    """Run `send` for at most `seconds`; returns None, or why it failed.

    After that it runs on in a thread that ends with the process.
    """
    errors: list[str] = []

    def work() -> None:
        try:
            send()
        except ValueError as error:
            errors.append(str(error))

    thread = threading.Thread(target=work, name="mlflow", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return f"MLflow takes more than {seconds:.0f} s"
    return errors[0] if errors else None


def _experiment(client: "MlflowClient", results: Path, name: str, question: str = "") -> str:
    """The id of the experiment, found or created, with its chart view and its description."""
    from mlflow.exceptions import MlflowException

    tags = {VIEW_TAG: chart_view(), **({"mlflow.note.content": question} if question else {})}
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = tracking_uri(results).startswith("sqlite:")
        try:
            return str(client.create_experiment(name, artifact_place(results, name) if local else None, tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        # Made meanwhile by a process with another results folder, whose lock is another file.
        experiment = client.get_experiment_by_name(name)
        assert experiment is not None
    for key, value in tags.items():
        if experiment.tags.get(key) != value:
            client.set_experiment_tag(experiment.experiment_id, key, value)
    return str(experiment.experiment_id)


def _upload(client: "MlflowClient", run_id: str, path: Path, folder: str | None) -> None:
    try:
        client.log_artifact(run_id, str(path), folder)
    except Exception as error:
        raise OSError(f"{path.name} cannot be stored: {reason(error)}") from None


def _find_or_create(
    client: "MlflowClient", experiment: str, key: str, tags: Mapping[str, str], known: str | None
) -> "MlflowRun":
    """The run with the key: the `known` one, else the oldest, else a new one; deletes any others.

    Others come from requests that were executed but whose responses were lost.
    """
    runs = list(client.search_runs([experiment], f"tags.`{KEY}` = '{key}'", order_by=["attributes.start_time ASC"]))
    if not runs:
        return client.create_run(experiment, tags={**tags, KEY: key})
    chosen = next((run for run in runs if run.info.run_id == known), runs[0])
    for run in runs:
        if run is not chosen:
            _delete(client, run.info.run_id)
    return chosen


def _delete(client: "MlflowClient", run_id: str) -> None:
    """Delete a run. Leaves it if the user may only add: a server with accounts wants MANAGE for this, not EDIT."""
    from mlflow.exceptions import MlflowException

    try:
        client.delete_run(run_id)
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        log.warning("MLflow run %s is replaced, but stays: this user may not delete it", run_id)


def _is_active(client: "MlflowClient", run_id: str) -> bool:
    """Whether MLflow has the run, not deleted."""
    return _lifecycle(client, run_id) == "active"


def _is_known(client: "MlflowClient", run_id: str | None) -> bool:
    """Whether MLflow has the run, if there was one; one that was deleted there is not brought back."""
    return run_id is None or _lifecycle(client, run_id) is not None


def _lifecycle(client: "MlflowClient", run_id: str) -> str | None:
    """`active`, `deleted`, or None if MLflow does not have the run.

    `forbidden` on a server with accounts, also for a run that it does not have.
    """
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_run(run_id).info.lifecycle_stage)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED"):
            raise
        return "forbidden" if error.error_code == "PERMISSION_DENIED" else None


def _log_outcome(client: "MlflowClient", run: "MlflowRun", ending: Mapping[str, Any], step: int) -> None:
    """Log the results of a stage, except metrics whose latest value is the same: a repeated stage adds none."""
    from mlflow.entities import Metric, RunTag

    known = run.data.metrics
    shown = {shown_as(name): value for name, value in ending["metrics"].items()}
    fresh = {name: value for name, value in shown.items() if known.get(name) != value}
    client.log_batch(
        run.info.run_id,
        metrics=[Metric(name, value, ending["time"], step) for name, value in fresh.items()],
        tags=[RunTag(name, text) for name, text in ending["tags"].items()],
    )


def _log_curves(client: "MlflowClient", run_id: str, ending: Mapping[str, Any]) -> None:
    """Log the curves of a stage, except points that are the latest at their place: a repeated stage adds none."""
    from mlflow.entities import Metric

    for name, curve in ending.get("curves", {}).items():
        history = client.get_metric_history(run_id, shown_as(name))
        latest = {point.step: point.value for point in sorted(history, key=lambda point: point.timestamp)}
        points = [Metric(shown_as(name), y, ending["time"], x) for x, y in curve if latest.get(x) != y]
        if points:
            client.log_batch(run_id, metrics=points)


def _log_tables(client: "MlflowClient", run_id: str, tables: Mapping[str, Mapping[str, Sequence[Any]]]) -> None:
    """Log each table as MLflow's pages show one. Its own `log_table` would add rows to what is there."""
    for name, columns in tables.items():
        rows = [list(row) for row in zip(*columns.values(), strict=True)]
        client.log_dict(run_id, {"columns": list(columns), "data": rows}, f"{name}.json")
    if tables:
        known = json.loads(client.get_run(run_id).data.tags.get(TABLES, "[]"))
        fresh = [{"path": f"{name}.json", "type": "table"} for name in tables]
        client.set_tag(run_id, TABLES, json.dumps([*known, *(table for table in fresh if table not in known)]))


def _log_new(client: "MlflowClient", run: "MlflowRun", config: RunConfig, tags: Mapping[str, str]) -> None:
    """Log the settings that the run lacks, and the tags."""
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
