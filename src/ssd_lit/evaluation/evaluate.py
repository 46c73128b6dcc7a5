"""Evaluation of a run's final model: loss in both modes and over k, activation sparsity, routing recall."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssd_lit.config import EvaluationConfig
from ssd_lit.data.blocks import TokenBlocks, scoring_batches
from ssd_lit.data.objectives import IGNORED, Batch, build_objective
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.evaluation.samples import samples
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import Mode
from ssd_lit.moe.statistics import active_ratio, mean_k, routing_recall
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import final_model

SPLIT = "validation"
WATCHED = 8
"""Batches on which single layers are measured."""


@torch.no_grad()
def evaluate_run(run: Run, settings: EvaluationConfig) -> dict[str, Any]:
    """Measure the final model of a run on validation blocks, in fp32; returns evaluation.json.

    Losses are nats a target. `active_ratio` and `active_neurons` (a token and layer, of d_ff) are those of dense
    mode. `curve` is the loss over k with the run's own router, `oracle_curve` with routing by the true activation
    mass, `threshold_curve` with dynamic k (`experts_above`). `held_out` has the losses on each held-out text, `samples`
    what the model writes. A model that was never MoEfied has no sparse mode, and one whose experts are copies, which
    are weighed, neither dense mode nor oracle: those values are null and those curves empty.
    """
    config, tokens_dir = run.config, run.tokens
    model = final_model(run)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    objective = build_objective(model.objective_name, run.vocab)

    def batches_of(split: str) -> list[Batch]:
        # Kept in memory, because every curve reads them again.
        count = min(settings.blocks, len(TokenBlocks(tokens_dir, split)))
        return list(scoring_batches(tokens_dir, split, range(count), objective, model.ffns[0].w_in.device))

    batches = batches_of(SPLIT)
    count = sum(len(batch["inputs"]) for batch in batches)
    top_k = config.moe.top_k
    has_dense, has_sparse = run.has_dense_mode, run.has_experts
    routed = config.moe.posthoc_router is not None
    ks = sorted({top_k, *(k for k in settings.top_k_curve if k <= config.moe.experts)}) if has_sparse else []
    dense = _loss(model, batches, "dense") if has_dense else None
    curve = {k: _sparse_loss(model, batches, k, dense) for k in tqdm(ks, desc="top-k curve", disable=None)}
    of_oracle = [] if config.method == "upcycle" else ks
    oracle = {k: _oracle_loss(model, batches, k, dense) for k in tqdm(of_oracle, desc="oracle curve", disable=None)}
    ratios = _by_layer(model, batches, active_ratio, "dense") if has_dense else None
    held_out = {
        name: _held_out(model, batches_of(name), has_dense, ks)
        for name in tqdm(config.data.held_out, desc="held-out texts", disable=None)
    }
    content = {
        "split": SPLIT,
        "blocks": count,
        "tokens": count * config.data.sequence_length,
        "loss_dense": dense,
        "loss_sparse": curve.get(top_k),
        "experts": config.moe.experts if has_sparse else None,
        "top_k": top_k if has_sparse else None,
        "router": run.router if has_sparse else None,
        "curve": [{"top_k": k, "loss": loss} for k, loss in curve.items()],
        "oracle_curve": [{"top_k": k, "loss": loss} for k, loss in oracle.items()],
        "threshold_curve": [_by_threshold(model, batches, threshold) for threshold in settings.thresholds if routed],
        "active_ratio": ratios,
        "active_neurons": sum(ratios) / len(ratios) * config.model.d_ff if ratios else None,
        "held_out": held_out,
        "routing_recall": _by_layer(model, batches, routing_recall, "sparse", top_k) if has_sparse else None,
    }
    modes: dict[Mode, bool] = {"dense": has_dense, "sparse": has_sparse}
    # Last, because generation changes how the model attends.
    return {**content, "samples": samples(run, model, SPLIT, [mode for mode, has in modes.items() if has])}


def outcome(content: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of evaluation.json for MLflow, by name; none of a mode that the model lacks."""
    metrics: dict[str, float | None] = {"eval/active_neurons": content["active_neurons"]}
    for mode in ("dense", "sparse"):
        loss = content[f"loss_{mode}"]
        metrics[f"eval/loss_{mode}"] = loss
        metrics[f"eval/perplexity_{mode}"] = None if loss is None else perplexity(loss)
    for name, text in content["held_out"].items():
        metrics[f"eval/{name}/loss_dense"] = text["loss_dense"]
        losses = {point["top_k"]: point["loss"] for point in text["curve"]}
        metrics[f"eval/{name}/loss_sparse"] = losses.get(content["top_k"])
    recall = content["routing_recall"]
    if recall:
        metrics |= {"eval/routing_recall": sum(recall) / len(recall), "eval/routing_recall_worst": min(recall)}
    return {name: value for name, value in metrics.items() if value is not None}


def curves(content: Mapping[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """The curves of evaluation.json for MLflow, by name: over k, and routing recall over layers."""
    over_k = {"loss": content["curve"], "loss_oracle": content["oracle_curve"]}
    found = {f"eval/over_k/{name}": [(p["top_k"], p["loss"]) for p in points] for name, points in over_k.items()}
    found["eval/over_k/perplexity"] = [(k, perplexity(loss)) for k, loss in found["eval/over_k/loss"]]
    for name, text in content["held_out"].items():
        found[f"eval/{name}/over_k/loss"] = [(point["top_k"], point["loss"]) for point in text["curve"]]
    found["eval/over_layers/routing_recall"] = list(enumerate(content["routing_recall"] or []))
    return {name: curve for name, curve in found.items() if curve}


def tables(content: Mapping[str, Any]) -> dict[str, dict[str, list[Any]]]:
    """The same as tables for MLflow, by name: columns to values."""
    over_k, oracle = content["curve"], content["oracle_curve"]
    found: dict[str, dict[str, list[Any]]] = {
        "over_k": {
            "top_k": [point["top_k"] for point in over_k],
            "loss": [point["loss"] for point in over_k],
            "perplexity": [perplexity(point["loss"]) for point in over_k],
            **({"loss_oracle": [point["loss"] for point in oracle]} if oracle else {}),
        },
        "routing_recall": {
            "layer": list(range(len(content["routing_recall"] or []))),
            "routing_recall": content["routing_recall"] or [],
        },
    }
    return {name: columns for name, columns in found.items() if next(iter(columns.values()))}


def _held_out(model: LanguageModel, batches: Sequence[Batch], has_dense: bool, ks: Sequence[int]) -> dict[str, Any]:
    """The losses on one held-out text, in dense mode and over k."""
    dense = _loss(model, batches, "dense") if has_dense else None
    return {
        "blocks": sum(len(batch["inputs"]) for batch in batches),
        "loss_dense": dense,
        "curve": [{"top_k": k, "loss": _sparse_loss(model, batches, k, dense)} for k in ks],
    }


def _loss(
    model: LanguageModel, batches: Sequence[Batch], mode: Mode, k: int | None = None, threshold: float | None = None
) -> float:
    """The mean over all targets; summed on the device, with one sync at the end."""
    model.set_mode(mode, k, threshold)
    total = torch.zeros((), device=batches[0]["inputs"].device)
    for batch in batches:
        total = total + model.loss(batch).float() * _targets(batch)
    return float(total / sum(map(_targets, batches)))


def _targets(batch: Batch) -> Tensor:
    return (batch["targets"] != IGNORED).sum()


def _sparse_loss(model: LanguageModel, batches: Sequence[Batch], k: int, dense: float | None) -> float:
    """The loss with k experts a token; the known one of dense mode where that is the same function."""
    model.set_mode("sparse", k)
    if dense is not None and all(ffn.chooses_all for ffn in model.ffns):
        return dense
    return _loss(model, batches, "sparse", k)


def _oracle_loss(model: LanguageModel, batches: Sequence[Batch], k: int, dense: float | None) -> float:
    """The sparse loss with routing by the true activation mass."""
    for ffn in model.ffns:
        ffn.oracle = True
    loss = _sparse_loss(model, batches, k, dense)
    for ffn in model.ffns:
        ffn.oracle = False
    return loss


def _by_threshold(model: LanguageModel, batches: Sequence[Batch], threshold: float) -> dict[str, float]:
    """The loss with dynamic k at a threshold, and the mean k over the same tokens and all layers."""
    loss = _loss(model, batches, "sparse", threshold=threshold)
    k = mean_k(model.ffns)
    assert k is not None, "sparse mode computed the batches"
    return {"threshold": threshold, "mean_k": k, "loss": loss}


def _by_layer(
    model: LanguageModel,
    batches: Sequence[Batch],
    measure: Callable[[ExpertFFN, Tensor], float],
    mode: Mode,
    k: int | None = None,
) -> list[float]:
    """A measure of every layer, averaged over the blocks of the first WATCHED batches."""
    model.set_mode(mode, k)
    watched = batches[:WATCHED]
    values = torch.tensor(
        [[measure(ffn, x) for ffn, x in zip(model.ffns, ffn_inputs(model, batch), strict=True)] for batch in watched]
    )
    blocks = torch.tensor([len(batch["inputs"]) for batch in watched], dtype=values.dtype)
    means: list[float] = (blocks @ values / blocks.sum()).tolist()
    return means
