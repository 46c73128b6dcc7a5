"""The stream on disk is each document's tokens and end-of-text, one after the other."""

import hashlib
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.documents import SPLITS, read_split
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer
from ssd_lit.support.files import read_json_checked, sha256


def one_by_one(documents: Path, tokenizer_dir: Path, split: str) -> list[int]:
    tokenizer = load_tokenizer(tokenizer_dir)
    ids: list[int] = []
    for text in chain.from_iterable(read_split(documents, split)):
        ids += [*tokenizer.encode(text, add_special_tokens=False).ids, end_of_text_id(tokenizer_dir)]
    return ids


@pytest.mark.parametrize("split", SPLITS)
def test_stream_equals_encoding_one_by_one(corpus: Path, split: str) -> None:
    stream = np.fromfile(corpus / "tokens" / f"{split}.bin", dtype="<u2")
    assert stream.tolist() == one_by_one(corpus / "documents", corpus / "tokenizer", split)


def test_index_describes_the_streams(corpus: Path) -> None:
    index = read_json_checked(corpus / "tokens" / "index.json")
    assert (index["vocab_size"], index["dtype"], index["sequence_length"]) == (400, "uint16", 16)
    for split in SPLITS:
        path, told = corpus / "tokens" / f"{split}.bin", index["splits"][split]
        assert told["tokens"] * 2 == path.stat().st_size
        assert told["sha256"] == sha256(path)
        assert told["blocks"] == (told["tokens"] - 1) // 16
        assert told["documents"] == np.count_nonzero(np.fromfile(path, dtype="<u2") == index["eos_id"])
    together = "".join(index["splits"][split]["sha256"] for split in SPLITS)
    assert index["digest"] == hashlib.sha256(together.encode()).hexdigest()


def test_index_names_the_special_tokens(corpus: Path, tmp_path: Path) -> None:
    index = read_json_checked(corpus / "tokens" / "index.json")
    assert (index["mask_id"], index["sentinel_ids"]) == (None, [])
    config = TokenizerConfig(vocab_size=400, mask_token=True, sentinels=3)
    train_tokenizer(config, corpus / "documents", tmp_path / "tokenizer")
    index = encode_documents(corpus / "documents", tmp_path / "tokenizer", tmp_path / "tokens", sequence_length=16)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    assert tokenizer.id_to_token(index["mask_id"]) == "[MASK]"
    assert [tokenizer.id_to_token(i) for i in index["sentinel_ids"]] == [f"<extra_id_{n}>" for n in range(3)]
    assert read_json_checked(tmp_path / "tokens" / "index.json") == index
    stream = np.fromfile(tmp_path / "tokens" / "train.bin", dtype="<u2")
    assert not np.isin(stream, [index["mask_id"], *index["sentinel_ids"]]).any()


def test_encoding_twice_gives_the_same_index(corpus: Path, tmp_path: Path) -> None:
    index = encode_documents(corpus / "documents", corpus / "tokenizer", tmp_path, sequence_length=16)
    assert index == read_json_checked(corpus / "tokens" / "index.json") == read_json_checked(tmp_path / "index.json")


def test_large_ids_take_four_bytes(corpus: Path, tmp_path: Path) -> None:
    """The largest id counts, not how many there are."""
    vocabulary = {"<unk>": 0, "the": 70_000, "<|endoftext|>": 1}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    train_tokenizer(TokenizerConfig(folder=str(tmp_path)), corpus / "documents", tmp_path / "tokenizer")
    index = encode_documents(corpus / "documents", tmp_path / "tokenizer", tmp_path / "tokens", sequence_length=4)
    assert (index["vocab_size"], index["dtype"]) == (70_001, "uint32")
    stream = np.fromfile(tmp_path / "tokens" / "test.bin", dtype="<u4")
    assert stream.tolist() == one_by_one(corpus / "documents", tmp_path / "tokenizer", "test")
    assert 70_000 in stream


def test_split_shorter_than_a_block_is_named_and_leaves_no_index(corpus: Path, tmp_path: Path) -> None:
    encode_documents(corpus / "documents", corpus / "tokenizer", tmp_path, sequence_length=16)
    # The train split is long enough for such blocks, the validation split is not.
    with pytest.raises(ConfigError, match=r"the validation split has .* less than one block of sequence_length 9999"):
        encode_documents(corpus / "documents", corpus / "tokenizer", tmp_path, sequence_length=9999)
    assert not (tmp_path / "index.json").exists()


def test_missing_documents_say_what_to_do(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.parquet: not found"):
        encode_documents(tmp_path, corpus / "tokenizer", tmp_path / "tokens", sequence_length=16)
