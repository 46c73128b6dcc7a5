"""Blocks of tokens, cut from a split's stream on disk without loading it."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssd_lit.data.index import load_index
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
