"""MoEfication of a run between two phases: the checkpoint's neurons move into expert order, Adam's moments too."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_lit.config import RunConfig
from ssd_lit.data.blocks import load_index
from ssd_lit.files import whole_file
from ssd_lit.layout import PhaseRecord, Totals, phase_dir
from ssd_lit.moe.clustering import random_balanced
from ssd_lit.moe.order import moefy
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.training.checkpoint import SWITCH_STATE, build_model, load_weights, read_checkpoint, weights_of
from ssd_lit.training.optim import build_optimizer
from ssd_lit.training.records import finished
from ssd_lit.training.schedule import Phase


def moefy_phase(
    run_dir: Path,
    config: RunConfig,
    phase: Phase,
    history: list[PhaseRecord],
    tokens_dir: Path,
    start_from: tuple[Path, Totals] | None,
) -> PhaseRecord:
    """Group every layer's neurons into experts and write the phase's last.ckpt; returns what phase.json is to say.

    Reads the checkpoint of the phase before; for a first phase that of another run, with what it has spent, or
    fresh weights if `start_from` is None.
    """
    began = time.perf_counter()
    index = load_index(tokens_dir)
    model = build_model(config, vocab_size=index["vocab_size"], end_of_text=index["eos_id"])
    before, start = start_from or (None, Totals())
    if history:
        before, start = phase_dir(run_dir, history[-1].index, history[-1].mode) / "last.ckpt", history[-1].total
    checkpoint: dict[str, Any] = read_checkpoint(before) if before is not None else {}
    if checkpoint:
        load_weights(model, checkpoint)

    tracker = PatternTracker(config.moe.experts, seed=config.seed)
    switch = checkpoint.get("callbacks", {}).get(SWITCH_STATE)
    # Another run's clusters may be of another number; its labels are no start for ours.
    if history and switch is not None:
        tracker.load_state_dict(switch["tracker"])
    labels, similarity = _experts(config, tracker, [ffn.w_in for ffn in model.ffns], phase, history)

    optimizer = build_optimizer(model, config.optim)
    if "optimizer_states" in checkpoint:
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    orders = [moefy(ffn, ids, optimizer) for ffn, ids in zip(model.ffns, labels, strict=True)]
    tracker.reorder(orders)

    checkpoint["state_dict"] = weights_of(model)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [optimizer.state_dict()]
    if switch is not None:
        switch["tracker"] = tracker.state_dict()
    with whole_file(phase_dir(run_dir, phase.index, phase.mode) / "last.ckpt") as part:
        torch.save(checkpoint, part)
    spent = Totals(seconds=time.perf_counter() - began)
    return finished(config, phase, history, start, spent, "moefied", similarity)


def _experts(
    config: RunConfig, tracker: PatternTracker, weights: list[Tensor], phase: Phase, history: list[PhaseRecord]
) -> tuple[list[Tensor], list[list[float]]]:
    """The expert of every neuron, layer by layer, and the check of similarity that came with it, if any."""
    if config.moe.construction == "random" or config.method == "sparse":
        # From scratch there is no pattern yet to cluster.
        layers = range(len(weights))
        seeds = [1000 * config.seed + layer for layer in layers]
        return [
            random_balanced(len(w), config.moe.experts, seed=seed) for w, seed in zip(weights, seeds, strict=True)
        ], []
    checks = history[-1].similarity if history else []
    if checks and checks[-1][0] == phase.first_step:
        # The phase before ended with a check: these very weights are clustered already.
        return tracker.labels, []
    found = tracker.update(weights)
    return tracker.labels, [] if found is None else [[phase.first_step, found]]
