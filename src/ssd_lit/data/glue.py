"""GLUE tasks (arXiv 1804.07461) from the TSV files in which they are published."""

import csv
import io
import lzma
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from ssd_lit.config import ConfigError

SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Task:
    """Where a task keeps its examples, and how it is scored."""

    title: str
    """Its name, and that of its folder."""
    texts: tuple[str, ...]
    """Columns that hold an example's text or pair of texts."""
    label: str
    """The column that holds what is to be told about it."""
    labels: tuple[str, ...]
    """The classes, as the files write them; none where it is a number."""
    metrics: tuple[str, ...]

    def target(self, written: str) -> float:
        """The number of the class, or the number itself. Raises ValueError for what is neither."""
        return float(self.labels.index(written) if self.labels else written)


TASKS = {
    "sst2": Task("SST-2", ("sentence",), "label", ("0", "1"), ("accuracy",)),
    "rte": Task("RTE", ("sentence1", "sentence2"), "label", ("not_entailment", "entailment"), ("accuracy",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1"), ("accuracy", "f1")),
    "stsb": Task("STS-B", ("sentence1", "sentence2"), "score", (), ("pearson", "spearman")),
}


class Example(NamedTuple):
    """One text or a pair of them, and the number of its class or its score."""

    texts: tuple[str, ...]
    target: float


def read_task(source: Path, name: str, split: str, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a task's split, or all; `source` is a folder or a packed one.

    A packed folder is read where it lies and never unpacked. Raises ConfigError for what is not in the published
    format.
    """
    task = TASKS[name]
    file = f"{task.title}/{split}.tsv"
    try:
        with _open(source, file) as lines:
            # Quotes are characters of the sentences here, and stand alone as often as in pairs.
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            missing = [column for column in (*task.texts, task.label) if column not in (rows.fieldnames or [])]
            if missing:
                raise ConfigError(f"{source}: {file} has no column {missing[0]!r}")
            found = [_example(task, row, f"{source}: {file}, line {rows.line_num}") for row in islice(rows, limit)]
    except UnicodeDecodeError:
        raise ConfigError(f"{source}: {file} is not UTF-8 text") from None
    except (OSError, EOFError, csv.Error, tarfile.TarError, lzma.LZMAError) as error:
        raise ConfigError(f"{source}: {file} cannot be read ({error})") from None
    if not found:
        raise ConfigError(f"{source}: {file} has no examples")
    return found


def _example(task: Task, row: dict[str, str | None], where: str) -> Example:
    # A line that is cut short holds None in its last columns.
    texts, written = tuple(row[column] or "" for column in task.texts), row[task.label]
    if not all(texts) or written is None:
        raise ConfigError(f"{where}: columns are missing")
    try:
        return Example(texts, task.target(written))
    except ValueError:
        allowed = ", ".join(task.labels) or "numbers"
        raise ConfigError(f"{where}: {task.label} {written!r}; allowed: {allowed}") from None


@contextmanager
def _open(source: Path, file: str) -> Iterator[IO[str]]:
    """The lines of a file of the folder, without a byte-order mark."""
    if source.is_dir():
        with (source / file).open(encoding="utf-8-sig", newline="") as lines:
            yield lines
        return
    with tarfile.open(source) as archive:
        packed = archive.extractfile(_member(archive, source, file))
        assert packed is not None
        with io.TextIOWrapper(packed, encoding="utf-8-sig", newline="") as lines:
            yield lines


def _member(archive: tarfile.TarFile, source: Path, file: str) -> tarfile.TarInfo:
    """The packed file of that name, in whatever folder; links do not count."""
    parts = PurePosixPath(file).parts
    for member in archive:
        if member.isreg() and PurePosixPath(member.name).parts[-len(parts) :] == parts:
            return member
    raise ConfigError(f"{source}: no {file} in it")
