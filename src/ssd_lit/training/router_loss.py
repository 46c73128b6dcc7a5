"""What a trained router is fitted to: how much each expert really contributes to a token."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.ffn import ExpertFFN


def router_loss(ffn: ExpertFFN, x: Tensor, kind: Literal["mass", "norm"]) -> Tensor:
    """How far the router's scores for tokens x [T, D] are from what its experts contribute; a scalar.

    `mass`: which share of the activation mass each expert holds, by cross-entropy (MoEfication, arXiv 2110.01786,
    section 3.3). `norm`: the L2 norm of each expert's output, by mean squared error, in units of the layer's mean norm
    (D2DMoE, arXiv 2310.04361, section 3.2).
    """
    if kind == "mass":
        mass = ffn.mass(x)
        share = mass / mass.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        return F.cross_entropy(ffn.router(x).clamp_min(1e-6).log(), share)
    norms = ffn.output_norms(x)
    return F.mse_loss(ffn.router(x), norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny))
