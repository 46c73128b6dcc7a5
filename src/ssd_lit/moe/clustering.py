"""Balanced clustering of neurons: E clusters of exactly F/E rows each.

k-means with an exact balanced assignment, as MoEfication groups neurons (arXiv 2110.01786, section 3.2) and SSD
does at every switch (arXiv 2410.03440, section 4). Shape letters: n rows, D columns, E clusters.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]

MAX_ROUNDS = 20


class Clustering(NamedTuple):
    """Rows put into clusters of equal size."""

    labels: Tensor
    """[n], the cluster of each row."""
    centers: Tensor
    """[E, D], the mean of each cluster's rows."""
    inertia: float
    """Sum of squared distances from the rows to their centres."""


def normalised_rows(weights: Tensor) -> Tensor:
    """Rows [F, D] scaled to unit length, in float64 on the CPU; rows of zeros stay."""
    return F.normalize(weights.detach().cpu().double(), dim=-1)


def balanced_kmeans(x: Tensor, n_clusters: int, *, init: Tensor | None = None, seed: int = 0) -> Clustering:
    """Put the rows of x [n, D] into `n_clusters` clusters of exactly n / n_clusters rows.

    A cold start (k-means, then balanced assignments and centres in turn until the inertia stops falling) runs
    always; with `init`, labels [n] of an earlier balanced clustering, a warm start from them runs beside it. The
    better one is kept, the warm one if they tie. The same arguments give the same result, and the global random
    state is left alone. Raises ValueError if n is not divisible by `n_clusters`, if x is not finite, or if `init`
    does not give a cluster for every row.
    """
    rows: Floats = x.detach().cpu().double().numpy()
    _check(rows, n_clusters)
    best = _refine(rows, _kmeans_centers(rows, n_clusters, seed))
    if init is not None:
        if init.shape != (len(rows),) or (len(init) and not 0 <= int(init.min()) <= int(init.max()) < n_clusters):
            raise ValueError(f"init must give one of {n_clusters} clusters for each of {len(rows)} rows")
        warm = _refine(rows, _centers(rows, init.cpu().numpy(), n_clusters))
        best = min(warm, best, key=lambda found: found[2])
    labels, centers, inertia = best
    return Clustering(torch.from_numpy(labels), torch.from_numpy(centers).to(x.dtype), inertia)


def random_balanced(n: int, n_clusters: int, *, seed: int = 0) -> Tensor:
    """Labels [n] that put rows at random into clusters of equal size; the same for the same seed."""
    if n_clusters < 1 or n % n_clusters:
        raise ValueError(f"{n} rows do not divide into {n_clusters} clusters of equal size")
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(n) % n_clusters))


def balanced_assignment(cost: Floats) -> Labels:
    """The cheapest way to give each row one column so that every column gets n/E rows; cost [n, E] -> [n].

    Exact: every row starts at its cheapest column; then rows move from columns with too many to columns with
    too few, one at a time along the shortest path of moves (successive shortest paths on the graph of columns).
    """
    n, columns = cost.shape
    size = n // columns
    labels: Labels = cost.argmin(axis=1)
    count = np.bincount(labels, minlength=columns)
    move = np.empty((columns, columns))  # move[a, b]: what it costs to move the best row of a to b
    row = np.zeros((columns, columns), dtype=np.int64)  # that row
    for a in range(columns):
        _cheapest_moves(cost, labels, a, move, row)
    for _ in range(int(np.maximum(count - size, 0).sum())):
        path = _shortest_path(move, count > size, count < size)
        moved = [row[a, b] for a, b in pairwise(path)]
        labels[moved] = path[1:]
        for a in path:
            _cheapest_moves(cost, labels, a, move, row)
        count[path[0]] -= 1
        count[path[-1]] += 1
    return labels


def _cheapest_moves(cost: Floats, labels: Labels, a: int, move: Floats, row: Labels) -> None:
    """Fill line a of `move` and `row`."""
    members = np.flatnonzero(labels == a)
    if len(members) == 0:
        move[a] = np.inf
        return
    change = cost[members] - cost[members, a, None]
    cheapest = change.argmin(axis=0)
    move[a], row[a] = change[cheapest, np.arange(len(move))], members[cheapest]


def _shortest_path(move: Floats, sources: npt.NDArray[np.bool_], targets: npt.NDArray[np.bool_]) -> list[int]:
    """The cheapest chain of columns from a source to a target (Bellman-Ford; there are no negative cycles)."""
    distance = np.where(sources, 0.0, np.inf)
    before = np.full(len(move), -1)
    for _ in range(len(move)):
        through = distance[:, None] + move
        nearest = through.argmin(axis=0)
        reached = through[nearest, np.arange(len(move))]
        # Rounding must not make a cycle of moves that cost nothing.
        closer = reached < distance - 1e-12
        if not closer.any():
            break
        distance[closer], before[closer] = reached[closer], nearest[closer]
    path = [int(np.where(targets, distance, np.inf).argmin())]
    while before[path[0]] >= 0:
        path.insert(0, int(before[path[0]]))
    return path


def _refine(rows: Floats, centers: Floats) -> tuple[Labels, Floats, float]:
    """Balanced assignments and centres in turn, until the inertia stops falling."""
    best: tuple[Labels, Floats, float] | None = None
    for _ in range(MAX_ROUNDS):
        cost = (centers**2).sum(axis=1) - 2 * rows @ centers.T
        labels = balanced_assignment(cost)
        centers = _centers(rows, labels, len(centers))
        inertia = float(((rows - centers[labels]) ** 2).sum())
        if best is not None and inertia >= best[2] * (1 - 1e-9):
            break
        best = labels, centers, inertia
    assert best is not None
    return best


def _kmeans_centers(rows: Floats, n_clusters: int, seed: int) -> Floats:
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    # More clusters than distinct rows makes k-means warn; the balanced assignment does not mind.
    distinct = min(n_clusters, len(np.unique(rows, axis=0)))
    # Threads would add up their parts of a centre in the order in which they finish.
    with threadpool_limits(1, user_api="openmp"):
        found: Floats = KMeans(distinct, n_init=1, random_state=seed).fit(rows).cluster_centers_
    return np.concatenate([found, np.repeat(found[:1], n_clusters - distinct, axis=0)])


def _centers(rows: Floats, labels: Labels, n_clusters: int) -> Floats:
    """The mean of each cluster's rows; the origin for an empty one."""
    onehot = np.zeros((n_clusters, len(rows)))
    onehot[labels, np.arange(len(rows))] = 1.0
    means: Floats = onehot @ rows / np.maximum(onehot.sum(axis=1, keepdims=True), 1)
    return means


def _check(rows: Floats, n_clusters: int) -> None:
    if rows.ndim != 2 or len(rows) == 0:
        raise ValueError(f"x must be rows by columns, given shape {rows.shape}")
    if n_clusters < 1 or len(rows) % n_clusters:
        raise ValueError(f"{len(rows)} rows do not divide into {n_clusters} clusters of equal size")
    if not np.isfinite(rows).all():
        raise ValueError("x holds values that are not finite")
