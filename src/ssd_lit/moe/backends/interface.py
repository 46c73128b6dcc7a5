"""Inputs and outputs of every backend of the sparse FFN.

Shape letters: T tokens, D model width, E experts, H neurons of one expert, K experts a token, N = T*K.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.moe.routing import Routing


class Experts(NamedTuple):
    """The neurons of all experts; every part is a view of the FFN's weights.

    In float32, as training keeps them, they may meet an x of fewer bytes: its dtype is that of the products.
    """

    w_in: Tensor
    """[E, H, D]"""
    w_out: Tensor
    """[E, H, D]"""
    b_in: Tensor | None
    """[E, H]"""
    w_gate: Tensor | None
    """[E, H, D], for a gated FFN."""
    b_gate: Tensor | None = None
    """[E, H], for a gate with a bias."""
    b_out: Tensor | None = None
    """[D], added to every token's output once."""

    def shifted(self, y: Tensor) -> Tensor:
        """The sum of the experts' outputs y [T, D] with the bias of the output, if there is one."""
        return y if self.b_out is None else y + self.b_out

    def to(self, dtype: torch.dtype) -> "Experts":
        """These experts, or copies of that dtype."""
        return Experts(*(None if part is None else part.to(dtype) for part in self))  # type: ignore[arg-type]


# Compared by identity: torch.compile would hash an object that it has not built yet.
@dataclass(frozen=True, eq=False)
class Activation:
    """Maps a neuron's inputs to its activation."""

    name: str
    """One of `moe.activations`."""
    dropout: float = 0.0
    """Dropout probability; zero outside training."""

    def __call__(self, pre: Tensor, gate: Tensor | None) -> Tensor:
        """pre is x @ w_in + b_in, gate x @ w_gate + b_gate for a gated FFN; all of one shape."""
        act = ACTIVATIONS[self.name]
        hidden = act(pre) if gate is None else act(gate) * pre
        return F.dropout(hidden, self.dropout) if self.dropout else hidden


Backend = Callable[[Tensor, Routing, Experts, Activation], Tensor]
"""From x [T, D] to the sum of the chosen experts' outputs, [T, D], without the output bias."""
