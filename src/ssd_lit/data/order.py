"""Which blocks a step reads: a pure function of (seed, global step), so that a resumed run reads on rightly."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler


class StepBatchSampler(Sampler[list[int]]):
    """An endless batch sampler: each step's blocks, from `start_step` on.

    All epochs, each with its own permutation of the blocks, form one endless sequence; step n takes the places
    from n * batch_size on. A batch may thus span two epochs, and every epoch reads each block exactly once. With
    several ranks each takes its own slice of every batch.

    Raises ValueError if batch_size is not divisible by world_size, or if there are no blocks.
    """

    def __init__(
        self,
        n_blocks: int,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not divisible by the {world_size} devices")
        if n_blocks < 1:
            raise ValueError("there are no blocks to read")
        self.n_blocks = n_blocks
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        step = self.start_step
        while True:
            yield self.batch(step)
            step += 1

    def batch(self, step: int) -> list[int]:
        """This rank's blocks of a step."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)[self._slice]
        return [self._block(place) for place in places]

    def _block(self, place: int) -> int:
        epoch, position = divmod(place, self.n_blocks)
        if epoch != self._epoch:
            # Its own generator: the global one belongs to the model, and must not depend on the data.
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)
            self._epoch = epoch
        return int(self._permutation[position])


def spread_blocks(n_blocks: int, count: int) -> list[int]:
    """`count` different blocks, evenly spaced over all; all of them if there are fewer."""
    count = min(count, n_blocks)
    return [i * n_blocks // count for i in range(count)]


def in_batches(blocks: list[int], batch_size: int) -> list[list[int]]:
    """The blocks in order, in batches; the last may be smaller."""
    return [blocks[start : start + batch_size] for start in range(0, len(blocks), batch_size)]
