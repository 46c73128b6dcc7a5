"""Descriptors of tensors, by which Hopper's copy engine reads tiles of them without addresses in registers."""

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


def can_describe(*tensors: Tensor | None) -> bool:
    """Whether the copy engine can read these tensors; None is none.

    Interpreted kernels can read any; on a device, products of float32 spill registers where it reads.
    """
    return all(
        _has_engine(t.device, t.dtype)
        and t.numel() > 0
        and t.is_contiguous()
        and t.data_ptr() % 16 == 0
        and t.shape[-1] * t.itemsize % 16 == 0
        for t in tensors
        if t is not None
    )


def describe(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    """A descriptor of tiles of a tensor, for kernels; what lies outside of the tensor reads as zero."""
    return TensorDescriptor.from_tensor(tensor, block)


@cache
def _has_engine(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type != "cuda" or (dtype.itemsize == 2 and torch.cuda.get_device_capability(device) >= (9, 0))
