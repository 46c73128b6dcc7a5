"""The FFN with its neurons in expert order: one set of weights, run densely or as a Mixture of Experts."""

import math
from collections.abc import Iterator
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_lit.moe.backends import Activation, Experts, choose_backend
from ssd_lit.moe.names import Mode, allowed_experts
from ssd_lit.moe.routers import Router, expert_choices, gate_losses
from ssd_lit.moe.routing import Routing, check_choice, scores_above, softplus_above, top_k_experts, top_k_products


class ExpertFFN(nn.Module):
    """A Transformer FFN that keeps its neurons in expert order.

    Dense, it is `h @ w_out + b_out` with h = act(x @ w_in.T + b_in), or where it is gated
    h = act(x @ w_gate.T + b_gate) * (x @ w_in.T + b_in). Expert e owns rows e*H to (e+1)*H of `w_in`, `w_gate`, their
    biases and `w_out`, so every expert is a view and
    nothing is copied when the mode changes. In sparse mode the outputs of the chosen experts are added without
    weights (SSD, section 4): with all experts chosen, sparse equals dense. A learned router weighs them; its weights
    add up to the number of experts chosen, so that equal weights add them as they are.

    Experts may also be copies of one whole FFN (sparse upcycling) instead of slices of it: weights then add up to
    one, and there is no dense mode.

    Shapes: x [..., D]; w_in, w_gate and w_out [F, D]; b_in and b_gate [F]; b_out [D]; neuron_ids [F].
    """

    neuron_ids: Tensor
    """The original place of each neuron; permuted with the neurons."""
    tally: Tensor
    """[2] int64: experts and tokens computed with dynamic k since `set_mode`, or since a generator read its prompts."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        top_k: int,
        experts: int,
        router: Router,
        activation: str = "relu",
        gated: bool = False,
        bias: bool = True,
        gate_bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        backend: str = "auto",
        upcycled: bool = False,
    ):
        super().__init__()
        if d_ff % experts:
            raise ValueError(f"d_ff {d_ff} is not divisible by experts {experts}; allowed: {allowed_experts(d_ff)}")
        self.experts = experts
        self.top_k = top_k
        self.threshold: float | None = None
        """Dynamic k: take every expert whose score is at least this share of the best one's, instead of top_k."""
        self.oracle = False
        """In sparse mode, choose by the true activation mass, which a router can only predict."""
        self.activation = activation
        self.backend = backend
        self.upcycled = upcycled
        self.mode: Mode = "dense"
        bound = 1 / math.sqrt(d_model)
        self.w_in = nn.Parameter(torch.empty(d_ff, d_model).uniform_(-bound, bound))
        self.w_gate = nn.Parameter(torch.empty(d_ff, d_model).uniform_(-bound, bound)) if gated else None
        self.b_in = nn.Parameter(torch.zeros(d_ff)) if bias else None
        self.b_gate = nn.Parameter(torch.zeros(d_ff)) if gate_bias else None
        self.w_out = nn.Parameter(torch.empty(d_ff, d_model).uniform_(-bound, bound))
        self.b_out = nn.Parameter(torch.zeros(d_model)) if bias else None
        self.dropout = nn.Dropout(dropout)
        self.hidden_dropout = nn.Dropout(hidden_dropout)
        self.router = router
        self.gate_losses: tuple[Tensor, Tensor] | None = None
        """Load-balancing loss and z-loss of the last sparse forward pass in training, with a learned router."""
        self.choices: Tensor | None = None
        """The share [E] of each expert in the choices of that pass, over all processes that train together."""
        self.load: Tensor | None = None
        """That share over the whole batch, where a pass sees only a piece of it."""
        self.register_buffer("neuron_ids", torch.arange(d_ff))
        # A tensor, so that it counts inside CUDA graphs.
        self.register_buffer("tally", torch.zeros(2, dtype=torch.int64), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        # Of the last pass, with its gradient's graph, which cannot be copied.
        return {**vars(self), "gate_losses": None, "choices": None, "load": None}

    @property
    def d_ff(self) -> int:
        return self.w_in.shape[0]

    @property
    def gating_weight(self) -> Tensor:
        """The input weights [F, D] that decide whether a neuron fires: those of the gate where there is one."""
        return self.w_in if self.w_gate is None else self.w_gate

    def neuron_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters whose first dimension counts neurons."""
        yield from (p for p in (self.w_in, self.w_gate, self.b_in, self.b_gate, self.w_out) if p is not None)

    def set_mode(self, mode: Mode, top_k: int | None = None, threshold: float | None = None) -> None:
        """Run densely, or sparsely with `top_k` experts a token, or with dynamic k by a threshold.

        With a threshold a token takes every expert whose score is at least this share of its best one's. With neither,
        the choice stays what it was. Raises ValueError for both, for a mode or number that is not allowed, and for a
        threshold if the router's scores can be negative.
        """
        if mode not in get_args(Mode):
            raise ValueError(f"mode {mode!r}: allowed are {', '.join(get_args(Mode))}")
        k = self.top_k if top_k is None else top_k
        check_choice(self.experts, top_k, threshold, non_negative=self.router.non_negative)
        if self.threshold is not None or threshold is not None:
            self.tally.zero_()
        if top_k is not None or threshold is not None:
            self.threshold = threshold
        self.mode, self.top_k = mode, k

    def activations(self, x: Tensor) -> Tensor:
        """Every neuron's activation, [..., F], in either mode."""
        gate = None if self.w_gate is None else F.linear(x, self.w_gate, self.b_gate)
        return Activation(self.activation)(F.linear(x, self.w_in, self.b_in), gate)

    @torch.no_grad()
    def activation_mass(self, x: Tensor) -> Tensor:
        """The activation mass of each expert: the sum of its neurons' absolute activations, [T, D] -> [T, E]."""
        mass: Tensor = self.activations(x).abs().unflatten(-1, (self.experts, -1)).sum(-1)
        return mass

    @torch.no_grad()
    def output_norms(self, x: Tensor) -> Tensor:
        """The L2 norm of each expert's output, [T, D] -> [T, E]."""
        hidden = self.activations(x).unflatten(-1, (self.experts, -1))  # [T, E, H]
        w_out = self.w_out.unflatten(0, (self.experts, -1))  # [E, H, D]
        # From the experts' Gram matrices: the outputs of all experts for all tokens would be [T, E, D].
        gram = torch.einsum("ehd,egd->ehg", w_out, w_out)
        squares: Tensor = (torch.einsum("teh,ehg->teg", hidden, gram) * hidden).sum(dim=-1)
        return squares.clamp_min(0).sqrt()

    def route(self, x: Tensor, tally: Tensor | None = None) -> Routing:
        """The experts that each token of x [T, D] runs through in sparse mode, and their weights.

        With dynamic k, the numbers of experts and of tokens are added to `tally` [2].
        """
        directions = self.router.expert_vectors()
        if self.threshold is not None:
            if directions is not None and not self.oracle:
                return Routing(softplus_above(x, directions, self.threshold, tally), ragged=True)
            scores = self.activation_mass(x) if self.oracle else self.router(x)
            return Routing(scores_above(scores, self.threshold, tally), ragged=True)
        if self.oracle:
            chosen = top_k_experts(self.activation_mass(x), self.top_k)
        elif directions is not None:
            chosen = top_k_products(x, directions, self.top_k)
        else:
            chosen = top_k_experts(self.router(x), self.top_k)
        if not self.router.weighted:
            return Routing(chosen)
        scores = self.router(x)
        if self.training:
            self.choices = expert_choices(chosen, self.experts)
            self.gate_losses = gate_losses(scores, self.choices if self.load is None else self.load)
        total = 1 if self.upcycled else self.top_k
        return Routing(chosen, total * scores.gather(1, chosen).softmax(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "sparse" and not self.chooses_all:
            y = self._sparse(x.reshape(-1, x.shape[-1])).view_as(x)
        elif self.upcycled:
            raise ValueError("experts that are copies of one FFN have no dense mode")
        else:
            y = self.hidden_dropout(self.activations(x)) @ self.w_out
            y = y if self.b_out is None else y + self.b_out
        out: Tensor = self.dropout(y)
        return out

    @property
    def chooses_all(self) -> bool:
        """Whether all experts run with equal weights, which is the dense FFN."""
        return self.top_k == self.experts and self.threshold is None and not self.router.weighted and not self.upcycled

    def by_expert(self) -> Experts:
        """The neurons of every expert, as views of the weights."""

        def view(part: Tensor) -> Tensor:
            return part.view(self.experts, -1, *part.shape[1:])

        b_in, w_gate, b_gate = (None if p is None else view(p) for p in (self.b_in, self.w_gate, self.b_gate))
        return Experts(view(self.w_in), view(self.w_out), b_in, w_gate, b_gate, self.b_out)

    def _sparse(self, x: Tensor) -> Tensor:
        activation = Activation(self.activation, self.hidden_dropout.p if self.training else 0.0)
        # Autocast covers torch's matrix products but not the backends. The router gets the same input as the experts.
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w_in.dtype)
        routing = self.route(x, self.tally)
        experts = self.by_expert()
        weighted = routing.weights is not None
        backend = choose_backend(self.backend, x, experts, activation, weighted=weighted, ragged=routing.ragged)
        return backend(x, routing, experts, activation)
