"""What a balanced assignment is held against."""

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import linear_sum_assignment


def assert_cheapest(cost: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> None:
    """Labels [n] are a balanced assignment of cost [n, E], and none costs less."""
    n, columns = cost.shape
    assert np.bincount(labels, minlength=columns).tolist() == [n // columns] * columns
    # The peer sees every place in a column as a column of its own.
    rows, places = linear_sum_assignment(np.repeat(cost, n // columns, axis=1))
    best = cost[rows, places // (n // columns)].sum()
    assert cost[np.arange(n), labels].sum() == pytest.approx(best, abs=1e-9, rel=1e-12)
