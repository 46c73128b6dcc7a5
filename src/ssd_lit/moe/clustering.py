"""Balanced clustering of neurons: E clusters of exactly F/E rows each.

k-means with an exact balanced assignment, as MoEfication groups neurons (arXiv 2110.01786, section 3.2) and SSD
does at every switch (arXiv 2410.03440, section 4). Shape letters: L layers, S starts, n rows, D columns, E clusters.

Most rounds of k-means are drafts whose assignments are only nearly balanced; a few exact rounds follow them.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.assignment import TEMPERATURES, assign, centred_costs, find_prices, in_kernels, nearest
from ssd_lit.moe.graphs import replayed

SEED_ROWS = 48
"""Rows for each cluster among which its first centre is sought."""

KMEANS_ROUNDS = 12
"""Rounds of plain k-means before the balanced ones, which cost more."""

DRAFT_ROUNDS = 10
"""Rounds whose clusters are only nearly equal in size; each costs a fraction of an exact one."""

KMEANS_STRIDE = 1.8
"""Centres go this many times the way to the means of their rows: rows follow, so the means move on the same way. It
halves the rounds. In balanced rounds it ends at worse clusters where many rows are alike."""

EXACT_ROUNDS = 8
"""Balanced rounds after the drafts, at most."""

LEAST_GAIN = 1e-5
"""Exact rounds go on while each lowers the inertia by more than this share."""

FIRST_TEMPERATURES = TEMPERATURES[:9:2]
"""Temperatures of the first draft, which starts from no prices; one step at each."""

DRAFT_TEMPERATURES = TEMPERATURES[5:9:3]
"""Temperatures of a draft that starts from the previous draft's prices. Fewer leave columns far from
balance."""


class Clustering(NamedTuple):
    """Rows put into clusters of equal size."""

    labels: Tensor
    """[n] on the CPU, the cluster of each row."""
    centers: Tensor
    """[E, D] on the device of the rows, the mean of each cluster's rows."""
    inertia: float
    """Sum of squared distances from the rows to their centres."""


def normalised_rows(weights: Tensor) -> Tensor:
    """Rows [F, D] scaled to unit length, in float64 on the CPU; rows of zeros stay."""
    return F.normalize(weights.detach().cpu().double(), dim=-1)


def balanced_kmeans(x: Tensor, n_clusters: int, *, init: Tensor | None = None, seed: int = 0) -> Clustering:
    """Put the rows of x [n, D] into `n_clusters` clusters of exactly n / n_clusters rows.

    A cold start (k-means, then balanced assignments and centres in turn until the inertia stops falling) always runs.
    With `init`, labels [n] of an earlier balanced clustering, there is also a warm start from them. The better one is
    returned, the warm one if they tie. Runs on the device of x and in its precision, float32 or float64; the
    assignments, and the inertia by which starts are compared, are in float64. The same arguments give the same result,
    on a CPU for any number of threads, and the global random state is not used. Raises ValueError if n is not divisible
    by `n_clusters`, if x is not finite, or if `init` does not give a cluster for every row.
    """
    return balanced_kmeans_layers([x], n_clusters, init=None if init is None else [init], seed=seed)[0]


def balanced_kmeans_layers(
    layers: Iterable[Tensor], n_clusters: int, *, init: Sequence[Tensor] | None = None, seed: int = 0
) -> list[Clustering]:
    """`balanced_kmeans` of the rows [n, D] of every layer; neighbours of the same shape are computed together.

    Holds only those layers that it computes together.
    """
    starts = iter(init or [])
    clusterings: list[Clustering] = []
    with _one_thread():
        for group in _groups(layers):
            for x in group:
                _check(x, n_clusters)
            rows = torch.stack([x.detach() for x in group])
            if not rows.isfinite().all():
                raise ValueError("x holds values that are not finite")
            warm = None
            if init is not None:
                labels = list(itertools.islice(starts, len(group)))
                _check_labels(labels, group, n_clusters)
                warm = torch.stack(labels).to(group[0].device)
            clusterings += _cluster(rows, n_clusters, warm, seed)
    if next(starts, None) is not None:
        raise ValueError(f"init has labels of {len(init or [])} layers, and there are {len(clusterings)}")
    return clusterings


def _check_labels(labels: Sequence[Tensor], group: Sequence[Tensor], n_clusters: int) -> None:
    for x, own in zip(group, labels, strict=True):
        if own.shape != (len(x),) or not 0 <= int(own.min()) <= int(own.max()) < n_clusters:
            raise ValueError(f"init must give one of {n_clusters} clusters for each of {len(x)} rows")


@contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread: sums round differently with another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def random_balanced(n: int, n_clusters: int, *, seed: int = 0) -> Tensor:
    """Labels [n] of random clusters of equal size; the same for the same seed."""
    if n_clusters < 1 or n % n_clusters:
        raise ValueError(f"{n} rows do not divide into {n_clusters} clusters of equal size")
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(n) % n_clusters))


def _groups(layers: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Layers to compute together: neighbours of the same shape, and as many as is fast and fits."""
    group: list[Tensor] = []
    for x in layers:
        # On a CPU groups are faster only where calls cost more than the work; a GPU needs them, up to 1 GiB of float32.
        count = max(1, (2**28 if x.is_cuda else 2**20) // max(1, x.numel()))
        if group and (
            len(group) >= count or (x.shape, x.dtype, x.device) != (group[0].shape, group[0].dtype, group[0].device)
        ):
            yield group
            group = []
        group.append(x)
    if group:
        yield group


def _cluster(x: Tensor, n_clusters: int, init: Tensor | None, seed: int) -> Iterator[Clustering]:
    """x [L, n, D], init [L, n]."""
    noise = _seed_noise(x.shape[1], n_clusters, seed).to(x)
    inputs = [x, noise] if init is None else [x, noise, init]
    drafts = replayed(_drafts, n_clusters, inputs) if in_kernels(x, n_clusters) else _drafts(n_clusters, *inputs)
    candidates = _refine(x, drafts, init)
    means = _centers(x, candidates, n_clusters)
    # One transfer for all layers: each makes a GPU wait.
    inertias = _exact_inertia(x, means, candidates).tolist()
    for labels, centers, inertia in zip(candidates.cpu(), means, inertias, strict=True):
        # The warm start is last; min returns the first of equals.
        best = min(reversed(range(len(labels))), key=inertia.__getitem__)
        yield Clustering(labels[best], centers[best], inertia[best])


def _drafts(n_clusters: int, x: Tensor, noise: Tensor, init: Tensor | None = None) -> Tensor:
    """Centres [L, S, E, D] of nearly balanced clusters of x [L, n, D]: from nothing, and from labels init [L, n]."""
    centers = _kmeans(x, _seeds(x, noise))[:, None]
    if init is not None:
        centers = torch.cat([centers, _centers(x, init[:, None], n_clusters)], dim=1)
    return _draft(x, centers)


def _exact_inertia(x: Tensor, centers: Tensor, labels: Tensor) -> Tensor:
    """Inertia [L, S] of labels [L, S, n] about centers [L, S, E, D], in float64, for the result and comparisons."""
    layers, starts, n = labels.shape
    means = centers.double()
    layer = torch.arange(layers, device=x.device)[:, None, None]
    start = torch.arange(starts, device=x.device)[:, None]
    inertia = means.new_zeros(layers, starts)
    # On a CPU a few rows at a time, which stay in the cache; on a GPU as much as fits into 1 GiB.
    depth, length = (max(1, 2**25 // (starts * x[0].numel())), n) if x.is_cuda else (1, 128)
    for i, j in itertools.product(range(0, layers, depth), range(0, n, length)):
        part, rows = slice(i, i + depth), slice(j, j + length)
        nearest = means[layer[part], start, labels[part, :, rows]]
        inertia[part] += (x[part, None, rows].double() - nearest).square().sum((2, 3))
    return inertia


def _seed_noise(n: int, n_clusters: int, seed: int) -> Tensor:
    """Exponential noise [E, trials, n / stride], for `_seeds`."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(range(0, n, _stride(n, n_clusters)))
    # `exponential_` takes several times as long.
    return torch.rand(n_clusters, 2 + int(math.log(n_clusters)), rows, generator=generator).log_().neg_()


def _stride(n: int, n_clusters: int) -> int:
    """Of n rows, each that many rows apart may become a first centre."""
    return max(1, n // (SEED_ROWS * n_clusters))


def _seeds(x: Tensor, noise: Tensor) -> Tensor:
    """Rows [L, E, D] as first centres, one after the other: of a few rows drawn, the one that lowers inertia most.

    Greedy k-means++ (Arthur and Vassilvitskii, 2007): a row is drawn with a probability proportional to its squared
    distance to the centres so far. The row with the smallest (exponential noise / weight) is such a draw. The noise is
    drawn on the CPU and is the same for all layers, so that a layer's result does not depend on the others.
    """
    n_clusters = len(noise)
    x = x[:, :: _stride(x.shape[1], n_clusters)].contiguous()
    layers = len(x)
    layer = torch.arange(layers, device=x.device)
    squares = x.square().sum(-1)
    distance = torch.ones_like(squares)
    seeds = x.new_empty(layers, n_clusters, x.shape[-1])
    for e in range(n_clusters):
        drawn = (noise[e] / distance[:, None]).argmin(-1)
        rows = x[layer[:, None], drawn]
        products = (x @ rows.mT).mT
        reached = (squares[:, None] + squares.gather(1, drawn)[..., None] - 2 * products).clamp(min=0)
        if e > 0:
            reached = torch.minimum(reached, distance[:, None])
        best = reached.sum(-1).argmin(-1)
        seeds[:, e], distance = rows[layer, best], reached[layer, best]
    return seeds


def _kmeans(x: Tensor, centers: Tensor) -> Tensor:
    """Lloyd's rounds from centers [L, E, D], with longer strides; an empty cluster keeps its centre."""
    for _ in range(KMEANS_ROUNDS):
        labels = nearest(_costs(x, centers[:, None]))
        means = _centers(x, labels, centers.shape[1])[:, 0]
        empty = _counts(labels, centers.shape[1])[:, 0] == 0
        centers = torch.where(empty[..., None], centers, centers.lerp(means, KMEANS_STRIDE))
    return centers


def _refine(x: Tensor, centers: Tensor, init: Tensor | None) -> Tensor:
    """Exact balanced assignments and centres in turn; labels [L, S, n] of the best round.

    x [L, n, D], centers [L, S, E, D] of the drafts. `init`, the labels [L, n] that the last start began with, is kept
    if an exact round from it does not gain, or if no later round does.
    """
    layers, starts, n_clusters, _ = centers.shape
    labels = torch.zeros(layers, starts, x.shape[1], dtype=torch.long, device=x.device)
    squares = torch.linalg.vector_norm(x, dim=-1).double().square().sum(-1, keepdim=True)
    inertia = torch.full((layers, starts), torch.inf, dtype=torch.float64, device=x.device)
    going = torch.ones_like(inertia, dtype=torch.bool)
    if init is not None:
        labels[:, -1] = init
        before = _centers(x, init[:, None], n_clusters)
        inertia[:, -1:] = _inertia(squares, before, x.shape[1])
        # If it has converged, its drafts could only be worse.
        means = _centers(x, assign(_costs(x, before).flatten(0, 1))[0].view(layers, 1, -1), n_clusters)
        going[:, -1:] = _inertia(squares, means, x.shape[1]) < inertia[:, -1:] * (1 - LEAST_GAIN)
    prices = None
    for _ in range(EXACT_ROUNDS):
        found, prices = assign(_costs(x, centers).flatten(0, 1), prices)
        new = found.view_as(labels)
        centers = _centers(x, new, n_clusters)
        reached = _inertia(squares, centers, x.shape[1])
        going &= reached < inertia * (1 - LEAST_GAIN)
        labels = torch.where(going[..., None], new, labels)
        inertia = torch.where(going, reached, inertia)
        if not going.any():
            break
    return labels


def _inertia(squares: Tensor, centers: Tensor, n: int) -> Tensor:
    """Inertia [L, S] of balanced clusters of n rows with means [L, S, E, D], without a pass over the rows.

    squares [L, 1]: sum of the rows' squared lengths.
    """
    return squares - n // centers.shape[2] * centers.double().square().sum((2, 3))


def _draft(x: Tensor, centers: Tensor) -> Tensor:
    """Better centres [L, S, E, D] from rounds whose clusters are only nearly equal in size.

    Centres move little between two rounds, so each round takes few steps from the previous round's prices; rows left in
    the wrong cluster stay there. Nothing is read back from a GPU, so it never waits.
    """
    layers, starts, n_clusters, _ = centers.shape
    prices = x.new_zeros(layers * starts, n_clusters)
    for number in range(DRAFT_ROUNDS):
        cost = centred_costs(_costs(x, centers).flatten(0, 1))
        prices = find_prices(cost, prices, DRAFT_TEMPERATURES if number else FIRST_TEMPERATURES)
        labels = nearest(cost - prices[:, None]).view(layers, starts, -1)
        centers = _centers(x, labels, n_clusters)
    return centers


def _costs(x: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [L, S, n, E] from x [L, n, D] to centers [L, S, E, D], less the squared lengths of x."""
    layers, starts, n_clusters, _ = centers.shape
    flat = centers.flatten(1, 2)
    costs = torch.baddbmm(flat.square().sum(-1)[:, None], x, flat.mT, alpha=-2)
    return costs.view(layers, -1, starts, n_clusters).transpose(1, 2)


def _centers(x: Tensor, labels: Tensor, n_clusters: int) -> Tensor:
    """The mean [L, S, E, D] of each cluster's rows, for labels [L, S, n]; the origin for an empty one."""
    layers, starts, n = labels.shape
    sums = x.new_zeros(layers, starts, n_clusters, x.shape[-1])
    if x.is_cuda:
        # A matrix product adds in a fixed order; index_add does not.
        member = (labels[:, :, None] == torch.arange(n_clusters, device=x.device)[:, None]).to(x.dtype)
        sums = (member.view(layers, -1, n) @ x).view_as(sums)
    else:
        for own, rows, layer_sums in zip(labels, x, sums, strict=True):
            for start, start_sums in zip(own, layer_sums, strict=True):
                start_sums.index_add_(0, start, rows)
    return sums / _counts(labels, n_clusters).clamp(min=1)[..., None]


def _counts(labels: Tensor, n_clusters: int) -> Tensor:
    """Rows [L, S, E] in each cluster, for labels [L, S, n]."""
    if labels.is_cuda:
        return (labels[..., None] == torch.arange(n_clusters, device=labels.device)).sum(-2)
    return torch.stack([own.bincount(minlength=n_clusters) for own in labels.flatten(0, 1)]).view(*labels.shape[:2], -1)


def _check(x: Tensor, n_clusters: int) -> None:
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x must be rows by columns, given shape {tuple(x.shape)}")
    if n_clusters < 1 or len(x) % n_clusters:
        raise ValueError(f"{len(x)} rows do not divide into {n_clusters} clusters of equal size")
