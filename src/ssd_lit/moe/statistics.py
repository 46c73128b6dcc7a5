"""Sparsity of an FFN on given tokens, and balance of its experts."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_lit.moe.activations import EXACT_ZEROS
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.routing import Routing

NORM_SHARE = 0.95
"""Share of the norm of all contributions that the active neurons of a smooth activation must have."""


@torch.no_grad()
def active_neurons(ffn: ExpertFFN, x: Tensor) -> Tensor:
    """Which of the F neurons are active for each token: x [T, D] -> bool [T, F].

    In sparse mode only neurons of the chosen experts are. With ReLU or its square, a neuron is active if its activation
    is not zero (SSD, section 3). Other activations are hardly ever zero: there, neuron i contributes
    c_i = |h_i| * norm(w_out_i) to the output, and the active ones are the smallest set whose c has NORM_SHARE of the
    norm of all c.
    """
    hidden = ffn.activations(x)
    if ffn.mode == "sparse":
        on = chosen_mask(ffn.route(x), ffn.experts)
        hidden = (hidden.unflatten(-1, (ffn.experts, -1)) * on[:, :, None]).flatten(-2)
    if ffn.activation in EXACT_ZEROS:
        return hidden != 0
    energy = (hidden * ffn.w_out.norm(dim=-1)).square()
    largest = energy.sort(dim=-1, descending=True)
    before = largest.values.cumsum(dim=-1) - largest.values
    needed = before < NORM_SHARE**2 * energy.sum(dim=-1, keepdim=True)
    return torch.zeros_like(needed).scatter(1, largest.indices, needed)


def active_ratio(ffn: ExpertFFN, x: Tensor) -> float:
    """Fraction of the F neurons that are active for a token, averaged over x [T, D]."""
    return float(active_neurons(ffn, x).sum()) / (len(x) * ffn.d_ff)


def chosen_mask(routing: Routing, experts: int) -> Tensor:
    """The chosen experts as bool [T, E]."""
    mask = torch.zeros(len(routing.experts), experts + 1, dtype=torch.bool, device=routing.experts.device)
    return mask.scatter_(1, routing.experts, True)[:, :-1]


@torch.no_grad()
def expert_load(ffn: ExpertFFN, x: Tensor) -> Tensor:
    """Fraction [E] of the tokens x [T, D] that choose each expert; the sum is the mean number of experts."""
    return chosen_mask(ffn.route(x), ffn.experts).float().mean(dim=0)


def mean_k(ffns: Sequence[ExpertFFN]) -> float | None:
    """Experts a token, averaged over all that these FFNs computed with dynamic k since their mode was set.

    Or since a `Generator` read its last prompts. None where they computed nothing so. Waits for the device.
    """
    experts, tokens = torch.stack([ffn.tally for ffn in ffns]).sum(dim=0).tolist()
    return experts / tokens if tokens else None


def entropy(load: Tensor) -> Tensor:
    """The entropy in nats of expert loads [..., E] -> [...], each taken as a distribution."""
    fraction = load.double() / load.sum(dim=-1, keepdim=True)
    nats: Tensor = -torch.special.xlogy(fraction, fraction).sum(dim=-1)
    return nats


def load_entropy(load: Tensor) -> float:
    """Entropy of an expert load [E] divided by that of an even one: 1 is perfect balance, 0 a single expert."""
    return float(entropy(load)) / max(math.log(len(load)), 1e-12)


@torch.no_grad()
def routing_recall(ffn: ExpertFFN, x: Tensor) -> float:
    """Fraction of the oracle's activation mass that the chosen experts hold: x [T, D].

    The oracle takes as many experts of each token, those of the largest mass; 1 means that the router loses nothing
    against it.
    """
    mass, on = ffn.activation_mass(x).double(), chosen_mask(ffn.route(x), ffn.experts)
    chosen, largest = (mass * on).sum(), mass.sort(dim=-1, descending=True).values
    best = (largest * (torch.arange(ffn.experts, device=x.device) < on.sum(dim=-1, keepdim=True))).sum()
    # The same experts in another order may add up to a little more.
    return min(1.0, float(chosen / best.clamp_min(torch.finfo(best.dtype).tiny)))
