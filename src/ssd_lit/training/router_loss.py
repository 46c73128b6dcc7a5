"""What a trained router is fitted to: how much each expert really contributes to a token."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.ffn import ExpertFFN

Kind = Literal["mass", "norm"]


@torch.no_grad()
def contributions(ffn: ExpertFFN, x: Tensor, kind: Kind) -> Tensor:
    """What each expert contributes to tokens x [T, D], as [T, E].

    `mass`: its share of the token's activation mass (MoEfication, arXiv 2110.01786, section 3.3). `norm`: the L2 norm
    of its output (D2DMoE, arXiv 2310.04361, section 3.2), in units of the mean over tokens and experts.
    """
    if kind == "mass":
        mass = ffn.mass(x)
        return mass / mass.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
    norms = ffn.output_norms(x)
    return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)


def router_loss(scores: Tensor, contributed: Tensor, kind: Kind) -> Tensor:
    """How far a router's scores [T, E] are from the contributions [T, E]: cross-entropy, or mean squared error."""
    if kind == "mass":
        return F.cross_entropy(scores.clamp_min(1e-6).log(), contributed)
    return F.mse_loss(scores, contributed)
