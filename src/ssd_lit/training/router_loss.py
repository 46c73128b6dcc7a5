"""What a trained router is fitted to: how much each expert really contributes to a token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.names import PosthocRouter


@torch.no_grad()
def contributions(ffn: ExpertFFN, x: Tensor, kind: PosthocRouter) -> Tensor:
    """What each expert contributes to tokens x [T, D], as [T, E].

    `mass_mlp` and `centers`: its share of the token's activation mass (MoEfication, arXiv 2110.01786, section 3.3).
    `norm_mlp`: the L2 norm of its output (D2DMoE, arXiv 2310.04361, section 3.2), in units of the mean over tokens and
    experts.
    """
    if kind == "norm_mlp":
        norms = ffn.output_norms(x)
        return norms / norms.mean().clamp_min(torch.finfo(norms.dtype).tiny)
    mass = ffn.activation_mass(x)
    return mass / mass.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)


def router_loss(scores: Tensor, contributed: Tensor, kind: PosthocRouter) -> Tensor:
    """How far a router's scores [T, E] are from the contributions [T, E]: cross-entropy, or mean squared error."""
    if kind == "norm_mlp":
        return F.mse_loss(scores, contributed)
    return F.cross_entropy(scores.clamp_min(1e-6).log(), contributed)
