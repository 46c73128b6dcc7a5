"""The centre router: experts are scored by the direction in which their neurons look."""

import torch
import torch.nn.functional as F
from torch import Tensor


def expert_centers(w_in: Tensor, experts: int) -> Tensor:
    """The centre of each expert: the mean of its L2-normalised input rows, scaled to unit norm.

    w_in [F, D] in expert order -> [E, D] (MoEfication, arXiv 2110.01786, section 3.3; SSD, section 4).
    """
    rows = F.normalize(w_in.detach(), dim=-1)
    return F.normalize(rows.view(experts, -1, rows.shape[-1]).mean(dim=1), dim=-1)


def top_k_experts(x: Tensor, centers: Tensor, k: int) -> Tensor:
    """The k experts with the largest dot product between token and centre: x [T, D] -> [T, K], unordered.

    The choice carries no gradient (expert outputs are not weighted by their scores) and is made in the
    centres' precision, under autocast too: neighbouring scores are often close.
    """
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        scores = x.to(centers.dtype) @ centers.T  # [T, E]
        return scores.topk(k, dim=-1, sorted=False).indices


def oracle_experts(mass: Tensor, k: int) -> Tensor:
    """The k experts with the largest activation mass [T, E] -> [T, K]: what a perfect router would choose."""
    return mass.topk(k, dim=-1, sorted=False).indices
