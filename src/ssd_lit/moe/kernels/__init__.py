"""Triton kernels of the sparse FFN. They run on a CUDA device, or slowly on the CPU where TRITON_INTERPRET is 1."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

# Triton comes with torch for CUDA, but not with torch for the CPU.
_INSTALLED = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def runs_on(x: Tensor) -> bool:
    """Whether kernels can work on this tensor."""
    return _INSTALLED and (x.is_cuda or _INTERPRETED)


def early_launch(x: Tensor) -> dict[str, bool]:
    """Arguments of a kernel on x that may start before the one before it is done (programmatic dependent launch)."""
    able = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if able else {"PDL": False}


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A second stream of the device; None where kernels are interpreted."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def precision() -> str:
    """Of products in kernels: exact float32, unless torch's setting allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
