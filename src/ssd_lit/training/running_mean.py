"""A mean that costs a step nothing: nothing waits for the device until the mean is asked for."""

import torch
from torch import Tensor


class RunningMean:
    """The weighted mean of the scalars seen since the last reset."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def update(self, value: Tensor, weight: Tensor | int = 1) -> None:
        """Take in a scalar, and the number of things that it is the mean of; both stay on their device."""
        # Without a look at the values: to see whether one is NaN, the host would have to wait for the device.
        value = value.detach().float()
        added = torch.stack([value * weight, torch.zeros_like(value) + weight])
        self._sums = added if self._sums is None else self._sums + added

    def sums(self) -> Tensor:
        """[2]: the sum of values times weights, and that of weights. Raises ValueError if nothing was seen."""
        if self._sums is None:
            raise ValueError("the mean of nothing was asked for")
        return self._sums

    def compute(self) -> Tensor:
        """The mean, on the device of the values; over this process only."""
        total, weight = self.sums().unbind()
        return total / weight

    def reset(self) -> None:
        """Forget all."""
        self._sums = None
