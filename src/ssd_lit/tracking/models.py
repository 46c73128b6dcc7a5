"""A run's final model as MLflow's logged and registered models, one for each mode.

They hold no weights, only where the run lies: a model of a billion parameters would be gigabytes once more for each
mode, and minutes to upload. `ssd_lit.pipeline.serving` loads it from the run's folder.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ssd_lit.config import RunConfig
from ssd_lit.paths import stage_path
from ssd_lit.records import StageRecord
from ssd_lit.stages import training_stages
from ssd_lit.support.files import write_json
from ssd_lit.tracking.view import shown_as

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

log = logging.getLogger(__name__)

LOADER = "ssd_lit.pipeline.serving"
"""Reads what is written here, through `mlflow.pyfunc`."""
KEY, VERSIONS = "ssd_lit.key", "mlflow.modelVersions"
EXAMPLE = "The harvest of this year was"


def registered_name(config: RunConfig) -> str:
    """The name of a run's model in the registry."""
    return f"{config.experiment}.{config.name}"


def modes_of(config: RunConfig) -> list[str]:
    """The modes in which the final model runs; each is an alias of the registered model."""
    return [*(["dense"] if config.method != "upcycle" else []), *(["sparse"] if config.method != "dense" else [])]


def log_models(
    client: "MlflowClient", experiment: str, run_id: str, config: RunConfig, run_dir: Path, results: Path,
    ending: Mapping[str, Any],
) -> None:  # fmt: skip
    """Log and register the final model of a run that was evaluated. May be repeated: only what is missing is made."""
    path = stage_path(run_dir, training_stages(config)[-1])
    if ending["status"] != "FINISHED" or not path.exists():
        return
    place = {
        "run": (run_dir.absolute().relative_to(results.absolute())).as_posix(),
        "results": str(results.absolute()),
        "weights": StageRecord.read(path).weights,
    }
    for mode in modes_of(config):
        key = f"{run_id}/{place['weights'][:16]}/{mode}"
        model = _find_or_create(client, experiment, run_id, config, mode, key)
        if str(model.status) != "READY":
            with TemporaryDirectory() as folder:
                _write(Path(folder) / "model", model.model_id, run_id, {**place, "mode": mode})
                client.log_model_artifacts(model.model_id, f"{folder}/model")
            client.finalize_logged_model(model.model_id, "READY")
        _link(client, run_id, model, mode, ending)
        _register(client, run_id, model, registered_name(config), mode, key)


def _find_or_create(
    client: "MlflowClient", experiment: str, run_id: str, config: RunConfig, mode: str, key: str
) -> "LoggedModel":
    found = client.search_logged_models([experiment], f"tags.`{KEY}` = '{key}'")
    if found:
        return found[0]
    return client.create_logged_model(
        experiment, f"{config.name}-{mode}".replace(".", "_"), source_run_id=run_id, tags={KEY: key},
        params={"mode": mode, "family": config.model.family, "experts": str(config.moe.experts),
                "top_k": str(config.moe.top_k)},
    )  # fmt: skip


def _write(folder: Path, model_id: str, run_id: str, place: Mapping[str, str]) -> None:
    """Write the files of a model as `mlflow.pyfunc` reads them."""
    import mlflow.pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    from ssd_lit import __version__

    inputs: list[Any] = [ColSpec("string", "text")]
    outputs: list[Any] = [
        *inputs, ColSpec("long", "tokens"), ColSpec("double", "loss"), ColSpec("double", "perplexity"),
        ColSpec("string", "continuation", required=False),
    ]  # fmt: skip
    params = [ParamSpec("new_tokens", "long", 0), ParamSpec("top_k", "long", 0)]
    with TemporaryDirectory() as data:
        write_json(Path(data) / "run.json", place)
        mlflow.pyfunc.save_model(
            str(folder), loader_module=LOADER, data_path=f"{data}/run.json",
            mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
            signature=ModelSignature(Schema(inputs), Schema(outputs), ParamSchema(params)),
            input_example=_example(), pip_requirements=[f"ssd-lit=={__version__}"],
        )  # fmt: skip


def _example() -> tuple[Any, dict[str, int]]:
    import pandas as pd

    return pd.DataFrame({"text": [EXAMPLE]}), {"new_tokens": 8, "top_k": 0}


def _link(client: "MlflowClient", run_id: str, model: "LoggedModel", mode: str, ending: Mapping[str, Any]) -> None:
    """Link a model with the run that made it, and with its metrics in its mode."""
    from mlflow.entities import LoggedModelOutput, Metric

    step = ending["run_step"] or 0
    run = client.get_run(run_id)
    known = run.outputs.model_outputs if run.outputs else []
    if model.model_id not in {output.model_id for output in known}:
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    latest = {metric.key: metric.value for metric in sorted(model.metrics or [], key=lambda metric: metric.timestamp)}
    metrics = [
        Metric(shown_as(name), value, ending["time"], step, model_id=model.model_id)
        for name, value in ending["metrics"].items()
        if name.endswith(f"_{mode}") and latest.get(shown_as(name)) != value
    ]
    if metrics:
        client.log_batch(run_id, metrics=metrics)


def _register(client: "MlflowClient", run_id: str, model: "LoggedModel", name: str, mode: str, key: str) -> None:
    """Register a model, and give its version the mode as alias. Leaves it where the user may not."""
    from mlflow.exceptions import MlflowException

    try:
        _ensure_registered(client, name)
        known = client.search_model_versions(f"name = '{name}'")
        version = next((one for one in known if one.tags.get(KEY) == key), None) or client.create_model_version(
            name, model.artifact_location, run_id, tags={KEY: key}, model_id=model.model_id, await_creation_for=0
        )
        if version.version != _version_of(client, name, mode):
            client.set_registered_model_alias(name, mode, version.version)
        if VERSIONS not in model.tags:
            versions = json.dumps([{"name": name, "version": int(version.version)}])
            client.set_logged_model_tags(model.model_id, {VERSIONS: versions})
    except MlflowException as error:
        if error.error_code != "PERMISSION_DENIED":
            raise
        log.warning("MLflow model %s is not registered: this user has no permission for it", name)


def _ensure_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version_of(client: "MlflowClient", name: str, alias: str) -> str | None:
    """The version that has an alias, if one has."""
    version = client.get_registered_model(name).aliases.get(alias)
    return None if version is None else str(version)
