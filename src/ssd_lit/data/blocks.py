"""Blocks of tokens, cut from a split's stream on disk without loading it."""

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from ssd_lit.data.index import load_index
from ssd_lit.data.objectives import Batch, Objective
from ssd_lit.support.files import check_digests


@cache
def _check_tokens(tokens_dir: Path, split: str, expected: str) -> None:
    """Raise ValueError if a split is not what was encoded.

    Once in a process: that reads a gigabyte in under a second, and warms the cache for what training reads next.
    """
    check_digests(tokens_dir, {f"{split}.bin": expected})


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """The blocks of a split: item i is {"inputs": [S], "targets": [S]}, int64, targets one token ahead.

    Blocks follow each other without overlap; the last target of one is the first input of the next. With
    `noise_per_token`, an item has "noise" [S, noise_per_token] too: uniform random numbers that are a function of the
    block, so that an objective hides the same tokens whenever the block is scored. Raises ValueError if the
    stream's bytes are not those that the index tells of.
    """

    def __init__(self, tokens_dir: Path, split: str, noise_per_token: int = 0) -> None:
        index = load_index(tokens_dir)
        self.sequence_length: int = index["sequence_length"]
        self._noise_per_token = noise_per_token
        self._blocks: int = index["splits"][split]["blocks"]
        self._path = tokens_dir / f"{split}.bin"
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self._stream: npt.NDArray[Any] | None = None
        _check_tokens(tokens_dir, split, index["splits"][split]["sha256"])

    def __len__(self) -> int:
        return self._blocks

    def __getitem__(self, block: int) -> dict[str, Tensor]:
        if not 0 <= block < self._blocks:
            raise IndexError(f"block {block} of {self._blocks}")
        start = block * self.sequence_length
        tokens = self._tokens()[start : start + self.sequence_length + 1].astype(np.int64)
        item = {"inputs": torch.from_numpy(tokens[:-1]), "targets": torch.from_numpy(tokens[1:])}
        if self._noise_per_token:
            rng = np.random.default_rng(block)
            item["noise"] = torch.from_numpy(
                rng.random((self.sequence_length, self._noise_per_token), dtype=np.float32)
            )
        return item

    def __getitems__(self, blocks: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self[block] for block in blocks]

    def _tokens(self) -> npt.NDArray[Any]:
        if self._stream is None:
            self._stream = np.memmap(self._path, dtype=self._dtype, mode="r")
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would be the whole stream; a worker maps the file again.
        return {**self.__dict__, "_stream": None}


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


BATCH = 16


def scoring_batches(
    tokens_dir: Path, split: str, blocks: Sequence[int], objective: Objective, device: torch.device
) -> Iterator[Batch]:
    """Blocks of a split, by number, as the objective gives them: a block always hides the same tokens."""
    source = TokenBlocks(tokens_dir, split, objective.noise_per_token)
    for batch in DataLoader(Subset(source, blocks), batch_size=BATCH):
        noise = batch.pop("noise", torch.empty(*batch["inputs"].shape, 0))
        yield {name: value.to(device) for name, value in objective(batch, noise).items()}
