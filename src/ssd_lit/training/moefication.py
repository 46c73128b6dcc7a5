"""MoEfication of a model in training: its neurons move into expert order where they lie, Adam's moments with them."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ssd_lit.config import RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.construction import NEEDS_ACTIVATIONS, construct
from ssd_lit.moe.permutation import moefy, upcycle_into
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.records import PhaseRecord
from ssd_lit.training.calibration import layer_activations
from ssd_lit.training.checkpoint import PREFIX, build_model, load_beside_routers, weights_of

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
    """The expert of every neuron, labels [F] layer by layer, and the check of similarity that came with it, if any.

    Changes the tracker's clustering, and nothing of the model but its mode.
    """
    moe, rows = config.moe, [ffn.gating_weight for ffn in model.ffns]
    if moe.construction == "kmeans":
        step = history[-1].last_step if history else 0
        checks = history[-1].similarity if history else []
        if checks and checks[-1][0] == step:
            # The phase before ended with a check: these very weights are clustered already.
            return tracker.labels, []
        # Where training's checks cluster: a GPU takes all layers in a part of a second, a core several seconds.
        device = "cuda" if torch.cuda.is_available() else "cpu"
        found = tracker.update([w.to(device) for w in rows])
        return tracker.labels, [[step, found]] if history and found is not None else []
    activations: Iterable[Tensor | None] = [None] * len(rows)
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

    All tensors stay where they are in memory, so what was compiled for them stays valid.
    """
    moved = optimizer if config.moe.permute_optimizer else None
    tracker.reorder([moefy(ffn, ids, moved) for ffn, ids in zip(model.ffns, labels, strict=True)])


def clusters_in(switch_state: dict[str, Any]) -> int:
    """The number of clusters of the clustering that a phase switch knew; 0 if it knew none."""
    labels = switch_state["tracker"]["labels"]
    return int(labels[0].max()) + 1 if labels else 0


def upcycled(config: RunConfig, checkpoint: dict[str, Any], vocab: VocabInfo) -> dict[str, Tensor]:
    """The weights of a model whose experts are copies of a dense checkpoint's FFNs, all else as it was there."""
    dense = build_model(config.model_copy(update={"method": "dense"}), vocab, read_weights=not checkpoint)
    if checkpoint:
        load_beside_routers(dense, checkpoint)
    model = build_model(config, vocab, read_weights=False)
    inside = tuple(f"{PREFIX}{name}." for name, module in model.named_modules() if module in set(model.ffns))
    rest = {name: value for name, value in weights_of(dense).items() if not name.startswith(inside)}
    for source, target in zip(dense.ffns, model.ffns, strict=True):
        upcycle_into(source, target)
    return weights_of(model) | rest
