"""Documents from local files: text, JSON lines, Parquet; plain or compressed; never a whole file in memory."""

import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from ssd_lit.config import ConfigError

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".zst")
_ROWS_AT_A_TIME = 1024


def check_format(path: Path) -> None:
    """Raise ConfigError if the file's name ends in nothing we can read."""
    if _format(path) not in FORMATS:
        raise ConfigError(
            f"{path}: unknown kind of file; allowed: {', '.join(FORMATS)}, "
            f"each also with {', '.join(COMPRESSIONS)} behind it"
        )


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """The documents of one file in their order; `text_key` is the field or column of `.jsonl` and `.parquet`.

    A null counts as an empty document. Raises ConfigError for a damaged file or a missing text_key.
    """
    check_format(path)
    with _told(path):
        match _format(path):
            case ".txt":
                yield from _paragraph_groups(path)
            case ".jsonl":
                yield from _json_lines(path, text_key)
            case _:
                yield from _parquet_rows(path, text_key)


def read_text(path: Path) -> str:
    """The whole of a `.txt` file, plain or compressed. Raises ConfigError if it is none, or damaged."""
    if _format(path) != ".txt":
        raise ConfigError(f"{path}: not a .txt file (also with {', '.join(COMPRESSIONS)} behind it)")
    with _told(path), _open_lines(path) as lines:
        return "".join(lines)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say which file could not be read, in words."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text ({error.reason})") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _format(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed as its last suffix says."""
    match path.suffix:
        case ".gz":
            with gzip.open(path) as file:
                yield file  # type: ignore[misc]  # GzipFile reads like any binary file
        case ".xz":
            with lzma.open(path) as file:
                yield file
        case ".zst":
            # Not the zstandard package: it takes a file that was cut short for a whole one.
            with pyarrow.CompressedInputStream(str(path), "zstd") as file:
                yield file
        case _:
            with path.open("rb") as file:
                yield file


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterator[str]]:
    with _open_bytes(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=None) as lines:
        yield lines


def _paragraph_groups(path: Path) -> Iterator[str]:
    """The stretches of lines between blank lines."""
    group: list[str] = []
    with _open_lines(path) as lines:
        for line in lines:
            if line.strip():
                group.append(line)
            elif group:
                yield "".join(group)
                group = []
    if group:
        yield "".join(group)


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with _open_lines(path) as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except RecursionError:
                raise ConfigError(f"{path}: line {number} is not valid JSON (nested too deeply)") from None
            except ValueError as error:
                raise ConfigError(f"{path}: line {number} is not valid JSON ({_first_line(error)})") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{path}: line {number} is not a JSON object")
            yield text_of(row, text_key, f"{path}: line {number}")


def _parquet_rows(path: Path, text_key: str) -> Iterator[str]:
    with _seekable(path) as plain, pyarrow.parquet.ParquetFile(plain) as file:
        columns = file.schema_arrow.names
        if text_key not in columns:
            raise _missing_key(text_key, columns, str(path))
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[text_key]):
            for value in batch.column(0).to_pylist():
                yield text_of({text_key: value}, text_key, str(path))


@contextmanager
def _seekable(path: Path) -> Iterator[Path]:
    """The file itself, or a decompressed copy: Parquet is read from its end."""
    if path.suffix not in COMPRESSIONS:
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        with _open_bytes(path) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield Path(copy.name)


def text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    """The text of a row; null is empty text. Raises ConfigError if the key is missing or holds something else."""
    if text_key not in row:
        raise _missing_key(text_key, list(row), where)
    value = row[text_key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: text_key {text_key!r} holds {type(value).__name__}, not text")
    return value


def _missing_key(text_key: str, columns: list[str], where: str) -> ConfigError:
    there = ", ".join(columns) or "none"
    return ConfigError(
        f"{where}: no text_key {text_key!r}; there are: {there if len(there) <= 200 else there[:200] + ' ...'}"
    )
