"""The activations of FFNs by the names that Hugging Face gives them."""

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor


def squared_relu(x: Tensor) -> Tensor:
    """The square of ReLU (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": squared_relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}

EXACT_ZEROS = frozenset({"relu", "relu2"})
"""Activations that are exactly zero for a neuron that does not fire."""
