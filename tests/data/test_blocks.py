"""Blocks are what slicing the stream gives."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.index import load_index


def test_blocks_equal_slices_of_the_stream(corpus: Path) -> None:
    stream = np.fromfile(corpus / "tokens" / "train.bin", dtype="<u2").astype(np.int64)
    blocks = TokenBlocks(corpus / "tokens", "train")
    assert len(blocks) == (len(stream) - 1) // 16 == load_index(corpus / "tokens")["splits"]["train"]["blocks"]
    for i in (0, 1, len(blocks) // 2, len(blocks) - 1):
        item = blocks[i]
        assert item["inputs"].tolist() == stream[i * 16 : i * 16 + 16].tolist()
        assert item["targets"].tolist() == stream[i * 16 + 1 : i * 16 + 17].tolist()
        assert item["inputs"].dtype == item["targets"].dtype == torch.int64


def test_several_at_once_equal_single_ones(corpus: Path) -> None:
    blocks = TokenBlocks(corpus / "tokens", "test")
    for got, block in zip(blocks.__getitems__([3, 0, 3]), [3, 0, 3], strict=True):
        assert torch.equal(got["inputs"], blocks[block]["inputs"])


def test_pickle_holds_no_tokens_and_reads_on(corpus: Path) -> None:
    blocks = TokenBlocks(corpus / "tokens", "train")
    first = blocks[0]["inputs"]
    packed = pickle.dumps(blocks)
    assert len(packed) < 1000
    assert torch.equal(pickle.loads(packed)[0]["inputs"], first)


@pytest.mark.parametrize("place", [-1, "end"])
def test_no_block_beyond_the_ends(corpus: Path, place: int | str) -> None:
    blocks = TokenBlocks(corpus / "tokens", "test")
    with pytest.raises(IndexError):
        blocks[len(blocks) if place == "end" else -1]


@pytest.mark.parametrize("change", [lambda b: b[:-2], lambda b: b"", lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:]])
def test_a_stream_that_is_not_the_encoded_one_is_refused(
    corpus: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    shutil.copytree(corpus / "tokens", tmp_path / "tokens")
    path = tmp_path / "tokens" / "train.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train\.bin: damaged .* run again"):
        TokenBlocks(tmp_path / "tokens", "train")


def test_missing_index_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"index\.json: not found; run the stage"):
        TokenBlocks(tmp_path, "train")
