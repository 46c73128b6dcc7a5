"""How the activation pattern changes through training: all pairs of a run's snapshots compared (SSD, section 3).

Neurons stand in the order of their ids wherever they are clustered here, so MoEfication, which moves neurons,
changes nothing.
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
from ssd_lit.moe.construction import NEEDS_ACTIVATIONS, construct
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import Construction
from ssd_lit.moe.similarity import pattern_similarity
from ssd_lit.paths import snapshots
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import build_model, load_beside_routers, read_checkpoint
from ssd_lit.training.moefication import layer_activations

COLUMNS = ["construction", "experts", "layer", "step_a", "step_b", "similarity"]

Setting = tuple[Construction, int]
"""A construction and a number of clusters."""


def fitting_experts(settings: AnalysisConfig, d_ff: int) -> list[int]:
    """The numbers of clusters in the settings that divide the neurons of an FFN, rising."""
    return sorted({experts for experts in settings.experts if d_ff % experts == 0})


def compare_snapshots(run: Run, settings: AnalysisConfig) -> pd.DataFrame:
    """The adjusted Rand index of every pair of snapshots, with every construction and number of clusters.

    One row with COLUMNS for each pair (step_a <= step_b) and layer, and one with layer "mean" for their average. Every
    clustering is a cold start with a seed of its layer: what two snapshots have in common is in their weights and not
    in how one clustering was made from another. (The checks during training start from the clustering before as well,
    and keep the better of both.) "random" is given another seed at every snapshot: it shows what chance alone gives.
    """
    config = run.config
    chosen: list[Setting] = list(
        product(dict.fromkeys(settings.constructions), fitting_experts(settings, config.model.d_ff))
    )
    steps: list[int] = []
    found: dict[Setting, list[list[Tensor]]] = {setting: [] for setting in chosen}  # by snapshot, then by layer
    taken = snapshots(run.folder)
    model = build_model(config, run.vocab, read_weights=False)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    with tqdm(total=len(taken) * len(model.ffns) * len(chosen), desc="clusterings", disable=None) as bar:
        for step, path in taken:
            load_beside_routers(model, read_checkpoint(path))
            steps.append(step)
            for labels in found.values():
                labels.append([])
            wanted = any(name in NEEDS_ACTIVATIONS for name, _ in chosen)
            layers = _layers(model, run.tokens, config.moe.calibration_blocks if wanted else 0, run.vocab)
            for layer, (ffn, activations) in enumerate(layers):
                for name, experts in chosen:
                    seed = 1000 * config.seed + layer + (1_000_000 * step if name == "random" else 0)
                    labels_of_layer = labels_by_id(ffn, name, experts, seed=seed, activations=activations)
                    # There may be many snapshots of many layers.
                    found[name, experts][-1].append(labels_of_layer.to(torch.int16 if experts < 2**15 else torch.int32))
                    bar.update()
    rows = [(*setting, *row) for setting, labels in found.items() for row in _pairs(steps, labels)]
    return pd.DataFrame(rows, columns=COLUMNS)


def labels_by_id(
    ffn: ExpertFFN, construction: Construction, experts: int, *, seed: int, activations: Tensor | None = None
) -> Tensor:
    """Cluster the neurons of an FFN: labels [F], place i for the neuron with id i, wherever it stands.

    activations [T, F] are those of the neurons as they stand. "contiguous" groups them as they stand too, so it tells
    which neurons share an expert at the moment; the other constructions do not see the order.
    """
    place = ffn.neuron_ids.argsort().cpu()  # place[i]: where the neuron with id i stands
    rows = ffn.gating_weight.detach().cpu()
    if construction == "contiguous":
        return construct(construction, rows, experts, seed=seed)[place]
    return construct(
        construction,
        rows[place],
        experts,
        seed=seed,
        activations=activations[:, place] if construction in NEEDS_ACTIVATIONS and activations is not None else None,
    )


def _layers(
    model: LanguageModel, tokens_dir: Path, blocks: int, vocab: VocabInfo
) -> Iterator[tuple[ExpertFFN, Tensor | None]]:
    """Every FFN with its activations on that many training blocks; without them for no blocks."""
    if not blocks:
        yield from ((ffn, None) for ffn in model.ffns)
        return
    yield from zip(model.ffns, layer_activations(model, tokens_dir, blocks, vocab), strict=True)


def _pairs(steps: Sequence[int], labels: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int | str, int, int, float]]:
    """(layer or "mean", step, step, similarity) for all pairs, a snapshot with itself included."""
    for a, b in combinations_with_replacement(range(len(steps)), 2):
        layers = [pattern_similarity([before], [after]) for before, after in zip(labels[a], labels[b], strict=True)]
        yield from ((layer, steps[a], steps[b], value) for layer, value in enumerate(layers))
        yield "mean", steps[a], steps[b], sum(layers) / len(layers)
