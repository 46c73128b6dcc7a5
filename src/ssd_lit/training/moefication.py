"""MoEfication of a model in training: permutes its neurons into expert order in place, with Adam's moments."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import TokenBlocks, scoring_batches, spread_blocks
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import build_objective
from ssd_lit.models.hooks import ffn_inputs, gathered
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.construction import construct
from ssd_lit.moe.names import NEEDS_ACTIVATIONS
from ssd_lit.moe.permutation import moefy, upcycle_into, whole
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.paths import checkpoint_path
from ssd_lit.records import PhaseRecord, Totals, close_stage
from ssd_lit.run import Run
from ssd_lit.support.provenance import timed
from ssd_lit.training.checkpoint import (
    PREFIX,
    SWITCH_STATE,
    Start,
    build_model,
    load_beside_routers,
    read_checkpoint,
    spent_elsewhere,
    weights_of,
    write_checkpoint,
)
from ssd_lit.training.optim import build_optimizer
from ssd_lit.training.schedule import next_phase

Checks = list[list[float]]
"""[global step, similarity] of each check."""


def find_experts(
    config: RunConfig,
    model: LanguageModel,
    tracker: PatternTracker,
    history: Sequence[PhaseRecord],
    tokens_dir: Path,
    vocab: VocabInfo,
) -> tuple[list[Tensor], Checks]:
    """The experts of all neurons, labels [F] a layer, and the similarity check made along with them, if any.

    Changes the tracker's clustering, and the model's mode only.
    """
    moe = config.moe
    rows = (whole(ffn.gating_weight).detach() for ffn in model.ffns)
    if moe.construction == "kmeans":
        step = history[-1].last_step if history else 0
        checks = history[-1].similarity if history else []
        if checks and checks[-1][0] == step:
            # The phase before ended with a check, which clustered the same weights.
            return tracker.labels, []
        # A GPU clusters all layers in less than a second, one core in several seconds.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        value = tracker.update(w.to(device) for w in rows)
        return tracker.labels, [[step, value]] if history and value is not None else []
    activations: Iterable[Tensor | None] = [None] * len(model.ffns)
    if moe.construction in NEEDS_ACTIVATIONS:
        activations = layer_activations(model, tokens_dir, moe.calibration_blocks, vocab)
    return [
        construct(moe.construction, w, moe.experts, seed=1000 * config.seed + layer, activations=h)
        for layer, (w, h) in enumerate(zip(rows, activations, strict=True))
    ], []


def group_neurons(
    config: RunConfig,
    model: LanguageModel,
    tracker: PatternTracker,
    labels: Sequence[Tensor],
    optimizer: Optimizer | None,
) -> None:
    """Move every neuron to its expert: weights, biases, moments, the routers' centres, the tracker's labels.

    All tensors keep their memory, so compiled code stays valid.
    """
    permuted = optimizer if config.moe.permute_optimizer else None
    tracker.reorder([moefy(ffn, ids, permuted) for ffn, ids in zip(model.ffns, labels, strict=True)])


def upcycled(config: RunConfig, checkpoint: dict[str, Any], vocab: VocabInfo) -> dict[str, Tensor]:
    """The weights of a model whose experts are copies of a dense checkpoint's FFNs, all others as in the checkpoint."""
    dense = build_model(config.model_copy(update={"method": "dense"}), vocab, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(dense, checkpoint)
    model = build_model(config, vocab, read_weights=False)
    inside = tuple(f"{PREFIX}{name}." for name, module in model.named_modules() if module in set(model.ffns))
    rest = {name: value for name, value in weights_of(dense).items() if not name.startswith(inside)}
    for source, target in zip(dense.ffns, model.ffns, strict=True):
        upcycle_into(source, target)
    return weights_of(model) | rest


@torch.no_grad()
def layer_activations(model: LanguageModel, tokens_dir: Path, blocks: int, vocab: VocabInfo) -> Iterator[Tensor]:
    """Every neuron's activation [T, F] in dense mode on evenly spaced training blocks, layer by layer, on the CPU."""
    model.set_mode("dense")
    objective = build_objective(model.objective_name, vocab)
    chosen = spread_blocks(len(TokenBlocks(tokens_dir, "train")), blocks)
    device = model.ffns[0].w_in.device
    inputs: list[list[Tensor]] = [[] for _ in model.ffns]
    for batch in scoring_batches(tokens_dir, "train", chosen, objective, device):
        for layer_inputs, x in zip(inputs, ffn_inputs(model, batch), strict=True):
            layer_inputs.append(x.cpu())
    # Inputs are several times narrower than activations, of which one layer's are held at a time.
    for layer, ffn, layer_inputs in zip(model.layers, model.ffns, inputs, strict=True):
        with gathered(layer):
            hidden = torch.cat([ffn.activations(x.to(device)).cpu() for x in layer_inputs])
        yield hidden
        layer_inputs.clear()


def moefy_checkpoint(run: Run, start: Start, provenance: dict[str, object]) -> PhaseRecord:
    """MoEfy every layer from a checkpoint, and write the records of phase and stage; returns that of the phase.

    Starts from the warm-up's checkpoint, else from the final model of the parent run, else from initial weights. In an
    ssd run that goes on in one process, `PhaseSwitch` does the same on the live model, with the same result.
    """
    began, config = time.perf_counter(), run.config
    phase = next_phase(config, start.history)
    assert phase is not None, "a run at its end has nothing to MoEfy"
    before = start.history[-1].total if start.history else spent_elsewhere(run)
    checkpoint: dict[str, Any] = {}
    if start.checkpoint is not None:
        checkpoint = read_checkpoint(start.checkpoint)
    elif config.parent_run is not None:
        other = run.other(config.parent_run)
        # Where a router was trained behind it, its checkpoint says no more which experts were.
        ends = [stage for stage in reversed(other.training_stages) if stage != "route"]
        end = next((stage for stage in ends if other.checkpoint(stage).exists()), other.final().stage)
        checkpoint = read_checkpoint(other.checkpoint(end))
    tracker = PatternTracker(config.moe.experts, seed=config.seed)
    similarity: Checks = []
    if config.method == "upcycle":
        content: dict[str, Any] = {"state_dict": upcycled(config, checkpoint, run.vocab)}
    else:
        content, similarity = _moefied(run, checkpoint, tracker, start.history, before)
    state = {"inputs": run.made_from(), "phase": phase.index + 1, "tracker": tracker.state_dict(),
             "similarity": [], "seconds": 0.0}  # fmt: skip
    content["callbacks"] = {**content.get("callbacks", {}), SWITCH_STATE: state}
    write_checkpoint(checkpoint_path(run.folder, "moefy"), content)
    spent = Totals(seconds=time.perf_counter() - began)
    record = phase.record(config, start.history, before, spent, "moefied", similarity)
    record = replace(record, inputs=run.made_from(), provenance=timed(provenance, time.time() - spent.seconds))
    record.write(run.folder)
    close_stage(run.folder, "moefy", record)
    return record


def _moefied(
    run: Run, checkpoint: dict[str, Any], tracker: PatternTracker, history: list[PhaseRecord], before: Totals
) -> tuple[dict[str, Any], Checks]:
    """The checkpoint with its neurons in expert order, and the similarity check made along with it, if any.

    `before` is what was spent up to the checkpoint; its sparse steps show whether experts were trained. Of another
    run's checkpoint only the weights are kept.
    """
    config = run.config
    model = build_model(config, run.vocab, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(model, checkpoint)
    clustering = checkpoint.get("callbacks", {}).get(SWITCH_STATE, {}).get("tracker")
    if clustering is not None:
        experts = int(clustering["labels"][0].max()) + 1 if clustering["labels"] else 0
        # Experts that were trained keep their neurons, also from another run; a dense run's neurons are clustered anew.
        if history or (before.sparse_steps and experts == config.moe.experts):
            tracker.load_state_dict(clustering)
    optimizer = build_optimizer(model, config.optim) if history else None
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    labels, similarity = find_experts(config, model, tracker, history, run.tokens, run.vocab)
    group_neurons(config, model, tracker, labels, optimizer)
    if optimizer is None:
        return {"state_dict": weights_of(model)}, similarity
    changed = {"state_dict": weights_of(model), "optimizer_states": [optimizer.state_dict()]}
    return {**checkpoint, **changed}, similarity
