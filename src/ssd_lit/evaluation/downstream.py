"""The final model of a run on other tasks: GLUE after fine-tuning, BLiMP without any."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ssd_lit.config import BlimpConfig, DownstreamConfig, RunConfig
from ssd_lit.data.benchmarks import TASKS, read_blimp
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.evaluation.blimp import score_on_blimp
from ssd_lit.evaluation.glue import score_on_glue
from ssd_lit.evaluation.resumable import ResumableResults
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import final_model


def evaluate_downstream(run: Run, settings: DownstreamConfig, pieces: Path) -> dict[str, Any]:
    """Score the final model of a run on the benchmarks asked for; returns downstream.json.

    `glue` and `blimp` are what `score_on_glue` and `score_on_blimp` found, the latter in every mode; null where left
    out, and `left_out` says why. ResumableResults of the work that are done are kept in the folder `pieces`.
    """
    config = run.config
    sections = {"glue": settings.glue, "blimp": settings.blimp}
    missing = {name: why for name, one in sections.items() if one and (why := _why_not(name, config)) is not None}
    found: dict[str, Any] = {"glue": None, "blimp": None, "left_out": missing}
    if not any(one for name, one in sections.items() if name not in missing):
        return found

    model = final_model(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    shared: dict[str, Any] = {
        "tokenizer": load_tokenizer(run.tokenizer),
        "eos_id": run.vocab.eos_id,
        "longest": config.data.sequence_length,
    }
    modes, kept = _modes(run), ResumableResults(pieces, _inputs(run, settings))
    if settings.glue is not None and "glue" not in missing:
        found["glue"] = score_on_glue(model, settings.glue, modes=modes, pieces=kept, title=config.name, **shared)
    if settings.blimp is not None and "blimp" not in missing:
        found["blimp"] = {"scores": _blimp(model, settings.blimp, modes, kept, config.name, shared)}
    return found


def means(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures of downstream.json that are worth a line each, by name: means over seeds, over sets of pairs."""
    values: dict[str, list[float]] = {}
    for entry in found["glue"]["scores"] if found["glue"] else []:
        for metric in TASKS[entry["task"]].metrics:
            values.setdefault(f"downstream/{entry['task']}/{metric}_{entry['mode']}", []).append(entry[metric])
    for entry in found["blimp"]["scores"] if found["blimp"] else []:
        values.setdefault(f"downstream/blimp/accuracy_{entry['mode']}", []).append(entry["accuracy"])
    return {name: sum(some) / len(some) for name, some in values.items()}


def _why_not(benchmark: str, config: RunConfig) -> str | None:
    """Why a run's model cannot be tried on a benchmark; None if it can."""
    family = config.model.family
    if benchmark == "glue" and family != "bert":
        return f"only models of family bert are fine-tuned, and this one is {family}"
    if benchmark == "blimp" and family not in ("gpt2", "llama"):
        return f"only models that predict the next token score sentences, and this one is {family}"
    return None


def _modes(run: Run) -> tuple[str, ...]:
    """The modes that the model can be run in: experts that are copies have no dense one."""
    return (*(("dense",) if run.has_dense_mode else ()), *(("sparse",) if run.has_experts else ()))


def _blimp(
    model: LanguageModel,
    settings: BlimpConfig,
    modes: Sequence[str],
    pieces: ResumableResults,
    title: str,
    shared: Mapping[str, Any],
) -> list[dict[str, Any]]:
    sets, scores = read_blimp(Path(settings.file), settings.limit), []
    for mode in modes:
        model.set_mode("sparse" if mode == "sparse" else "dense")
        score = partial(score_on_blimp, model, sets, title=f"{title} BLiMP {mode}", **shared)
        found = pieces.get(f"blimp-{mode}", score)
        scores += [{"mode": mode, **one} for one in found]
    return scores


def _inputs(run: Run, settings: DownstreamConfig) -> dict[str, Any]:
    """All that decides what a piece of the work gives, but for its task and seed."""
    return {
        "weights": run.final().weights,
        "moe": run.config.moe.model_dump(mode="json"),
        "downstream": settings.model_dump(mode="json", exclude={"glue": {"tasks", "seeds"}}),
    }
