"""GLUE and BLiMP at a size for tests, in the format they are published in."""

import json
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

HEADERS = {
    "SST-2": ["sentence", "label"],
    "RTE": ["index", "sentence1", "sentence2", "label"],
    "MRPC": ["\N{ZERO WIDTH NO-BREAK SPACE}Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "STS-B": ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2",
              "score"],
}  # fmt: skip


def write_tsv(folder: Path, task: str, split: str, rows: Sequence[Sequence[object]]) -> Path:
    path = folder / task / f"{split}.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in (HEADERS[task], *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_glue(folder: Path, examples: int = 40) -> Path:
    """All four tasks, about one thing that can be seen in every text: whether it speaks of a river."""
    for split, count in (("train", examples), ("dev", 20)):
        texts = [f"the {'river' if i % 2 else 'engine'} moves {i}" for i in range(count)]
        write_tsv(folder, "SST-2", split, [(text, i % 2) for i, text in enumerate(texts)])
        names = ("not_entailment", "entailment")
        write_tsv(folder, "RTE", split, [(i, text, "a boat", names[i % 2]) for i, text in enumerate(texts)])
        write_tsv(folder, "MRPC", split, [(i % 2, 1, 2, text, "a boat") for i, text in enumerate(texts)])
        rows = [(i, "g", "f", 2012, i, "s", "s", text, "a boat", f"{5 * (i % 2)}.000") for i, text in enumerate(texts)]
        write_tsv(folder, "STS-B", split, rows)
    return folder


def packed(folder: Path) -> Path:
    """The folder as a .tar.xz beside it."""
    path = folder.with_suffix(".tar.xz")
    with tarfile.open(path, "w:xz") as archive:
        archive.add(folder, "glue")
    return path


def write_blimp(path: Path, sets: dict[str, tuple[str, Sequence[tuple[str, str]]]]) -> Path:
    """BLiMP.zip of sets by name, each a field and pairs (good, bad), with what a Mac leaves in an archive."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, (field, pairs) in sets.items():
            rows = [
                {"sentence_good": good, "sentence_bad": bad, "field": field, "UID": name, "pairID": str(i)}
                for i, (good, bad) in enumerate(pairs)
            ]
            archive.writestr(f"data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            archive.writestr(f"__MACOSX/data/._{name}.jsonl", b"\x00\x05\x16\xff")
    return path
