"""The MLflow store: where it is, how it is made, reached, served."""

import logging
import os
import re
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ssd_lit.support.files import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
                raise OSError(f"{path}: the MLflow store cannot be made: {first_line(error)}") from None


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


def connect(results: Path) -> "MlflowClient":
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


def first_line(error: Exception) -> str:
    # First masked, then cut: half a URI would not be known as one.
    return masked((str(error) or type(error).__name__).splitlines()[0])[:200]


def artifact_place(results: Path, experiment: str) -> str:
    """The URI of the folder that holds an experiment's artifacts."""
    return (results.resolve() / "mlartifacts" / experiment).as_uri()


def follow_results(results: Path) -> None:
    """Have the store name the places of artifacts where the results lie now; nothing if there is none.

    MLflow writes absolute places into its store. After a move they lead nowhere, and in a copy to the original.
    """
    store, here = results.resolve() / "mlflow.db", results.resolve().as_uri()
    if not store.exists():
        return
    with closing(sqlite3.connect(store, timeout=60)) as connection, connection:
        for number, name, place in connection.execute(
            "SELECT experiment_id, name, artifact_location FROM experiments"
        ).fetchall():
            now = artifact_place(results, name)
            if place == now or not place.endswith(now.removeprefix(here)):
                continue
            connection.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (now, number))
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (now, len(place) + 1, number, len(place), place),
            )
