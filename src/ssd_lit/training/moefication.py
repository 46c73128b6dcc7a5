"""MoEfication of a run between two phases: the checkpoint's neurons move into expert order, Adam's moments too."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.data.objectives import Specials
from ssd_lit.layout import PhaseRecord, Totals, phase_dir
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.construction import NEEDS_ACTIVATIONS, construct
from ssd_lit.moe.order import copy_into_experts, moefy
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.training.calibration import layer_activations
from ssd_lit.training.checkpoint import (
    PREFIX,
    SWITCH_STATE,
    build_model,
    load_beside_routers,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from ssd_lit.training.optim import build_optimizer
from ssd_lit.training.records import finished
from ssd_lit.training.schedule import Phase

Checks = list[list[float]]
"""[global step, similarity] of each check."""


def moefy_phase(
    run_dir: Path,
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    start_from: tuple[Path, Totals] | None,
) -> PhaseRecord:
    """Give every layer its experts and write the phase's last.ckpt; returns what phase.json is to say.

    Reads the checkpoint of the phase before; for a first phase that of another run, with what it has spent, or
    takes the model's first weights if `start_from` is None.
    """
    began = time.perf_counter()
    specials = Specials.of(load_index(tokens_dir))
    before, start = start_from or (None, Totals())
    if history:
        before, start = phase_dir(run_dir, history[-1].index, history[-1].mode) / "last.ckpt", history[-1].total
    checkpoint: dict[str, Any] = read_checkpoint(before) if before is not None else {}
    if config.method == "upcycle":
        checkpoint, similarity = {"state_dict": _upcycled(config, checkpoint, specials)}, []
    else:
        similarity = _moefied(config, checkpoint, phase, history, start, tokens_dir, specials)
    write_checkpoint(phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt", checkpoint)
    spent = Totals(seconds=time.perf_counter() - began)
    return finished(config, phase, history, start, spent, "moefied", similarity)


def _moefied(
    config: RunConfig,
    checkpoint: dict[str, Any],
    phase: Phase,
    history: list[PhaseRecord],
    start: Totals,
    tokens_dir: Path,
    specials: Specials,
) -> Checks:
    """Group the neurons of a checkpoint in place; returns the check of similarity that came with it, if any.

    What was spent up to it, `start`, tells whether its neurons were trained as experts.
    """
    model = build_model(config, specials, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(model, checkpoint)
    tracker = PatternTracker(config.moe.experts, seed=config.seed)
    switch = checkpoint.get("callbacks", {}).get(SWITCH_STATE)
    if switch is not None and (history or (start.sparse_steps and _clusters(switch) == config.moe.experts)):
        # Experts that were trained together stay together, in another run as well; a dense one's are looked for anew.
        tracker.load_state_dict(switch["tracker"])
    labels, similarity = _experts(config, model, tracker, phase, history, tokens_dir, specials)

    optimizer = build_optimizer(model, config.optim) if history else None
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    moved = optimizer if config.moe.permute_optimizer else None
    tracker.reorder([moefy(ffn, ids, moved) for ffn, ids in zip(model.ffns, labels, strict=True)])

    checkpoint["state_dict"] = weights_of(model)
    if optimizer is not None:
        checkpoint["optimizer_states"] = [optimizer.state_dict()]
    if switch is not None:
        switch["tracker"] = tracker.state_dict()
    return similarity


def _experts(
    config: RunConfig,
    model: LanguageModel,
    tracker: PatternTracker,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    specials: Specials,
) -> tuple[list[Tensor], Checks]:
    """The expert of every neuron, layer by layer, and the check of similarity that came with it, if any."""
    moe, rows = config.moe, [ffn.key_rows for ffn in model.ffns]
    if moe.construction == "kmeans":
        checks = history[-1].similarity if history else []
        if checks and checks[-1][0] == phase.first_step:
            # The phase before ended with a check: these very weights are clustered already.
            return tracker.labels, []
        # Where training's checks cluster: a GPU takes all layers in a part of a second, a core several seconds.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = tracker.update([w.to(device) for w in rows])
        return tracker.labels, [[phase.first_step, found]] if history and found is not None else []
    activations: Iterable[Tensor | None] = [None] * len(rows)
    if moe.construction in NEEDS_ACTIVATIONS:
        activations = layer_activations(model, tokens_dir, moe.calibration_blocks, specials)
    return [
        construct(moe.construction, w, moe.experts, seed=1000 * config.seed + layer, activations=h)
        for layer, (w, h) in enumerate(zip(rows, activations, strict=True))
    ], []


def _clusters(switch: dict[str, Any]) -> int:
    """The number of clusters of the clustering that a phase switch knew; 0 if it knew none."""
    labels = switch["tracker"]["labels"]
    return int(labels[0].max()) + 1 if labels else 0


def _upcycled(config: RunConfig, checkpoint: dict[str, Any], specials: Specials) -> dict[str, Tensor]:
    """The weights of a model whose experts are copies of a dense checkpoint's FFNs, all else as it was there."""
    dense = build_model(config.model_copy(update={"method": "dense"}), specials, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(dense, checkpoint)
    model = build_model(config, specials, read_weights=False)
    inside = tuple(f"{PREFIX}{name}." for name, module in model.named_modules() if module in set(model.ffns))
    rest = {name: value for name, value in weights_of(dense).items() if not name.startswith(inside)}
    for source, target in zip(dense.ffns, model.ffns, strict=True):
        copy_into_experts(source, target)
    return weights_of(model) | rest
