"""The choice of experts by their scores: a fixed number, a scheduled one, or all above a threshold."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ssd_lit.moe import kernels
from ssd_lit.moe.names import ScheduleKind


class Routing(NamedTuple):
    """The experts of every token."""

    experts: Tensor
    """[T, K], distinct in a row; E fills the places of a token with fewer than K experts."""
    weights: Tensor | None = None
    """[T, K], the factors of the experts' outputs; None adds outputs without weights."""
    ragged: bool = False
    """Whether tokens may have fewer than K experts."""


def top_k_experts(scores: Tensor, k: int) -> Tensor:
    """The k experts with the largest scores [T, E] -> [T, K], unordered."""
    return scores.topk(k, dim=-1, sorted=False).indices


@torch.no_grad()
def top_k_products(x: Tensor, directions: Tensor, k: int) -> Tensor:
    """The k experts whose directions [E, D] have the largest dot products with x [T, D] -> [T, k], unordered.

    In the directions' precision, under autocast too: neighbouring products are often close.
    """
    if x.is_cuda and kernels.runs_on(x):
        from ssd_lit.moe.kernels.routing import route

        chosen: Tensor = route(x, directions, k)
        return chosen
    with torch.autocast(x.device.type, enabled=False):
        return top_k_experts(x.to(directions.dtype) @ directions.T, k)


def experts_above(scores: Tensor, share: float) -> Tensor:
    """The experts whose score is at least `share` of the token's largest one: [T, E] -> [T, E].

    Scores must not be negative; the best expert is always chosen. E fills the places of experts left out (dynamic k,
    D2DMoE, arXiv 2310.04361, section 3.3).
    """
    n_experts = scores.shape[-1]
    above = scores >= share * scores.amax(dim=-1, keepdim=True)
    return torch.where(above, torch.arange(n_experts, device=scores.device), n_experts)


def scheduled_k(step: int, steps: int, *, kind: ScheduleKind, start: int, end: int, stairs: int) -> int:
    """k at a step of a training of `steps`: from `start` at the first step to `end` at the last, up or down.

    linear and cosine follow those curves; step has `stairs` steps of equal length; constant is always `end`.
    SMoE-Dropout (arXiv 2303.01610) lets k grow linearly.
    """
    done = min(1.0, step / max(1, steps - 1))
    match kind:
        case "constant":
            done = 1.0
        case "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        case "step":
            done = min(stairs - 1, step * stairs // steps) / max(1, stairs - 1)
        case "linear":
            pass
    return math.floor(start + (end - start) * done + 0.5)
