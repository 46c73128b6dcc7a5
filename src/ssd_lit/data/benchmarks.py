"""GLUE (arXiv 1804.07461) and BLiMP (arXiv 1912.00582), read from the files in which they are published."""

import csv
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ssd_lit.config import ConfigError, DownstreamConfig

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Task:
    """Columns, classes and metrics of a GLUE task."""

    title: str
    """Name of the task and of its folder."""
    texts: tuple[str, ...]
    """Columns of the text or pair of texts."""
    label: str
    """Column of the class or score."""
    labels: tuple[str, ...]
    """Classes as the files write them; empty for a score."""
    metrics: tuple[str, ...]

    def target(self, label: str) -> float:
        """Returns the index of the class, or the score. Raises ValueError for an unknown class or no number."""
        return float(self.labels.index(label) if self.labels else label)


TASKS = {
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",)),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ("not_entailment", "entailment"), ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
}


class Example(NamedTuple):
    """A text or pair of texts, and the index of its class or its score."""

    texts: tuple[str, ...]
    target: float


def read_task(source: Path, name: str, split: str, limit: int | None = None) -> list[Example]:
    """Returns the first `limit` examples of a task's split, or all; `source` is a folder or a tar archive of it.

    The archive is never unpacked. Raises ConfigError for files that are not in the published format.
    """
    task = TASKS[name]
    file = f"{task.title}/{split}.tsv"
    try:
        with _open(source, file) as lines:
            # Quotes are part of the sentences, and often unpaired.
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [column for column in (*task.texts, task.label) if column not in (rows.fieldnames or [])]
            if missing:
                raise ConfigError(f"{source}: {file} has no column {missing[0]!r}")
            examples = [_example(task, row, f"{source}: {file}, line {rows.line_num}") for row in islice(rows, limit)]
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: {file} is not UTF-8 text") from None
    except (OSError, EOFError, csv.Error, tarfile.TarError, lzma.LZMAError) as error:
        raise ConfigError(f"{source}: {file} cannot be read ({error})") from None
    if not examples:
        raise ConfigError(f"{source}: {file} has no examples")
    return examples


def _example(task: Task, row: dict[str, str | None], where: str) -> Example:
    # The reader fills the missing columns of a short line with None.
    texts, label = tuple(row[column] or "" for column in task.texts), row[task.label]
    if not all(texts) or label is None:
        raise ConfigError(f"{where}: columns are missing")
    try:
        return Example(texts, task.target(label))
    except ValueError:
        allowed = ", ".join(task.labels) or "numbers"
        raise ConfigError(f"{where}: {task.label} {label!r}; allowed: {allowed}") from None


@contextmanager
def _open(source: Path, file: str) -> Iterator[IO[str]]:
    """Opens a file of a folder or tar archive as text without a byte-order mark."""
    if source.is_dir():
        with (source / file).open(encoding="utf-8-sig", newline="") as lines:
            yield lines
        return
    with tarfile.open(source) as archive:
        content = archive.extractfile(_member(archive, source, file))
        assert content is not None
        with io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as lines:
            yield lines


def _member(archive: tarfile.TarFile, source: Path, file: str) -> tarfile.TarInfo:
    """The regular file of that name, in any folder of the archive."""
    parts = PurePosixPath(file).parts
    for member in archive:
        if member.isreg() and PurePosixPath(member.name).parts[-len(parts) :] == parts:
            return member
    raise ConfigError(f"{source}: no {file} in it")


class Pair(NamedTuple):
    """A minimal pair: an acceptable and an unacceptable sentence."""

    good: str
    bad: str


@dataclass(frozen=True)
class PairSet:
    """The pairs of one contrast."""

    name: str
    field: str
    """Part of linguistics, such as morphology; empty if the file has none."""
    pairs: tuple[Pair, ...]


def read_blimp(source: Path, limit: int | None = None) -> list[PairSet]:
    """Returns all sets by name, each with its first `limit` pairs or all; `source` is the published .zip or its folder.

    The archive is never unpacked. Raises ConfigError for files that are not in the published format.
    """
    try:
        pair_sets = [_pair_set(source, name, lines, limit) for name, lines in sorted(_files(source).items())]
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: not UTF-8 text") from None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{source}: cannot be read ({error})") from None
    if not pair_sets:
        raise ConfigError(f"{source}: no .jsonl file in it")
    return pair_sets


def _files(source: Path) -> dict[str, Iterable[str]]:
    """The lines of each .jsonl file, by its name without the suffix."""
    if source.is_dir():
        return {path.stem: _lines(path) for path in source.glob("*.jsonl")}
    with zipfile.ZipFile(source) as archive:
        names = [PurePosixPath(name) for name in archive.namelist() if name.endswith(".jsonl")]
    # macOS archives hold a binary file ._NAME beside some files.
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


def check_downstream(settings: DownstreamConfig) -> None:
    """Read the first example of every file, and look for the harness. Raises ConfigError if that fails."""
    if settings.glue is not None:
        for name in settings.glue.tasks:
            for split in SPLITS:
                read_task(Path(settings.glue.folder), name, split, limit=1)
    if settings.blimp is not None:
        read_blimp(Path(settings.blimp.file), limit=1)
    if settings.harness is not None and find_spec("lm_eval") is None:
        raise ConfigError("downstream.harness: needs lm_eval; `pip install 'ssd-lit[harness]'` installs it")
