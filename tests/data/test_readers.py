"""Every format with every compression gives the same documents; mistakes are named."""

import bz2
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
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
}


def content_of(suffix: str, tmp_path: Path, key: str = "text") -> bytes:
    """TEXTS in one of the three formats."""
    if suffix == ".txt":
        return "\n \n\n".join(TEXTS).encode()
    if suffix in (".jsonl", ".ndjson", ".json"):
        return "".join(json.dumps({key: text, "n": 1}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "plain"
    # One row a group: the reader must go through all groups.
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], key: TEXTS}), path, row_group_size=1)
    return path.read_bytes()


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".ndjson", ".json", ".parquet"])
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


@pytest.mark.parametrize("name", ["A.TXT", "A.JSONL.GZ", "a.Json.Bz2", "A.PARQUET", "A.PARQUET.GZ"])
def test_suffixes_in_capitals(tmp_path: Path, name: str) -> None:
    kind, packing = (f".{part}" if part else "" for part in [*name.lower().split(".")[1:], ""][:2])
    (tmp_path / name).write_bytes(PACK[packing](content_of(kind, tmp_path)))
    assert [text.strip() for text in read_documents(tmp_path / name, "text")] == TEXTS


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_files_put_together_with_their_byte_order_marks(tmp_path: Path, suffix: str) -> None:
    path, one = tmp_path / f"a{suffix}", b"\xef\xbb\xbf" + content_of(suffix, tmp_path).rstrip() + b"\n\n"
    path.write_bytes(one * 3)
    assert [text.strip() for text in read_documents(path, "text")] == TEXTS * 3


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_wide_characters_are_read_by_their_byte_order_mark(tmp_path: Path, packing: str, encoding: str) -> None:
    content = ("\ufeff" + "\r\n\r\n".join(TEXTS)).encode(encoding)
    (tmp_path / f"a.txt{packing}").write_bytes(PACK[packing](content))
    assert [text.strip() for text in read_documents(tmp_path / f"a.txt{packing}", "text")] == TEXTS


def test_a_folder_stands_for_what_can_be_read_in_it(tmp_path: Path) -> None:
    (tmp_path / "f [1]/deep").mkdir(parents=True)
    (tmp_path / "f [1]/.git").mkdir()
    for name in ("b.txt", "deep/A.TXT", "deep/notes.md", "deep/.c.txt", ".git/d.txt"):
        (tmp_path / "f [1]" / name).write_text(name)
    (tmp_path / "f [1]/c.jsonl").write_text('{"text": "c.jsonl"}')
    for named in (f"{tmp_path}/f [1]", f"{tmp_path}/f [1]/"):
        assert list(documents(FilesSource(kind="files", paths=[named]))) == ["b.txt", "c.jsonl", "deep/A.TXT"]


NESTED = [{"a": {"b": "one", "c.d": "x"}}, {"a": {"b": None}}, {"a": None}, {"a": {"b": "two"}}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_dotted_key_leads_into_objects(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in NESTED))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(NESTED), path)
    assert list(read_documents(path, "a.b")) == ["one", "", "", "two"]
    assert next(read_documents(path, "a.c.d")) == "x"
    with pytest.raises(ConfigError, match=r"no text_key 'a\.x'; there are: a, a\.b, a\.c\.d"):
        list(read_documents(path, "a.x"))
    with pytest.raises(ConfigError, match="text_key 'a' holds dict, not text"):
        list(read_documents(path, "a"))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_key_with_dots_of_its_own_goes_first(tmp_path: Path, suffix: str) -> None:
    path, row = tmp_path / f"a{suffix}", {"a": {"b": "inside"}, "a.b": "outside"}
    if suffix == ".jsonl":
        path.write_text(json.dumps(row))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert list(read_documents(path, "a.b")) == ["outside"]


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
