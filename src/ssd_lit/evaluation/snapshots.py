"""The activation pattern through training: similarity of all pairs of a run's snapshots (SSD, section 3).

Neurons are clustered in the order of their ids, so MoEfication, which permutes them, has no effect here.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations_with_replacement, product
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from ssd_lit.config import AnalysisConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.construction import construct
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import NEEDS_ACTIVATIONS, Construction
from ssd_lit.moe.similarity import pattern_similarity
from ssd_lit.paths import snapshots
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import build_model, load_beside_routers, read_checkpoint
from ssd_lit.training.moefication import layer_activations

COLUMNS = ["construction", "experts", "layer", "step_a", "step_b", "similarity"]
Setting = tuple[Construction, int]
"""A construction and a number of clusters."""


def fitting_experts(settings: AnalysisConfig, d_ff: int) -> list[int]:
    """The numbers of clusters in the settings that divide d_ff, ascending."""
    return sorted({experts for experts in settings.experts if d_ff % experts == 0})


def compare_snapshots(run: Run, settings: AnalysisConfig) -> pd.DataFrame:
    """The adjusted Rand index of every pair of snapshots, with every construction and number of clusters.

    One row with COLUMNS for each pair (step_a <= step_b) and layer, and one with layer "mean" for their average. Every
    clustering starts cold, with a seed of its layer, so that similarity comes from the weights and not from a shared
    starting point. (The checks during training start from the clustering before as well, and keep the better of both.)
    "random" gets another seed at every snapshot: it shows the similarity by chance.
    """
    config = run.config
    clusterings: list[Setting] = list(
        product(dict.fromkeys(settings.constructions), fitting_experts(settings, config.model.d_ff))
    )
    steps: list[int] = []
    # By snapshot, then by layer.
    labels: dict[Setting, list[list[Tensor]]] = {setting: [] for setting in clusterings}
    paths = snapshots(run.folder)
    model = build_model(config, run.vocab, read_weights=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    need_activations = any(name in NEEDS_ACTIVATIONS for name, _ in clusterings)
    with tqdm(total=len(paths) * len(model.ffns) * len(clusterings), desc="clusterings", disable=None) as bar:
        for step, path in paths:
            load_beside_routers(model, read_checkpoint(path))
            steps.append(step)
            for of_setting in labels.values():
                of_setting.append([])
            layers = _layers(model, run.tokens, config.moe.calibration_blocks if need_activations else 0, run.vocab)
            for layer, (ffn, activations) in enumerate(layers):
                for name, experts in clusterings:
                    seed = 1000 * config.seed + layer + (1_000_000 * step if name == "random" else 0)
                    of_layer = labels_by_id(ffn, name, experts, seed=seed, activations=activations)
                    # Small types, because there may be many snapshots of many layers.
                    labels[name, experts][-1].append(of_layer.to(torch.int16 if experts < 2**15 else torch.int32))
                    bar.update()
    rows = [(*setting, *row) for setting, of_setting in labels.items() for row in _pairs(steps, of_setting)]
    return pd.DataFrame(rows, columns=COLUMNS)


def labels_by_id(
    ffn: ExpertFFN, construction: Construction, experts: int, *, seed: int, activations: Tensor | None = None
) -> Tensor:
    """Cluster the neurons of an FFN: labels [F], entry i for the neuron with id i.

    activations [T, F] are in the current order of the neurons. "contiguous" groups them in that order too, so it gives
    the current experts; the other constructions do not depend on the order.
    """
    position = ffn.neuron_ids.argsort().cpu()  # position[i]: the row of the neuron with id i
    rows = ffn.gating_weight.detach().cpu()
    if construction == "contiguous":
        return construct(construction, rows, experts, seed=seed)[position]
    if activations is not None:
        activations = activations[:, position] if construction in NEEDS_ACTIVATIONS else None
    return construct(construction, rows[position], experts, seed=seed, activations=activations)


def _layers(
    model: LanguageModel, tokens_dir: Path, blocks: int, vocab: VocabInfo
) -> Iterator[tuple[ExpertFFN, Tensor | None]]:
    """Every FFN with its activations on that many training blocks; None for no blocks."""
    if blocks:
        yield from zip(model.ffns, layer_activations(model, tokens_dir, blocks, vocab), strict=True)
    else:
        yield from ((ffn, None) for ffn in model.ffns)


def _pairs(steps: Sequence[int], labels: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int | str, int, int, float]]:
    """(layer or "mean", step, step, similarity) for all pairs, a snapshot with itself included."""
    for a, b in combinations_with_replacement(range(len(steps)), 2):
        layers = [pattern_similarity([before], [after]) for before, after in zip(labels[a], labels[b], strict=True)]
        yield from ((layer, steps[a], steps[b], value) for layer, value in enumerate(layers))
        yield "mean", steps[a], steps[b], sum(layers) / len(layers)
