"""Updates whose gradient is not finite are left out; what decides lives on the device, so the host need not wait."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeftOut:
    """The updates that were left out."""

    total: int = 0
    row: int = 0
    """How many in a row up to now; stays where it is once it has reached the limit."""
    step: int = 0
    """The last of them, as the number of steps done before it."""


class NonFiniteGuard:
    """Tells the optimiser at every step whether to leave the update out.

    After `limit` such updates in a row all later ones are left out too: weights and optimiser state stay as they were
    before the first of them, until somebody looks.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.restore(LeftOut())

    def restore(self, found: LeftOut) -> None:
        """Go on counting from `found`."""
        self._total, self._row, self._step = (torch.tensor(n) for n in (found.total, found.row, found.step))

    def update(self, norm: Tensor, step: int) -> Tensor:
        """1 if the update is to be left out, else 0, as a float on the device of `norm`, the norm of its gradient."""
        # Moved at the first step only.
        total, row, last = (count.to(norm.device) for count in (self._total, self._row, self._step))
        halted = row >= self.limit
        bad = ~(norm.isfinite() | halted)
        self._total = total + bad
        self._row = torch.where(halted | bad, row + bad, 0)
        self._step = torch.where(bad, step, last)
        return (halted | bad).float()

    def read(self) -> LeftOut:
        """What was left out so far; waits for the device."""
        return LeftOut(*torch.stack([self._total, self._row, self._step]).tolist())
