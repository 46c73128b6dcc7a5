"""Where MLflow's store under results/ keeps artifacts: beside it, wherever the results lie by now.

MLflow writes absolute places into its store. After a move they lead nowhere, and in a copy to the original.
"""

import sqlite3
from contextlib import closing
from pathlib import Path


def artifact_place(results: Path, experiment: str) -> str:
    """The URI of the folder that holds an experiment's artifacts."""
    return (results.resolve() / "mlartifacts" / experiment).as_uri()


def follow_results(results: Path) -> None:
    """Have the store name the places of artifacts where the results lie now; nothing if there is none."""
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
