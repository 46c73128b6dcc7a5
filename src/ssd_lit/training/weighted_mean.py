"""Weighted mean without a device sync in `update`."""

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """The weighted mean of the scalars since the last reset, over all processes.

    torchmetrics' MeanMetric checks every value for NaN, which waits for the device; with that check disabled, it
    ignores the weights (torchmetrics 1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Add a scalar and its weight, the number of values that it is the mean of; both stay on their device."""
        self.total = self.total + value.detach().float() * weight
        self.weight = self.weight + weight

    def sums(self) -> Tensor:
        """Weighted sum and sum of weights of this process, [2]."""
        return torch.stack([self.total, self.weight])

    def go_on_from(self, sums: Tensor) -> None:
        """Continue from the `sums` of an interrupted mean; at least one value must follow."""
        self.total, self.weight = sums.to(self.total.device)

    def compute(self) -> Tensor:
        """The mean, on the device of the values. Raises ValueError if there were no values."""
        if not self.update_called:
            raise ValueError("the mean of no values is not defined")
        return self.total / self.weight
