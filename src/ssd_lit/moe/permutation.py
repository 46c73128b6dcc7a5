"""MoEfication as a permutation: neurons and all their parameters and states move into expert order."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from ssd_lit.moe.ffn import ExpertFFN


@torch.no_grad()
def permute_neurons(ffn: ExpertFFN, order: Tensor, optimizer: Optimizer | None = None) -> None:
    """Put neuron `order[i]` at place i: weights, biases, ids and every per-neuron state of the optimiser.

    order: a permutation of 0..F-1. The dense function stays the same. Raises ValueError for anything else,
    or for an optimiser state that is neither a scalar nor shaped like its parameter.
    """
    if not torch.equal(order.sort().values.cpu(), torch.arange(ffn.d_ff)):
        raise ValueError(f"order is not a permutation of {ffn.d_ff} neurons")
    ffn.neuron_ids.copy_(ffn.neuron_ids[order])
    for parameter in ffn.neuron_parameters():
        _reorder(parameter, order)
        state = optimizer.state.get(parameter, {}) if optimizer else {}
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise ValueError(f"optimiser state {name!r} of shape {tuple(value.shape)} has no neuron order")
            _reorder(value, order.to(value.device))


def whole(value: Tensor) -> Tensor:
    """A tensor that may be divided among processes, all of which must ask for it: gathered."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _reorder(value: Tensor, order: Tensor) -> None:
    """Put row `order[i]` at place i; of a divided tensor in every process's part."""
    rows = whole(value)[order]
    if isinstance(value, DTensor):
        rows = distribute_tensor(rows, value.device_mesh, value.placements, src_data_rank=None)
    value.copy_(rows)


@torch.no_grad()
def moefy(ffn: ExpertFFN, labels: Tensor, optimizer: Optimizer | None = None) -> Tensor:
    """Group neurons by their cluster and update the router.

    labels [F]: the cluster of each neuron, E clusters of F/E neurons each. Returns the order [F]: the old place of the
    neuron now at i. Dense mode still computes the same function. Raises ValueError if the clusters are not of equal
    size.
    """
    size = ffn.d_ff // ffn.experts
    if labels.shape != (ffn.d_ff,) or not torch.equal(
        labels.cpu().bincount(minlength=ffn.experts), torch.full((ffn.experts,), size)
    ):
        raise ValueError(f"labels must put {size} of {ffn.d_ff} neurons into each of {ffn.experts} experts")
    order = labels.to(ffn.w_in.device).argsort(stable=True)
    permute_neurons(ffn, order, optimizer)
    ffn.router.on_permuted(whole(ffn.gating_weight))
    return order


@torch.no_grad()
def upcycle_into(source: ExpertFFN, target: ExpertFFN) -> None:
    """Make every expert of `target` a copy of the whole FFN `source` (sparse upcycling, arXiv 2212.05055).

    Raises ValueError if `target` does not hold E times the neurons of `source`.
    """
    if not target.upcycled or target.d_ff != target.experts * source.d_ff:
        raise ValueError(f"{target.experts} copies of {source.d_ff} neurons do not make {target.d_ff}")
    for copies, weight in zip(target.neuron_parameters(), source.neuron_parameters(), strict=True):
        copies.copy_(torch.cat([weight] * target.experts))
    if target.b_out is not None and source.b_out is not None:
        target.b_out.copy_(source.b_out)
