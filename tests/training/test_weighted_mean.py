"""A mean against the obvious sum."""

import pytest
import torch

from ssd_lit.training.weighted_mean import WeightedMean


def test_values_count_by_their_weight_until_the_next_reset() -> None:
    mean = WeightedMean()
    for _ in range(2):
        values, weights = torch.rand(5, requires_grad=True), torch.tensor([1, 2, 0, 4, 3])
        for value, weight in zip(values, weights, strict=True):
            mean.update(value, weight)
        found = mean.compute()
        assert not found.requires_grad
        torch.testing.assert_close(found, (values * weights).sum().detach() / weights.sum())
        mean.reset()
    with pytest.raises(ValueError, match="mean of no values"):
        mean.compute()
