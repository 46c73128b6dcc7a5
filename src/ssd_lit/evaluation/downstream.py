"""The final model of a run on downstream benchmarks: GLUE after fine-tuning, BLiMP and the harness without."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssd_lit.config import DownstreamConfig, RunConfig
from ssd_lit.data.benchmarks import TASKS, read_blimp
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.blimp import score_on_blimp
from ssd_lit.evaluation.glue import score_on_glue
from ssd_lit.evaluation.resumable import ResumableResults
from ssd_lit.models.family import family
from ssd_lit.moe.names import Mode
from ssd_lit.run import Run
from ssd_lit.support.files import sha256
from ssd_lit.training.checkpoint import final_model


def evaluate_downstream(run: Run, settings: DownstreamConfig, pieces: Path) -> dict[str, Any]:
    """Score the final model of a run on the benchmarks in the settings; returns downstream.json.

    `glue`, `blimp` and `harness` are the results of `score_on_glue`, and of `score_on_blimp` and `score_on_harness` in
    every mode. They are null where left out; `left_out` has the reasons. The folder `pieces` keeps partial results, to
    resume from.
    """
    config = run.config
    sections = {
        name: section for name in ("glue", "blimp", "harness") if (section := getattr(settings, name)) is not None
    }
    missing = {name: reason for name in sections if (reason := _why_not(name, config)) is not None}
    content: dict[str, Any] = {"glue": None, "blimp": None, "harness": None, "left_out": missing}
    if sections.keys() <= missing.keys():
        return content

    model = final_model(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    shared: dict[str, Any] = {
        "tokenizer": load_tokenizer(run.tokenizer),
        "eos_id": run.vocab.eos_id,
        "longest": config.data.sequence_length,
    }
    modes: tuple[Mode, ...] = (*(("dense",) if run.has_dense_mode else ()), *(("sparse",) if run.has_experts else ()))
    partial_results = ResumableResults(pieces, _inputs(run, settings))
    if settings.glue is not None and "glue" not in missing:
        content["glue"] = score_on_glue(
            model, settings.glue, modes=modes, pieces=partial_results, title=config.name, **shared
        )
    if settings.blimp is not None and "blimp" not in missing:
        sets, scores = read_blimp(Path(settings.blimp.file), settings.blimp.limit), []
        for mode in modes:
            model.set_mode(mode)
            score = partial(score_on_blimp, model, sets, title=f"{config.name} BLiMP {mode}", **shared)
            scores += [{"mode": mode, **entry} for entry in partial_results.get(f"blimp-{mode}", score)]
        content["blimp"] = {"scores": scores}
    if settings.harness is not None and "harness" not in missing:
        from ssd_lit.evaluation.harness import score_on_harness

        scores = []
        for mode in modes:
            model.set_mode(mode)
            score = partial(score_on_harness, model, settings.harness, run.tokenizer)
            scores += [{"mode": mode, **entry} for entry in partial_results.get(f"harness-{mode}", score)]
        content["harness"] = {"scores": scores}
    return content


def means(content: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of downstream.json for MLflow, by name: means over seeds for GLUE, over sets for BLiMP.

    Those of the harness are as it gives them.
    """
    values: dict[str, list[float]] = {}
    for entry in content["glue"]["scores"] if content["glue"] else []:
        for metric in TASKS[entry["task"]].metrics:
            values.setdefault(f"downstream/{entry['task']}/{metric}_{entry['mode']}", []).append(entry[metric])
    for entry in content["blimp"]["scores"] if content["blimp"] else []:
        values.setdefault(f"downstream/blimp/accuracy_{entry['mode']}", []).append(entry["accuracy"])
    # Results of earlier versions have no harness.
    for entry in content["harness"]["scores"] if content.get("harness") else []:
        values[f"downstream/harness/{entry['task']}/{entry['metric']}_{entry['mode']}"] = [entry["value"]]
    return {name: sum(scores) / len(scores) for name, scores in values.items()}


def _why_not(benchmark: str, config: RunConfig) -> str | None:
    """Why a run's model cannot be scored on a benchmark; None if it can."""
    name = config.model.family
    objective = family(name).objective
    if benchmark == "glue" and name != "bert":
        return f"only models of family bert are fine-tuned, and this one is {name}"
    if benchmark in ("blimp", "harness") and objective != "causal":
        return f"only models that predict the next token score sentences, and this one is {name}"
    return None


def _inputs(run: Run, settings: DownstreamConfig) -> dict[str, Any]:
    """All inputs of a partial result except its task and seed."""
    paths = [
        settings.glue.folder if settings.glue else None,
        settings.blimp.file if settings.blimp else None,
        settings.harness.folder if settings.harness else None,
    ]
    return {
        "files": {path: _digests(Path(path)) for path in paths if path is not None},
        "weights": run.final().weights,
        "moe": run.config.moe.model_dump(mode="json"),
        "downstream": settings.model_dump(mode="json", exclude={"glue": {"tasks", "seeds"}}),
    }


def _digests(path: Path) -> dict[str, str]:
    """The digest of a file, or of each file of a folder by its place in it."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): sha256(file) for file in files}
