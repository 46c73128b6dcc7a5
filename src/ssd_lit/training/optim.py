"""AdamW, its learning rate schedule, and the guard that skips updates that are not finite."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from ssd_lit.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> AdamW:
    """AdamW with decoupled decay on matrices and embeddings, none on norms and biases (one-dimensional).

    A fused kernel applies the update, or skips it (`leave_out_if`). Its state loads from a checkpoint of any device or
    kernel.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state to load, set to the fused kernel: a checkpoint names the kernel that it was written with."""
    return {**state, "param_groups": [{**group, "fused": True} for group in state["param_groups"]]}


def leave_out_if(flag: Tensor, optimizer: Optimizer) -> None:
    """Have the next update change neither weights nor state if `flag` [], a float on their device, is 1.

    Uses the interface of `torch.amp.GradScaler` to fused optimizers: the kernel reads the flag, without a device sync.
    """
    optimizer.found_inf = flag  # type: ignore[attr-defined]


def lr_factor(step: int, *, config: OptimConfig, steps: int) -> float:
    """The learning rate of a step (0-based) as a fraction of `config.lr`.

    Linear warm-up, then either a cosine to `min_lr_fraction` at the last step, or a constant rate and a linear
    decay to `min_lr_fraction` over the last `decay_fraction` of all steps.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    low = config.min_lr_fraction
    if config.schedule == "cosine":
        done = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay_steps = config.decay_fraction * steps
    left = max(0, steps - 1 - step)
    return 1.0 if left >= decay_steps else low + (1 - low) * left / decay_steps


def build_scheduler(optimizer: AdamW, config: OptimConfig, steps: int) -> LambdaLR:
    """`lr_factor` as a scheduler that is stepped once an optimiser step."""
    return LambdaLR(optimizer, partial(lr_factor, config=config, steps=steps))


@dataclass(frozen=True)
class LeftOut:
    """Counts of the updates that were left out."""

    total: int = 0
    row: int = 0
    """The number in a row up to now; stops counting at the limit."""
    step: int = 0
    """The step (0-based) of the last of them."""


class NonFiniteGuard:
    """Decides at every step, on the device, whether the update is left out because its gradient is not finite.

    After `limit` such updates in a row all later ones are left out too, so that weights and optimiser state stay as
    they were before the first of them until the host reads the counts.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.restore(LeftOut())

    def restore(self, counts: LeftOut) -> None:
        """Continue counting from `counts`."""
        self._total, self._row, self._step = (torch.tensor(n) for n in (counts.total, counts.row, counts.step))

    def update(self, norm: Tensor, step: int) -> Tensor:
        """1 if the update is to be left out, else 0; a float on the device of `norm`, its gradient's norm."""
        # Moved at the first step only.
        total, row, last = (count.to(norm.device) for count in (self._total, self._row, self._step))
        halted = row >= self.limit
        bad = ~(norm.isfinite() | halted)
        self._total = total + bad
        self._row = torch.where(halted | bad, row + bad, 0)
        self._step = torch.where(bad, step, last)
        return (halted | bad).float()

    def read(self) -> LeftOut:
        """The counts so far; waits for the device."""
        return LeftOut(*torch.stack([self._total, self._row, self._step]).tolist())
