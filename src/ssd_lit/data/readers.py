"""Documents from local files: text, JSON lines, Parquet; plain or compressed; read piece by piece."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from ssd_lit.config import ConfigError

FORMATS = (".txt", ".jsonl", ".ndjson", ".json", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_ROWS_AT_A_TIME = 1024
_EXPECTED = "expected one object a line; `jq -c '.[]'` makes that of an array, `jq -c .` of an object"


def check_format(path: Path) -> None:
    """Raise ConfigError if the file's name does not end in a known format."""
    if not has_format(path):
        raise ConfigError(
            f"{path}: unknown kind of file; allowed: {', '.join(FORMATS)}, "
            f"each also with {', '.join(COMPRESSIONS)} after it"
        )


def has_format(path: Path) -> bool:
    """Whether the file's name ends in a known format, in lower or upper case."""
    return _format(path) in FORMATS


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """The documents of one file, in order; `text_key` names the field of JSON lines or Parquet, as in `text_of`.

    A null is an empty document. Raises ConfigError for a damaged file or a missing text_key.
    """
    check_format(path)
    with _read_errors(path):
        match _format(path):
            case ".txt":
                yield from _paragraphs(path)
            case ".parquet":
                yield from _parquet_rows(path, text_key)
            case _:
                yield from _json_lines(path, text_key)


def read_text(path: Path) -> str:
    """The whole of a `.txt` file, plain or compressed. Raises ConfigError for another format or a damaged file."""
    if _format(path) != ".txt":
        raise ConfigError(f"{path}: not a .txt file (also with {', '.join(COMPRESSIONS)} after it)")
    with _read_errors(path), _open_lines(path) as lines:
        return "".join(lines)


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    """Turn errors of reading into ConfigErrors that name the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not {error.encoding.upper()} text ({error.reason}); "
            "allowed: UTF-8, or UTF-16 with a byte order mark"
        ) from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path}: cannot be read: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _format(path: Path) -> str:
    return (Path(path.stem).suffix if _compression(path) else path.suffix).lower()


def _compression(path: Path) -> str:
    """The suffix of a compressed file, else an empty string."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else ""


def _open_bytes(path: Path) -> Any:
    """Opens the file for bytes, decompressed according to its last suffix."""
    match _compression(path):
        case ".gz":
            return gzip.open(path)
        case ".bz2":
            return bz2.open(path)
        case ".xz":
            return lzma.open(path)
        case ".zst" | ".zstd":
            # Not the zstandard package: it does not notice a truncated file.
            return pyarrow.CompressedInputStream(str(path), "zstd")
        case _:
            return path.open("rb")


@contextmanager
def _open_lines(path: Path) -> Iterator[Iterator[str]]:
    """The file's lines, without byte order marks, which concatenated files have inside too."""
    with _open_bytes(path) as file, io.BufferedReader(file) as buffered:
        encoding = _encoding(path, buffered.peek(4)[:4])
        with io.TextIOWrapper(buffered, encoding=encoding, newline=None) as lines:
            yield (line.lstrip("\ufeff") for line in lines)


def _encoding(path: Path, start: bytes) -> str:
    """The encoding of a text that starts with these bytes. Raises ConfigError for UTF-16 without a byte order mark."""
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return "utf-32"  # first: its mark begins like that of UTF-16
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if [byte == 0 for byte in start] in ([False, True] * 2, [True, False] * 2):
        raise ConfigError(
            f"{path}: not UTF-8 text (it seems to be UTF-16); allowed: UTF-8, or UTF-16 with a byte order mark"
        )
    return "utf-8"


def _paragraphs(path: Path) -> Iterator[str]:
    """The runs of lines between blank lines."""
    with _open_lines(path) as lines:
        for is_text, group in groupby(lines, key=lambda line: bool(line.strip())):
            if is_text:
                yield "".join(group)


def _json_lines(path: Path, text_key: str) -> Iterator[str]:
    with _open_lines(path) as lines:
        filled = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
        for place, (number, line) in enumerate(filled):
            where = f"{path}: line {number}"
            try:
                row = json.loads(line)
            except RecursionError:
                raise ConfigError(f"{where} is not valid JSON (nested too deeply)") from None
            except ValueError as error:
                # The error is at the end of the line: an array or object continues on the next one.
                if place == 0 and isinstance(error, json.JSONDecodeError) and error.pos >= len(line.rstrip()):
                    raise ConfigError(f"{where} begins JSON that goes on over several lines; {_EXPECTED}") from None
                raise ConfigError(f"{where} is not valid JSON ({_first_line(error)})") from None
            if not isinstance(row, dict):
                raise ConfigError(f"{where} is not a JSON object but of type {type(row).__name__}; {_EXPECTED}")
            yield text_of(row, text_key, where)


def _parquet_rows(path: Path, text_key: str) -> Iterator[str]:
    with _seekable(path) as plain, pyarrow.parquet.ParquetFile(plain) as file:
        columns = list(_columns(file.schema_arrow))
        if text_key not in columns:
            raise _missing_key(text_key, columns, str(path))
        for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[text_key]):
            for row in batch.to_pylist():
                yield text_of(row, text_key, str(path))


def _columns(fields: Iterable[pyarrow.Field], above: str = "") -> Iterator[str]:
    """The names of columns, and dotted names of the fields of structs."""
    for field in fields:
        yield above + field.name
        if pyarrow.types.is_struct(field.type):
            yield from _columns(field.type.fields, f"{above}{field.name}.")


@contextmanager
def _seekable(path: Path) -> Iterator[Path]:
    """The file itself, or a decompressed copy: Parquet is read from its end."""
    if not _compression(path):
        yield path
        return
    with tempfile.NamedTemporaryFile(suffix=".parquet") as copy:
        with _open_bytes(path) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        yield Path(copy.name)


def text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    """The text of a row under a key, or under a dotted path through nested objects; null is empty text.

    A key that itself contains the dots has priority. Raises ConfigError if the key is missing or holds no text.
    """
    try:
        value = _value(row, text_key)
    except KeyError:
        raise _missing_key(text_key, list(_keys(row)), where) from None
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ConfigError(f"{where}: text_key {text_key!r} holds {type(value).__name__}, not text")
    return value


def _value(row: dict[str, Any], key: str) -> Any:
    if key in row:
        return row[key]
    first, _, rest = key.partition(".")
    inside = row[first]
    if inside is None:
        return None
    if not isinstance(inside, dict):
        raise KeyError(key)
    return _value(inside, rest)


def _keys(row: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in row.items():
        yield above + key
        if isinstance(value, dict):
            yield from _keys(value, f"{above}{key}.")


def _missing_key(text_key: str, keys: list[str], where: str) -> ConfigError:
    there = ", ".join(keys) or "none"
    return ConfigError(
        f"{where}: no text_key {text_key!r}; there are: {there if len(there) <= 200 else there[:200] + ' ...'}"
    )
