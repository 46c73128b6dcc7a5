"""The FFN whose neurons stand in expert order: one set of weights, run densely or as a Mixture of Experts."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_lit.moe.backends import choose_backend
from ssd_lit.moe.router import top_k_experts

Mode = Literal["dense", "sparse"]


class ExpertFFN(nn.Module):
    """A Transformer FFN, `relu(x @ w_in.T + b_in) @ w_out + b_out`, that keeps its neurons in expert order.

    Expert e owns rows e*H to (e+1)*H of `w_in`, `b_in` and `w_out`, so every expert is a view and nothing is
    copied when the mode changes. In sparse mode the outputs of the chosen experts are added without weights
    (SSD, section 4): with all experts chosen, sparse equals dense.

    Shapes: x [..., D]; w_in and w_out [F, D]; b_in [F]; b_out [D]; centers [E, D].
    """

    centers: Tensor

    def __init__(self, d_model: int, d_ff: int, *, experts: int, top_k: int, dropout: float, backend: str):
        super().__init__()
        if d_ff % experts:
            raise ValueError(f"d_ff {d_ff} is not divisible by experts {experts}")
        self.experts = experts
        self.top_k = top_k
        self.backend = backend
        self.mode: Mode = "dense"
        self.w_in = nn.Parameter(torch.empty(d_ff, d_model))
        self.b_in = nn.Parameter(torch.zeros(d_ff))
        self.w_out = nn.Parameter(torch.empty(d_ff, d_model))
        self.b_out = nn.Parameter(torch.zeros(d_model))
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("centers", torch.zeros(experts, d_model))
        bound = 1 / math.sqrt(d_model)
        nn.init.uniform_(self.w_in, -bound, bound)
        nn.init.uniform_(self.w_out, -bound, bound)

    @property
    def d_ff(self) -> int:
        return self.w_in.shape[0]

    def neuron_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters whose first dimension counts neurons."""
        yield from (self.w_in, self.b_in, self.w_out)

    def set_mode(self, mode: Mode, top_k: int | None = None) -> None:
        """Run densely, or sparsely with `top_k` experts a token (the configured number if None)."""
        k = self.top_k if top_k is None else top_k
        if not 1 <= k <= self.experts:
            raise ValueError(f"top_k {k}: allowed are 1 to {self.experts}")
        self.mode, self.top_k = mode, k

    def activations(self, x: Tensor) -> Tensor:
        """Every neuron's activation, [..., F], whatever the mode."""
        return F.relu(F.linear(x, self.w_in, self.b_in))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "dense":
            y = self.activations(x) @ self.w_out
        else:
            y = self._sparse(x.reshape(-1, x.shape[-1])).view_as(x)
        out: Tensor = self.dropout(y + self.b_out)
        return out

    def _sparse(self, x: Tensor) -> Tensor:
        compute = choose_backend(self.backend, x)
        chosen = top_k_experts(x, self.centers, self.top_k)
        # Autocast knows matrix products by name, not the backends: give them one dtype ourselves.
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w_in.dtype
        w_in, b_in, w_out = (p.to(dtype).unflatten(0, (self.experts, -1)) for p in self.neuron_parameters())
        return compute(x.to(dtype), chosen, w_in, b_in, w_out)
