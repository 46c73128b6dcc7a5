"""Documents of all sources: cleaned, deduplicated, shuffled and split, in bounded memory.

The hash of a document's cleaned text decides its place in the order and its split. So the result depends neither on
the order of the sources nor on other documents.

The first pass writes each document to one of 128 buckets by the leading bits of its hash, so equal texts share a
bucket. The second pass sorts one bucket at a time by hash, and reads the texts in that order.
"""

import hashlib
import json
import os
import re
import struct
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import pyarrow
import pyarrow.parquet

from ssd_lit.config import ConfigError, DataConfig
from ssd_lit.data.readers import read_text
from ssd_lit.data.sources import check_sources, describe, describe_file, documents
from ssd_lit.support.files import naming, write_json_checked, write_text

SPLITS = ("train", "validation", "test")
Progress = Callable[[str], None]

_BUCKETS = 128  # open at once: some systems allow 256 files
_RECORD = struct.Struct("<16sI")
_LONGEST_DOCUMENT = 2**31 - 2
"""Bytes of text in a column of Parquet."""
_ROW_GROUP_BYTES = 1_000_000
_REPORT_BYTES = 50_000_000
# Not U+0085 (next line): in practice it is the ellipsis of a Windows-1252 page read as Latin-1.
_BREAK = re.compile("[\r\x0b\x0c\x1c-\x1e\u2028\u2029]")
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ud800-\udfff]")
_MAY_BE_MARKS = re.compile(r"[^\w\x00-\x7f]{31,}")
_MOST_MARKS = 30
_MANY_NEWLINES = re.compile(r"\n(?:[ \t]*\n){2,}")


def silent(_: str) -> None:
    """Progress callback that does nothing."""


def prepare_documents(config: DataConfig, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Write train, validation and test documents of all sources as `out`/<split>.parquet, and the data card.

    Each file has one column, `text`, and one row a document; a held-out text is a split of one document. Returns the
    card, which is also written as `out`/card.md and, last, `out`/card.json. Needs disk space for the whole text during
    the work. Raises ConfigError if a source cannot be read, or if a split would be empty.
    """
    check_sources(config)
    out.mkdir(parents=True, exist_ok=True)
    with naming(out), tempfile.TemporaryDirectory(dir=out, prefix=".work.") as work:
        first = _spill(config, Path(work), progress)
        second = _collect(config, Path(work), progress)
        _check_splits(config, second.splits)
        second.splits |= {name: _hold_out(Path(path), Path(work), name) for name, path in config.held_out.items()}
        for split in second.splits:
            (Path(work) / f"{split}.parquet").replace(out / f"{split}.parquet")
    card = _card(config, first, second)
    write_text(out / "card.md", _card_text(card))
    write_json_checked(out / "card.json", card)
    return card


def read_split(documents_dir: Path, split: str) -> Iterator[list[str]]:
    """The documents of a split in order, a row group (about 1 MB) at a time.

    Raises ValueError if the split's file is missing or damaged.
    """
    with _opened(documents_dir, split) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=["text"]).column(0).to_pylist()


def count_groups(documents_dir: Path, split: str) -> int:
    """The number of row groups of a split. Raises ValueError as `read_split` does."""
    with _opened(documents_dir, split) as file:
        return int(file.num_row_groups)


@contextmanager
def _opened(documents_dir: Path, split: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    path = documents_dir / f"{split}.parquet"
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; run the stage that writes it first") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: not a whole Parquet file ({reason}); delete {documents_dir} and run again") from None


def normalise(text: str) -> str:
    """Unicode NFC, every line break as \\n and at most two in a row, no control characters but \\n and \\t.

    Of combining marks in a row 30 are kept, as in Unicode's Stream-Safe Text Format (UAX 15): normalising a run takes
    time quadratic in its length.
    """
    text = _UNWANTED.sub("", _BREAK.sub("\n", text.replace("\r\n", "\n")))
    if not text.isascii():
        text = _MAY_BE_MARKS.sub(_with_few_marks, text)
    return _MANY_NEWLINES.sub("\n\n", unicodedata.normalize("NFC", text)).strip()


def _with_few_marks(run: re.Match[str]) -> str:
    kept, marks = [], 0
    for character in run[0]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return "".join(kept)


def split_of(digest: bytes, validation_fraction: float, test_fraction: float) -> str:
    """The split of a document by the second half of its hash; the first half decides the order.

    Validation takes the lowest hashes and test the highest, so that changing one fraction moves nothing between them.
    """
    place = int.from_bytes(digest[8:], "big") / 2**64
    if place < validation_fraction:
        return "validation"
    return "test" if place >= 1 - test_fraction else "train"


@dataclass
class _FirstPass:
    """Counts of the first pass."""

    sources: list[dict[str, int]] = field(default_factory=list)
    """Documents and bytes of each source."""
    empty: int = 0


@dataclass
class _SecondPass:
    """Summaries of the splits and counts of the second pass."""

    splits: dict[str, dict[str, Any]] = field(default_factory=dict)
    duplicates: int = 0
    left_out: int = 0


def _spill(config: DataConfig, work: Path, progress: Progress) -> _FirstPass:
    """First pass: clean every document and write it, with its hash, to its bucket."""
    first = _FirstPass()
    next_report = _REPORT_BYTES
    with ExitStack() as stack:
        buckets = [stack.enter_context(_bucket(work, number).open("wb")) for number in range(_BUCKETS)]
        for source in config.sources:
            counts = {"documents": 0, "bytes": 0}
            first.sources.append(counts)
            for text in documents(source):
                content = normalise(text).encode("utf-8")
                if not content:
                    first.empty += 1
                    continue
                if len(content) > _LONGEST_DOCUMENT:
                    raise ConfigError(
                        f"data {config.name!r}: a document of {len(content) / 1e9:.1f} GB; allowed are "
                        f"{_LONGEST_DOCUMENT / 1e9:.1f}, and in a .txt file blank lines end documents"
                    )
                counts["documents"] += 1
                counts["bytes"] += len(content)
                digest = hashlib.blake2b(content, digest_size=16).digest()
                buckets[digest[0] * _BUCKETS // 256].write(_RECORD.pack(digest, len(content)) + content)
                if sum(counts["bytes"] for counts in first.sources) >= next_report:
                    progress(f"read {next_report // 1_000_000} MB")
                    next_report += _REPORT_BYTES
    return first


def _collect(config: DataConfig, work: Path, progress: Progress) -> _SecondPass:
    """Second pass: drop the duplicates of each bucket, sort it by hash, write each document to its split."""
    limit = float("inf") if config.max_megabytes is None else config.max_megabytes * 1e6
    second = _SecondPass()
    with ExitStack() as stack:
        writers = {name: stack.enter_context(_SplitWriter(work / f"{name}.parquet")) for name in SPLITS}
        for number in range(_BUCKETS):
            with _bucket(work, number).open("rb") as bucket:
                for digest, offset, size in sorted(_records(bucket, second)):
                    if sum(writer.bytes for writer in writers.values()) >= limit:
                        second.left_out += 1
                        continue
                    split = split_of(digest, config.validation_fraction, config.test_fraction)
                    bucket.seek(offset)
                    writers[split].add(digest, bucket.read(size))
            _bucket(work, number).unlink()
            if number % 32 == 31:
                progress(f"sorted {number + 1} of {_BUCKETS} buckets")
    second.splits = {name: writer.summary() for name, writer in writers.items()}
    return second


def _bucket(work: Path, number: int) -> Path:
    return work / f"bucket-{number:03d}"


def _records(bucket: BinaryIO, second: _SecondPass) -> Iterator[tuple[bytes, int, int]]:
    """Hash, offset and size of every distinct text in a bucket; counts the others as duplicates."""
    digests: set[bytes] = set()
    while header := bucket.read(_RECORD.size):
        digest, size = _RECORD.unpack(header)
        offset = bucket.tell()
        bucket.seek(size, os.SEEK_CUR)
        if digest in digests:
            second.duplicates += 1
            continue
        digests.add(digest)
        yield digest, offset, size


class _SplitWriter:
    """Appends documents to one Parquet file, in row groups of about 1 MB."""

    def __init__(self, path: Path) -> None:
        schema = pyarrow.schema([("text", pyarrow.string())])
        self._file = pyarrow.parquet.ParquetWriter(
            path, schema, compression="zstd", use_dictionary=False, write_page_checksum=True
        )
        self._rows: list[bytes] = []
        self._rows_bytes = 0
        self._digest = hashlib.sha256()
        self.documents = 0
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def add(self, digest: bytes, content: bytes) -> None:
        """Append a document given as UTF-8, with its hash."""
        self._rows.append(content)
        self._rows_bytes += len(content)
        self._digest.update(digest)
        self.documents += 1
        self.bytes += len(content)
        if self._rows_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._file.write_table(pyarrow.table({"text": pyarrow.array(self._rows, pyarrow.string())}))
            self._rows, self._rows_bytes = [], 0

    def summary(self) -> dict[str, Any]:
        """Counts, and a digest over the hashes of the documents in their order."""
        return {"documents": self.documents, "bytes": self.bytes, "digest": self._digest.hexdigest()}


def _hold_out(path: Path, work: Path, name: str) -> dict[str, Any]:
    content = normalise(read_text(path)).encode("utf-8")
    if not content:
        raise ConfigError(f"data.held_out.{name}: no text in {path}")
    with _SplitWriter(work / f"{name}.parquet") as writer:
        writer.add(hashlib.blake2b(content, digest_size=16).digest(), content)
    return writer.summary()


def _check_splits(config: DataConfig, splits: dict[str, dict[str, Any]]) -> None:
    total = sum(split["documents"] for split in splits.values())
    if not total:
        raise ConfigError(f"data {config.name!r}: the sources hold no document with text")
    for name, split in splits.items():
        if not split["documents"]:
            remedy = "give more text" if name == "train" else f"give more text or raise {name}_fraction"
            if total == 1:
                remedy += "; in a .txt file blank lines end documents"
            raise ConfigError(f"data {config.name!r}: none of {total} documents falls in the {name} split; {remedy}")


def _card(config: DataConfig, first: _FirstPass, second: _SecondPass) -> dict[str, Any]:
    return {
        "name": config.name,
        "sources": [
            {**describe(source), **counts} for source, counts in zip(config.sources, first.sources, strict=True)
        ],
        "held_out": [describe_file(Path(path)) for path in config.held_out.values()],
        "empty_documents": first.empty,
        "duplicates": second.duplicates,
        "left_out": second.left_out,
        "max_megabytes": config.max_megabytes,
        "validation_fraction": config.validation_fraction,
        "test_fraction": config.test_fraction,
        "splits": second.splits,
        "digest": hashlib.sha256(json.dumps(second.splits, sort_keys=True).encode()).hexdigest(),
    }


def _card_text(card: dict[str, Any]) -> str:
    lines = [
        f"# Text: {card['name']}",
        "",
        "| source | documents | MB | what it is | terms |",
        "|---|---|---|---|---|",
    ]
    for source in card["sources"]:
        name = source.get("name") or source.get("dataset") or ", ".join(source["paths"])
        counts = f"{source['documents']:,} | {source['bytes'] / 1e6:.1f}"
        lines.append(f"| {name} | {counts} | {source['description']} | {source['terms']} |")
    lines += ["", "| split | documents | MB | digest |", "|---|---|---|---|"]
    for name, split in card["splits"].items():
        lines.append(f"| {name} | {split['documents']:,} | {split['bytes'] / 1e6:.1f} | {split['digest'][:16]} |")
    lines += [
        "",
        f"Dropped: {card['duplicates']:,} exact duplicates, {card['empty_documents']:,} empty documents; "
        f"{card['left_out']:,} documents beyond max_megabytes.",
        "Text is in Unicode NFC without control characters. Splits and order follow from each document's hash.",
        "",
    ]
    return "\n".join(lines)
