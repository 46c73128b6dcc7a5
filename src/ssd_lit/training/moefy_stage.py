"""The stage `moefy`: the first MoEfication of a run, carried out on a checkpoint."""

import time
from dataclasses import replace
from typing import Any

from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.paths import checkpoint_path
from ssd_lit.records import PhaseRecord, Totals, close_stage
from ssd_lit.run import Run
from ssd_lit.support.provenance import timed
from ssd_lit.training.checkpoint import (
    SWITCH_STATE,
    build_model,
    load_beside_routers,
    read_checkpoint,
    weights_of,
    write_checkpoint,
)
from ssd_lit.training.moefication import Checks, clusters_in, find_experts, group_neurons, upcycled
from ssd_lit.training.optim import build_optimizer
from ssd_lit.training.schedule import next_phase
from ssd_lit.training.start import Start, spent_elsewhere


def moefy_checkpoint(run: Run, start: Start, provenance: dict[str, object]) -> PhaseRecord:
    """Give every layer its experts, and put phase and stage on record; returns the record of the phase.

    Reads the warm-up's checkpoint; without one that of the run that this one starts from, or takes first weights. An
    ssd run in one process does the same on its live model (`PhaseSwitch`), with the same result.
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
        checkpoint = read_checkpoint(other.checkpoint(other.final().stage))
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
    """The checkpoint with its neurons in expert order, and the check of similarity that came with it, if any.

    What was spent up to it, `before`, tells whether its neurons were trained as experts. Of another run's checkpoint
    the weights are kept.
    """
    config = run.config
    model = build_model(config, run.vocab, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(model, checkpoint)
    switch = checkpoint.get("callbacks", {}).get(SWITCH_STATE)
    if switch is not None and (history or (before.sparse_steps and clusters_in(switch) == config.moe.experts)):
        # Experts that were trained together stay together, in another run as well; a dense one's are looked for anew.
        tracker.load_state_dict(switch["tracker"])
    optimizer = build_optimizer(model, config.optim) if history else None
    if optimizer is not None:
        optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    labels, similarity = find_experts(config, model, tracker, history, run.tokens, run.vocab)
    group_neurons(config, model, tracker, labels, optimizer)
    if optimizer is None:
        return {"state_dict": weights_of(model)}, similarity
    changed = {"state_dict": weights_of(model), "optimizer_states": [optimizer.state_dict()]}
    return {**checkpoint, **changed}, similarity
