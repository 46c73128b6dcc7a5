"""How sparse an FFN is on given tokens, and how evenly its experts are used."""

import math

import torch
from torch import Tensor

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.router import oracle_experts, top_k_experts


@torch.no_grad()
def active_ratio(ffn: ExpertFFN, x: Tensor) -> float:
    """Share of the F neurons that fire (activation above zero) for a token, averaged over x [T, D].

    In sparse mode only neurons of the chosen experts can fire (SSD, section 3).
    """
    fires = ffn.activations(x) > 0
    if ffn.mode == "sparse":
        chosen = top_k_experts(x, ffn.centers, ffn.top_k)
        on = torch.zeros(len(x), ffn.experts, dtype=torch.bool, device=x.device).scatter_(1, chosen, True)
        fires = fires.unflatten(-1, (ffn.experts, -1)) & on[:, :, None]
    return float(fires.sum()) / (len(x) * ffn.d_ff)


@torch.no_grad()
def expert_load(ffn: ExpertFFN, x: Tensor) -> Tensor:
    """Share of the tokens x [T, D] that choose each expert, [E]; the shares add up to K."""
    chosen = top_k_experts(x, ffn.centers, ffn.top_k)
    return chosen.flatten().bincount(minlength=ffn.experts) / len(x)


def load_entropy(load: Tensor) -> float:
    """Entropy of an expert load [E] over that of an even one: 1 is perfect balance, 0 a single expert."""
    share = load.double() / load.sum()
    entropy = -torch.special.xlogy(share, share).sum()
    return float(entropy) / max(math.log(len(load)), 1e-12)


@torch.no_grad()
def routing_recall(ffn: ExpertFFN, x: Tensor) -> float:
    """Share of the activation mass that the router's K experts hold, over what the K best experts would hold.

    1 means that the router loses nothing against the oracle; x [T, D].
    """
    mass = ffn.activations(x).unflatten(-1, (ffn.experts, -1)).sum(-1)  # [T, E]
    found = mass.gather(1, top_k_experts(x, ffn.centers, ffn.top_k)).sum()
    best = mass.gather(1, oracle_experts(mass, ffn.top_k)).sum()
    return float(found / best.clamp_min(torch.finfo(best.dtype).tiny))
