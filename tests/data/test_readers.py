"""Every format with every compression gives the same documents; mistakes are named."""

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ssd_lit.config import ConfigError, FilesSource
from ssd_lit.data.readers import read_documents
from ssd_lit.data.sources import documents

TEXTS = ["first line\nsecond line", "naïve — 漢字", "last"]

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def content_of(suffix: str, tmp_path: Path, key: str = "text") -> bytes:
    """TEXTS in one of the three formats."""
    if suffix == ".txt":
        return "\n \n\n".join(TEXTS).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps({key: text, "n": 1}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "plain"
    # One row a group: the reader must go through all groups.
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], key: TEXTS}), path, row_group_size=1)
    return path.read_bytes()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_format_and_compression(tmp_path: Path, suffix: str, packing: str) -> None:
    path = tmp_path / f"some.name{suffix}{packing}"
    path.write_bytes(PACK[packing](content_of(suffix, tmp_path)))
    assert [text.strip() for text in read_documents(path, "text")] == TEXTS


def test_zstd_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"one\n\n") + zstandard.compress(b"two\n"))
    assert [text.strip() for text in read_documents(path, "text")] == ["one", "two"]


def test_windows_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\nmore\r\n\r\ntwo".encode())
    assert [text.strip() for text in read_documents(path, "text")] == ["one\nmore", "two"]


def test_globs_are_sorted_and_each_file_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt"):
        (tmp_path / name).write_text(name)
    paths = [f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt", f"{tmp_path}/dee*"]
    assert list(documents(FilesSource(kind="files", paths=paths))) == ["a.txt", "b.txt", "deep/c.txt"]


def test_null_is_empty_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n\n{"text": "x"}\n')
    assert list(read_documents(path, "text")) == ["", "x"]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_missing_text_key_lists_what_there_is(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content_of(suffix, tmp_path, key="body"))
    with pytest.raises(ConfigError, match=r"no text_key 'text'; there are: .*body"):
        list(read_documents(path, "text"))
