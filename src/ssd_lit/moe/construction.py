"""Expert construction: which neurons of an FFN form which expert.

Every construction gives experts of exactly F/E neurons. Three of them are balanced k-means over one point for each
neuron; they differ in the points: weights, activations, or a graph embedding. Shape letters: T tokens, D model width,
F neurons, E experts.
"""

from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ssd_lit.moe.assignment import Floats
from ssd_lit.moe.clustering import balanced_kmeans, normalised_rows, random_balanced
from ssd_lit.moe.names import Construction, allowed_experts

LINK = 1e-6
"""Fraction of a neuron's co-activation that is spread over all other neurons, so that the graph is connected."""


def construct(
    name: str,
    rows: Tensor,
    n_experts: int,
    *,
    seed: int,
    activations: Tensor | None = None,
    init: Tensor | None = None,
) -> Tensor:
    """Labels [F], the expert of each neuron on the CPU; F/E neurons for each of `n_experts` experts.

    rows [F, D]: the input weights of each neuron (those of the gate for a GLU). activations [T, F]: those of each
    neuron on T calibration tokens, of any sign; only the constructions in NEEDS_ACTIVATIONS use them.

    - "kmeans": balanced k-means over the rows at unit length (MoEfication, arXiv 2110.01786, section 3.2; SSD, arXiv
      2410.03440, section 4).
    - "kmeans_activations": balanced k-means over activation profiles, the columns of `activations` at unit length. The
      routed experts of CMoE (arXiv 2502.04416) come from such columns, with ones for the tokens in whose top
      activations a neuron is and zeros elsewhere. Ours are real values, unit length, Euclidean distance, the reduction
      to E components and the absence of shared experts.
    - "coactivation": the graph of neurons whose edges weigh how much two fire for the same tokens, cut into parts
      (MoEfication, section 3.2, which cuts with METIS and evens the parts out afterwards). Ours is a spectral
      embedding, then balanced k-means.
    - "random": parts of equal size at random (LLaMA-MoE, arXiv 2406.16554).
    - "contiguous": neuron i goes to expert i // (F/E).

    `init`, labels [F] of an earlier construction, is a warm start for the three that use k-means; the other two ignore
    it. The same arguments give the same labels, for any number of threads, and the global random state is not used.
    Neurons that never fire are points at the origin: many of them form experts of their own, few fill up the least
    compact experts. Raises ValueError for an unknown name, for F not divisible by E, for missing activations, and for
    shapes that do not match or values that are not finite.
    """
    from threadpoolctl import threadpool_limits

    if name not in get_args(Construction):
        raise ValueError(f"construction {name!r} is unknown; allowed: {', '.join(get_args(Construction))}")
    _check_rows(rows, n_experts)
    if name == "random":
        return random_balanced(len(rows), n_experts, seed=seed)
    if name == "contiguous":
        return torch.arange(len(rows)) // (len(rows) // n_experts)
    # Matrix products and eigenvectors round differently with another number of threads.
    with threadpool_limits(1):
        if name == "kmeans":
            points = normalised_rows(rows)
        elif name == "kmeans_activations":
            profiles = normalised_rows(_checked(name, activations, len(rows)).T)
            points = leading_components(profiles, n_experts)
        else:
            points = _spectral_points(_coactivation(_checked(name, activations, len(rows))), n_experts, seed)
        return balanced_kmeans(points, n_experts, init=init, seed=seed).labels


def _check_rows(rows: Tensor, n_experts: int) -> None:
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"rows must be neurons by model width, given shape {tuple(rows.shape)}")
    if n_experts < 1 or len(rows) % n_experts:
        raise ValueError(
            f"{len(rows)} neurons do not divide into {n_experts} experts of equal size; "
            f"allowed: {allowed_experts(len(rows))}"
        )
    if not rows.isfinite().all():
        raise ValueError("rows hold values that are not finite")


def _checked(name: str, activations: Tensor | None, n_neurons: int) -> Tensor:
    if activations is None:
        raise ValueError(f"construction {name!r} needs activations")
    if activations.ndim != 2 or len(activations) == 0 or activations.shape[1] != n_neurons:
        shape = tuple(activations.shape)
        raise ValueError(f"activations must be tokens by {n_neurons} neurons, as many as rows; given shape {shape}")
    if not activations.isfinite().all():
        raise ValueError("activations hold values that are not finite")
    return activations


def leading_components(points: Tensor, count: int) -> Tensor:
    """Points [n, T], float64, in the coordinates of their leading right singular vectors, `count` at most.

    Distances, also those from the origin, stay as they are if `count` is at least the rank of the points. For k
    clusters the k leading components solve k-means relaxed to an eigenvalue problem (Zha et al., 2001, Spectral
    relaxation for k-means clustering). The noise in the others misleads k-means: on synthetic layers, k-means on all
    components ended at an inertia of the full activation profiles that was up to 4 % higher.
    """
    from scipy.linalg import eigh

    x: Floats = points.numpy()
    n, width = x.shape
    if width <= count:
        return points
    # Both Gram matrices give the same components; the smaller one is cheaper.
    gram = x @ x.T if n < width else x.T @ x
    values, vectors = eigh(gram, subset_by_index=(max(len(gram) - count, 0), len(gram) - 1))
    # Rounding can put a zero eigenvalue below zero.
    return torch.from_numpy(vectors * np.sqrt(np.maximum(values, 0)) if n < width else x @ vectors)


def _coactivation(activations: Tensor) -> Floats:
    """Weights [F, F] of the co-activation graph: the sum over tokens of the product of two neurons' |activations|.

    A product, as the code of MoEfication has it, is one matrix multiplication; a sum of minima would take T * F^2
    elementwise steps. Ours are the absolute value, for activations that can be negative, and no cap on what a
    batch of tokens can add.
    """
    strength: Floats = activations.detach().cpu().double().abs().numpy()
    weights: Floats = strength.T @ strength
    np.fill_diagonal(weights, 0)
    return weights


def _spectral_points(weights: Floats, n_parts: int, seed: int) -> Tensor:
    """Vertices of a graph with edge weights [n, n] as points [n, n_parts] of unit length; isolated ones at zero.

    The leading eigenvectors of the normalised Laplacian, each row scaled to unit length (Ng, Jordan and Weiss, 2001, On
    spectral clustering).
    """
    from sklearn.manifold import spectral_embedding

    linked = np.flatnonzero(weights.sum(axis=1) > 0)
    points = np.zeros((len(weights), n_parts))
    if len(linked) > 0:
        weights = weights[np.ix_(linked, linked)]
        degree = weights.sum(axis=1)
        # Links in proportion to both degrees connect separate components, and keep the eigenvectors.
        weights += LINK * np.outer(degree, degree) / degree.sum()
        count = min(n_parts, len(linked) - 1)
        vectors = spectral_embedding(weights, n_components=count, drop_first=False, random_state=seed)
        points[linked, :count] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return torch.from_numpy(points)
