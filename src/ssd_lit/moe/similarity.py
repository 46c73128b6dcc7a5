"""Activation pattern similarity: how similar two clusterings of the same neurons are."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.clustering import balanced_kmeans_layers


def pattern_similarity(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The adjusted Rand index between two clusterings of the same neurons, averaged over layers.

    Both are lists of labels [F], one for each layer. 1 is the same grouping, 0 the expected value of random ones (SSD,
    arXiv 2410.03440, section 4).
    """
    scores = [_adjusted_rand(a, b) for a, b in zip(before, after, strict=True)]
    return sum(scores) / len(scores)


def _adjusted_rand(a: Tensor, b: Tensor) -> float:
    """Hubert and Arabie's index of labels a and b [F]; scikit-learn's takes longer than the clustering of a layer."""
    columns = int(b.max()) + 1
    together = (a * columns + b).bincount(minlength=(int(a.max()) + 1) * columns).view(-1, columns)
    both, in_a, in_b = (_pairs(sizes) for sizes in (together, together.sum(1), together.sum(0)))
    expected, most = in_a * in_b / _pairs(torch.tensor(len(a))), (in_a + in_b) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


def _pairs(sizes: Tensor) -> int:
    """Pairs of neurons that are in a set together, over sets of these sizes."""
    return int((sizes * (sizes - 1)).sum()) // 2


class PatternTracker:
    """Clusters the neurons of every layer at each update, and compares the last two clusterings."""

    def __init__(self, n_clusters: int, seed: int):
        self.labels: list[Tensor] = []
        """The latest clustering: labels [F] for each layer; empty before the first."""
        self._n_clusters = n_clusters
        self._seed = seed

    def update(self, weights: Iterable[Tensor]) -> float | None:
        """Cluster the input projections [F, D] of all layers, starting from the last clustering.

        Takes one projection after another, so that not all need be there at once. Returns the similarity to the last
        clustering, or None for the first.
        """
        before = self.labels
        # In float32 on the device of the weights: a check costs little beside the steps between two checks.
        rows = (F.normalize(w.detach().float(), dim=-1) for w in weights)
        clusterings = balanced_kmeans_layers(rows, self._n_clusters, init=before or None, seed=self._seed)
        self.labels = [clustering.labels for clustering in clusterings]
        return pattern_similarity(before, self.labels) if before else None

    def reorder(self, orders: Sequence[Tensor]) -> None:
        """Permute the labels with the neurons: `orders[layer][i]` is the old place of the neuron now at i."""
        if self.labels:
            self.labels = [labels[order.cpu()] for labels, order in zip(self.labels, orders, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """The labels, as tensors."""
        return {"labels": [labels.to(torch.int32) for labels in self.labels]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.labels = [labels.long() for labels in state["labels"]]
