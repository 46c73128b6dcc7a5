"""BLiMP (arXiv 1912.00582): pairs of sentences of which one is acceptable and the other is not."""

import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ssd_lit.config import ConfigError


class Pair(NamedTuple):
    """Two sentences that differ in what makes one of them unacceptable."""

    good: str
    bad: str


@dataclass(frozen=True)
class PairSet:
    """The pairs that test one contrast."""

    name: str
    field: str
    """The part of linguistics that it belongs to, such as morphology; empty if the file does not say."""
    pairs: tuple[Pair, ...]


def read_blimp(source: Path, limit: int | None = None) -> list[PairSet]:
    """All sets by name, each with its first `limit` pairs or all; `source` is the published .zip or its folder.

    Archives are read where they lie and never unpacked. Raises ConfigError for what is not in the published format.
    """
    try:
        found = [_pair_set(source, name, lines, limit) for name, lines in sorted(_files(source).items())]
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not UTF-8 text") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
    if not found:
        raise ConfigError(f"{source}: no .jsonl file in it")
    return found


def _files(source: Path) -> dict[str, Iterable[str]]:
    """The lines of every file of pairs, by its name without the suffix."""
    if source.is_dir():
        return {path.stem: _lines(path) for path in source.glob("*.jsonl")}
    with zipfile.ZipFile(source) as archive:
        names = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".jsonl")]
    # A Mac packs a twin that is no text, ._NAME, beside some files.
    return {name.stem: _packed_lines(source, str(name)) for name in names if not name.name.startswith(".")}


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        yield from lines


def _packed_lines(source: Path, name: str) -> Iterator[str]:
    with (
        zipfile.ZipFile(source) as archive,
        archive.open(name) as file,
        io.TextIOWrapper(file, encoding="utf-8") as lines,
    ):
        yield from lines


def _pair_set(source: Path, name: str, lines: Iterable[str], limit: int | None) -> PairSet:
    field = ""
    pairs: list[Pair] = []
    for number, line in enumerate(lines, start=1):
        if len(pairs) == limit:
            break
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = Pair(row["sentence_good"], row["sentence_bad"])
        except (json.JSONDecodeError, KeyError, TypeError):
            pair = Pair("", "")
        if not all(isinstance(text, str) and text for text in pair):
            raise ConfigError(f"{source}: {name}.jsonl, line {number}: no pair of sentences")
        pairs.append(pair)
        # One of the published files writes syntax/semantics, all others syntax_semantics.
        field = str(row.get("field", "")).replace("/", "_")
    if not pairs:
        raise ConfigError(f"{source}: {name}.jsonl has no pairs")
    return PairSet(name, field, tuple(pairs))
