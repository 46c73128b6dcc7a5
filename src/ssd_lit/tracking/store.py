"""The MLflow store: its address, creation, connection and server."""

import logging
import os
import re
import sqlite3
import sys
from contextlib import closing
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ssd_lit.support.files import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Read by MLflow. By default it retries for minutes; here the thread retries, after checking whether a request without
# a response was executed. A request may take half a minute. By default MLflow also sends telemetry, and prints URLs and
# what it is doing into the stages' logs; it sets its loggers' level where it is imported.
for _name, _value in {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)


def tracking_uri(results: Path) -> str:
    """MLFLOW_TRACKING_URI, or the sqlite store under results/."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{results.resolve() / 'mlflow.db'}"


def store_name() -> str:
    """What tells one store from another, without a password; the same for a results folder that moved."""
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    return re.sub(r"://\S*@", "://", uri).partition("?")[0].rstrip("/") if uri else "local"


def masked(uri: str) -> str:
    """A URI, or text that contains one, with its password or token masked."""
    return re.sub(r"://([^/\s:@]*:)\S*@", r"://\1***@", re.sub(r"://[^/\s:@]+@", "://***@", uri))


def ensure_store(results: Path) -> None:
    """Create the local store, if there is none, once for all processes that ask: two cannot create it at once.

    Created under a temporary name, because MLflow cannot complete a partial one. Raises OSError if that fails.
    """
    path = Path(tracking_uri(results).removeprefix("sqlite:///"))
    if not tracking_uri(results).startswith("sqlite:///") or path.exists():
        return
    results.mkdir(parents=True, exist_ok=True)
    with FileLock(results / ".mlflow.lock"):
        if path.exists():
            return
        from mlflow import MlflowClient

        for leftover in path.parent.glob(f".{path.name}.*"):
            leftover.unlink()  # of a killed process
        with whole_file(path) as part:
            try:
                MlflowClient(f"sqlite:///{part}").search_experiments(max_results=1)
            except Exception as error:  # of many types, from the database
                raise OSError(f"{path}: the MLflow store cannot be created: {first_line(error)}") from None


def serve(results: Path, port: int) -> list[str]:
    """The command that serves the store and its UI on 127.0.0.1; sets the environment variables that it needs."""
    # One worker and no job runner start in a third of the time and a sixth of the memory.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    # Not an argument: every user of the machine can read those, and a URI may hold a password.
    os.environ["MLFLOW_BACKEND_STORE_URI"] = ready_store(results)
    return [
        sys.executable, "-m", "mlflow", "server",
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--artifacts-destination", str(results.resolve() / "mlartifacts"),
    ]  # fmt: skip


def connect(results: Path) -> "MlflowClient":
    """A client of the store, which is created if there is none."""
    # MLflow logs a traceback for each database error that it raises, which is reported in one line instead.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    return MlflowClient(ready_store(results))


def ready_store(results: Path) -> str:
    """The tracking URI, after creating a local store or updating its artifact locations."""
    ensure_store(results)
    follow_results(results)
    return tracking_uri(results)


def first_line(error: Exception) -> str:
    # Masked before it is cut: half a URI would not be recognised.
    return masked((str(error) or type(error).__name__).splitlines()[0])[:200]


def reason(error: Exception) -> str:
    """Why MLflow did not do what was asked, in one line without a password."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
    else:  # an upload's error, from the requests library
        status = getattr(getattr(error, "response", None), "status_code", None)
    if status == HTTPStatus.UNAUTHORIZED:
        return "user or password missing or wrong; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status == HTTPStatus.FORBIDDEN:
        return "this user has no permission there; the experiment's owner or an administrator can grant EDIT"
    return first_line(error)


def artifact_place(results: Path, experiment: str) -> str:
    """The URI of the folder that holds an experiment's artifacts."""
    return (results.resolve() / "mlartifacts" / experiment).as_uri()


LOCATIONS = (
    ("runs", "artifact_uri"), ("logged_models", "artifact_location"), ("model_versions", "source"),
    ("model_versions", "storage_location"),
)  # fmt: skip
"""Where MLflow's tables hold places of artifacts below an experiment's."""


def follow_results(results: Path) -> None:
    """Update the artifact locations in the local store, if there is one, to the current results folder.

    MLflow stores absolute paths. After a move they point nowhere, and in a copy to the original.
    """
    store, here = results.resolve() / "mlflow.db", results.resolve().as_uri()
    if os.environ.get("MLFLOW_TRACKING_URI") or not store.exists():
        return
    with closing(sqlite3.connect(store, timeout=60)) as connection, connection:
        experiments = connection.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for number, name, old in experiments:
            new = artifact_place(results, name)
            if old == new or not old.endswith(new.removeprefix(here)):
                continue
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (new, number))
            for table, column in LOCATIONS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (new, len(old) + 1, len(old) + 1, f"{old}/"),
                )
