"""Routers: scores of the experts for a token; the largest are chosen.

Every router takes tokens x [T, D] and returns scores [T, E]. All but the learned gate choose without a gradient: the
outputs of the chosen experts are added without weights.
"""

import math
from typing import get_args

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_lit.moe.names import PosthocRouter, RouterName


class Router(nn.Module):
    """Base class of routers."""

    weighted = False
    """Whether outputs of experts are multiplied by the softmax of their scores."""
    non_negative = False
    """Whether no score is negative, so that a share of the best one says something (dynamic k)."""

    def expert_vectors(self) -> Tensor | None:
        """Vectors [E, D] whose dot products with a token rank the experts; None for other routers.

        Scores are those products, or where they are `non_negative` the softplus of them.
        """
        return None

    def on_permuted(self, rows: Tensor) -> None:
        """Update for new experts, whose input rows are now [F, D] in expert order."""

    def init_trainable(self, rows: Tensor) -> None:
        """Initialise for training after the model, for experts whose input rows are [F, D]."""


class CenterRouter(Router):
    """Scores an expert by the dot product of the token and the expert's centre (MoEfication, SSD section 4)."""

    centers: Tensor

    def __init__(self, d_model: int, experts: int):
        super().__init__()
        self.register_buffer("centers", torch.zeros(experts, d_model))

    def expert_vectors(self) -> Tensor:
        return self.centers

    @torch.no_grad()
    def on_permuted(self, rows: Tensor) -> None:
        self.centers.copy_(expert_centers(rows, len(self.centers)))

    def forward(self, x: Tensor) -> Tensor:
        return _products(x, self.centers)


class RandomRouter(Router):
    """A random projection that never changes (SMoE-Dropout, arXiv 2303.01610, section 3.2)."""

    projection: Tensor

    def __init__(self, d_model: int, experts: int):
        super().__init__()
        self.register_buffer("projection", torch.randn(experts, d_model) / math.sqrt(d_model))

    def expert_vectors(self) -> Tensor:
        return self.projection

    def forward(self, x: Tensor) -> Tensor:
        return _products(x, self.projection)


class GateRouter(Router):
    """A gate trained with the model: its logits choose, and their softmax over the chosen weighs the outputs.

    (Shazeer et al., arXiv 1701.06538; Switch Transformer, arXiv 2101.03961.)
    """

    weighted = True

    def __init__(self, d_model: int, experts: int):
        super().__init__()
        self.gate = nn.Parameter(torch.randn(experts, d_model) * 0.02)

    def expert_vectors(self) -> Tensor:
        return self.gate.detach()

    def forward(self, x: Tensor) -> Tensor:
        # In full precision under autocast too: a softmax over experts suffers from rounding (Switch, section 2.4).
        with torch.autocast(x.device.type, enabled=False):
            return x.to(self.gate.dtype) @ self.gate.T


class PredictorRouter(Router):
    """A small MLP that predicts how much each expert contributes to a token; never negative.

    It is trained after the model, which stays fixed: on the experts' activation mass (MoEfication, section 3.3;
    DejaVu, arXiv 2310.17157) or on the norm of their outputs (D2DMoE, arXiv 2310.04361, section 3.2).
    """

    non_negative = True

    def __init__(self, d_model: int, experts: int, hidden: int):
        super().__init__()
        self.w_in = nn.Parameter(torch.empty(hidden, d_model))
        self.b_in = nn.Parameter(torch.zeros(hidden))
        self.w_out = nn.Parameter(torch.empty(experts, hidden))
        self.b_out = nn.Parameter(torch.zeros(experts))
        for weight in (self.w_in, self.w_out):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            hidden = F.relu(F.linear(x.to(self.w_in.dtype), self.w_in, self.b_in))
            return F.softplus(F.linear(hidden, self.w_out, self.b_out))


class TrainedCenterRouter(Router):
    """A vector for each expert, initially its centre; a score is the softplus of its dot product with a token.

    It is trained after the model, which stays fixed, on the experts' activation mass. Ours: costs the same as centres.
    """

    non_negative = True

    def __init__(self, d_model: int, experts: int):
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(experts, d_model))

    def expert_vectors(self) -> Tensor:
        # Softplus is monotonic: dot products and scores choose the same experts.
        return self.weights.detach()

    @torch.no_grad()
    def init_trainable(self, rows: Tensor) -> None:
        self.weights.copy_(expert_centers(rows, len(self.weights)))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.softplus(x.to(self.weights.dtype) @ self.weights.T)


def build_router(name: str, d_model: int, experts: int, hidden: int) -> Router:
    """Returns the router of that name; `hidden` is the width of an MLP. Raises ValueError for an unknown name."""
    match name:
        case "center":
            return CenterRouter(d_model, experts)
        case "random":
            return RandomRouter(d_model, experts)
        case "gate":
            return GateRouter(d_model, experts)
        case "mass_mlp" | "norm_mlp":
            return PredictorRouter(d_model, experts, hidden)
        case "centers":
            return TrainedCenterRouter(d_model, experts)
    raise ValueError(f"router {name!r}: allowed are {', '.join((*get_args(RouterName), *get_args(PosthocRouter)))}")


def expert_centers(rows: Tensor, experts: int) -> Tensor:
    """The centre of each expert: the mean of its L2-normalised input rows, scaled to unit norm.

    rows [F, D] in expert order -> [E, D] (MoEfication, arXiv 2110.01786, section 3.3; SSD, section 4).
    """
    rows = F.normalize(rows.detach(), dim=-1)
    return F.normalize(rows.view(experts, -1, rows.shape[-1]).mean(dim=1), dim=-1)


def expert_choices(chosen: Tensor, experts: int) -> Tensor:
    """The share [E] of each of E experts in the choices [T, K], over all processes that train together."""
    # Not bincount, for which the host waits for the GPU.
    ones = torch.zeros(len(chosen), experts, device=chosen.device).scatter(1, chosen, 1.0)
    share = ones.sum(dim=0) / chosen.numel()
    if dist.is_available() and dist.is_initialized():
        share = collectives.all_reduce(share, "sum", dist.group.WORLD) / dist.get_world_size()  # type: ignore[arg-type]
    return share


def gate_losses(scores: Tensor, choices: Tensor) -> tuple[Tensor, Tensor]:
    """The load-balancing loss and the z-loss of a learned gate: scores [T, E], choices [E] -> two scalars.

    The first is E times the sum over experts of their share of the batch's choices and their mean probability, 1 when
    both are even (Switch, section 2.2); the second the mean squared log of the softmax's denominator, which keeps
    logits small (ST-MoE, arXiv 2202.08906, section 3.3).
    """
    balance = scores.shape[-1] * (choices * scores.softmax(dim=-1).mean(dim=0)).sum()
    return balance, scores.logsumexp(dim=-1).square().mean()


def _products(x: Tensor, directions: Tensor) -> Tensor:
    """Dot products in the directions' precision, under autocast too: neighbouring scores are often close."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return x.to(directions.dtype) @ directions.T
