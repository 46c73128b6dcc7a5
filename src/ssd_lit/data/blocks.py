"""Blocks of tokens, cut from a split's stream on disk without loading it."""

import itertools
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
    """Raise ValueError if a split's digest is not the expected one.

    Once a process: it reads a gigabyte in under a second, and warms the page cache for training.
    """
    check_digests(tokens_dir, {f"{split}.bin": expected})


class TokenBlocks(Dataset[dict[str, Tensor]]):
    """The blocks of a split: item i is {"inputs": [S], "targets": [S]}, int64, targets one token ahead.

    Blocks do not overlap; the last target of one is the first input of the next. With `noise_per_token`, an item also
    has "noise" [S, noise_per_token]: uniform random numbers that depend on the block alone, so that an objective hides
    the same tokens whenever the block is scored. Raises ValueError if the file's digest differs from the index.
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
            noise = rng.random((self.sequence_length, self._noise_per_token), dtype=np.float32)
            item["noise"] = torch.from_numpy(noise)
        return item

    def __getitems__(self, blocks: Sequence[int]) -> list[dict[str, Tensor]]:
        return [self[block] for block in blocks]

    def _tokens(self) -> npt.NDArray[Any]:
        if self._stream is None:
            self._stream = np.memmap(self._path, dtype=self._dtype, mode="r")
        return self._stream

    def __getstate__(self) -> dict[str, Any]:
        # A pickled memory map would copy the whole stream; each worker maps the file itself.
        return {**self.__dict__, "_stream": None}


class StepBatchSampler(Sampler[list[int]]):
    """An endless batch sampler: the blocks of each step, from `start_step` on.

    All epochs, each with its own permutation of the blocks, form one endless sequence; step n takes batch_size places
    from first_block + n * batch_size on. So a batch may span two epochs, and every epoch reads each block once. Each
    rank takes its own slice of every batch.

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
        *,
        first_block: int = 0,
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is not divisible by the {world_size} devices")
        if n_blocks < 1:
            raise ValueError("there are no blocks to read")
        self.n_blocks = n_blocks
        self.batch_size = batch_size
        self.seed = seed
        self.start_step = start_step
        self.first_block = first_block
        self._slice = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)
        self._epoch = -1
        self._permutation: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        return map(self.batch, itertools.count(self.start_step))

    def batch(self, step: int) -> list[int]:
        """This rank's blocks of a step."""
        first = self.first_block + step * self.batch_size
        return [self._block(place) for place in range(first, first + self.batch_size)[self._slice]]

    def _block(self, place: int) -> int:
        epoch, position = divmod(place, self.n_blocks)
        if epoch != self._epoch:
            # A separate generator: the global one is for the model, and must not depend on the data.
            self._permutation = np.random.default_rng([self.seed, epoch]).permutation(self.n_blocks)
            self._epoch = epoch
        return int(self._permutation[position])


def spread_blocks(n_blocks: int, count: int) -> list[int]:
    """`count` blocks, evenly spaced; all of them if there are fewer."""
    count = min(count, n_blocks)
    return [i * n_blocks // count for i in range(count)]


def in_batches(blocks: list[int], batch_size: int) -> list[list[int]]:
    """The blocks in order, in batches; the last may be smaller."""
    return [blocks[start : start + batch_size] for start in range(0, len(blocks), batch_size)]


BATCH = 16


def scoring_batches(
    tokens_dir: Path, split: str, blocks: Sequence[int], objective: Objective, device: torch.device
) -> Iterator[Batch]:
    """Batches of the numbered blocks of a split after the objective, which hides the same tokens each time."""
    source = TokenBlocks(tokens_dir, split, objective.noise_per_token)
    for batch in DataLoader(Subset(source, blocks), batch_size=BATCH):
        noise = batch.pop("noise", torch.empty(*batch["inputs"].shape, 0))
        yield {name: value.to(device) for name, value in objective(batch, noise).items()}
