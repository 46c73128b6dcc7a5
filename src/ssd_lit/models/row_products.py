"""Products of one row with a matrix on all cores of a CPU.

MKL computes them on one core of some processors, and memory then gives half of what it could. A batch of products with
blocks of the matrix runs on all. Nothing is copied: the blocks are views.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ssd_lit.moe.backends import Activation
from ssd_lit.moe.ffn import ExpertFFN

BLOCKS = 32
"""Blocks of a matrix."""


@contextmanager
def row_products(model: nn.Module) -> Iterator[None]:
    """Within this context a model's linear maps and dense FFNs take single float32 rows in blocks; inference only."""
    changed = []
    for module in model.modules():
        forward = _forward(module)
        if forward is not None:
            module.forward = forward
            changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w.T + b: x [..., D], w [F, D], b [F]."""
    if not _in_blocks(x, w):
        return F.linear(x, w, b)
    blocks = w.view(BLOCKS, -1, w.shape[1]).transpose(1, 2)  # [BLOCKS, D, F / BLOCKS]
    row = x.reshape(1, -1).expand(BLOCKS, 1, -1)
    y = torch.bmm(row, blocks) if b is None else torch.baddbmm(b.view(BLOCKS, 1, -1), row, blocks)
    return y.view(*x.shape[:-1], -1)


def product(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x @ w + b: x [..., F], w [F, D], b [D]."""
    if _in_blocks(x, w):
        y = torch.bmm(x.reshape(BLOCKS, 1, -1), w.view(BLOCKS, -1, w.shape[1])).sum(0).view(*x.shape[:-1], -1)
    else:
        y = x @ w
    return y if b is None else y + b


def _in_blocks(x: Tensor, w: Tensor) -> bool:
    """Whether x is one row that all cores should share."""
    one = x.numel() == x.shape[-1] and x.dtype == torch.float32 and x.device.type == "cpu"
    return one and len(w) % BLOCKS == 0


def _forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if isinstance(module, nn.Linear):
        return partial(linear, w=module.weight, b=module.bias)
    if isinstance(module, Conv1D):
        return partial(product, w=module.weight, b=module.bias)
    if isinstance(module, ExpertFFN) and module.mode == "dense":
        return partial(_dense, module)
    return None


def _dense(ffn: ExpertFFN, x: Tensor) -> Tensor:
    gate = None if ffn.w_gate is None else linear(x, ffn.w_gate)
    hidden = Activation(ffn.activation)(linear(x, ffn.w_in, ffn.b_in), gate)
    return product(hidden, ffn.w_out, ffn.b_out)
