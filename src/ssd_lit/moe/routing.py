"""The choice of experts by their scores: a fixed number, a scheduled one, or all above a threshold."""

import math
from numbers import Integral
from typing import NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe import kernels
from ssd_lit.moe.names import PosthocRouter, ScheduleKind


class Routing(NamedTuple):
    """The experts of every token."""

    experts: Tensor
    """[T, K], distinct in a row; E fills the last places of a token with fewer than K experts (dynamic k)."""
    weights: Tensor | None = None
    """[T, K], the factors of the experts' outputs; None adds outputs without weights."""
    ragged: bool = False
    """Whether tokens may have fewer than K experts."""


def check_choice(experts: int, top_k: int | None, threshold: float | None, *, non_negative: bool) -> None:
    """Raise ValueError unless E experts can be chosen so: by neither, a fixed k or a threshold of the best score.

    `non_negative` says whether the router's scores are; of others a share of the best one means nothing.
    """
    if top_k is not None and not (_is_whole(top_k) and 1 <= top_k <= experts):
        raise ValueError(f"top_k {top_k}: allowed are 1 to {experts}")
    if threshold is None:
        return
    if top_k is not None:
        raise ValueError(f"top_k {top_k} and threshold {threshold}: give one of them")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold}: allowed are 0 to 1")
    if not non_negative:
        raise ValueError(
            f"threshold {threshold}: a share of the best score, and scores of this router can be negative; allowed "
            f"with the routers {', '.join(get_args(PosthocRouter))}"
        )


def _is_whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)


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

    Scores must not be negative; the best expert is always chosen. The chosen come first, and E fills the places behind
    them (dynamic k, D2DMoE, arXiv 2310.04361, section 3.3).
    """
    largest, experts = scores.sort(dim=-1, descending=True)
    return experts.masked_fill_(largest < share * largest[:, :1], scores.shape[-1])


@torch.no_grad()
def scores_above(scores: Tensor, share: float, tally: Tensor | None = None) -> Tensor:
    """`experts_above`, in one kernel on a GPU; adds the numbers of chosen experts and of tokens to tally [2], int64."""
    if scores.is_cuda and kernels.runs_on(scores):
        from ssd_lit.moe.kernels.dynamic_k import select_above

        return select_above(scores, share, tally)
    chosen = experts_above(scores, share)
    if tally is not None:
        tally[0].add_((chosen < scores.shape[-1]).sum())
        tally[1].add_(len(chosen))
    return chosen


@torch.no_grad()
def softplus_above(x: Tensor, directions: Tensor, share: float, tally: Tensor | None = None) -> Tensor:
    """`scores_above` of the softplus of the dot products of x [T, D] and directions [E, D], in their precision."""
    if x.is_cuda and kernels.runs_on(x):
        from ssd_lit.moe.kernels.dynamic_k import route_above

        return route_above(x, directions, share, tally)
    with torch.autocast(x.device.type, enabled=False):
        return scores_above(F.softplus(x.to(directions.dtype) @ directions.T), share, tally)


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
