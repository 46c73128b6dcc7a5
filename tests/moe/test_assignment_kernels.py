"""The kernels of balanced assignments against plain torch, on the CPU through Triton's interpreter."""

import numpy as np
import pytest
import torch

from ssd_lit.moe import assignment
from ssd_lit.moe.assignment import TEMPERATURES, assign, centred_costs, find_prices

pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

from ssd_lit.moe.kernels.prices import newton_steps
from tests.moe.cheapest import assert_cheapest


@pytest.mark.parametrize(("n", "columns"), [(50, 5), (200, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_prices_are_those_of_plain_torch(n: int, columns: int, dtype: torch.dtype) -> None:
    cost = centred_costs(torch.randn(2, n, columns, dtype=dtype, generator=torch.Generator().manual_seed(1)))
    start = cost.new_zeros(2, columns)
    spread = cost.std((1, 2), correction=0)
    expected = find_prices(cost, start, TEMPERATURES[:9])
    prices = newton_steps(cost, start, spread, TEMPERATURES[:9])
    # Only differences between columns matter.
    torch.testing.assert_close(
        prices - prices.mean(-1, keepdim=True), expected - expected.mean(-1, keepdim=True), atol=1e-4, rtol=1e-4
    )
    assert not start.any()


def test_prices_to_follow_are_left_where_they_leave_a_column_far_from_balance() -> None:
    cost = centred_costs(torch.randn(3, 60, 6, generator=torch.Generator().manual_seed(1)))
    spread = cost.std((1, 2), correction=0)
    right = find_prices(cost, cost.new_zeros(3, 6), TEMPERATURES)
    start = right.clone()
    start[1, 2] -= 3
    found = newton_steps(cost, start, spread, TEMPERATURES, first=7)
    afresh, followed = (
        newton_steps(cost, *way) for way in ((0 * start, spread, TEMPERATURES), (start, spread, TEMPERATURES[7:]))
    )
    assert torch.equal(found[1], afresh[1])
    assert torch.equal(found[[0, 2]], followed[[0, 2]])


@pytest.mark.parametrize(("n", "columns"), [(50, 5), (40, 20), (12, 12)])
@pytest.mark.parametrize("kind", ["normal", "many ties", "columns far apart"])
def test_assignments_settled_together_are_the_cheapest(
    monkeypatch: pytest.MonkeyPatch, n: int, columns: int, kind: str
) -> None:
    monkeypatch.setattr(assignment, "in_kernels", lambda x, n_columns: True)
    draw = np.random.default_rng([n, columns])
    cost = draw.normal(size=(2, n, columns))
    if kind == "many ties":
        cost = cost.round()
    elif kind == "columns far apart":
        cost += 1e6 * draw.normal(size=(1, 1, columns))
    labels = assign(torch.from_numpy(cost))[0].numpy()
    for problem, found in zip(cost, labels, strict=True):
        assert_cheapest(problem, found)
