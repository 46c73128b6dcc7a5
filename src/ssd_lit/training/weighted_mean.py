"""A mean that costs a step nothing: nothing waits for the device until the mean is asked for."""

import torch
from torch import Tensor
from torchmetrics import Metric


class WeightedMean(Metric):
    """The weighted mean of the scalars seen since the last reset, over all processes.

    torchmetrics' own MeanMetric looks at every value to see whether it is NaN, for which the host waits for the device;
    told not to look, it forgets the weights (torchmetrics 1.9).
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor) -> None:
        """Take in a scalar, and the number of things that it is the mean of; both stay on their device."""
        self.total = self.total + value.detach().float() * weight
        self.weight = self.weight + weight

    def sums(self) -> Tensor:
        """What the mean of this process is made of, [2]."""
        return torch.stack([self.total, self.weight])

    def go_on_from(self, sums: Tensor) -> None:
        """Take up the sums of a mean that was interrupted; one value at least must follow."""
        self.total, self.weight = sums.to(self.total.device)

    def compute(self) -> Tensor:
        """The mean, on the device of the values. Raises ValueError if nothing was seen."""
        if not self.update_called:
            raise ValueError("the mean of nothing was asked for")
        return self.total / self.weight
