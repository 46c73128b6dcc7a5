"""Triton kernels of the sparse FFN. They run on a CUDA device, or slowly on the CPU where TRITON_INTERPRET is 1."""

import importlib.util
import os

from torch import Tensor

# Triton comes with torch for CUDA, but not with torch for the CPU.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(x: Tensor) -> bool:
    """Whether kernels can work on this tensor."""
    return _INSTALLED and (x.is_cuda or _INTERPRETED)
