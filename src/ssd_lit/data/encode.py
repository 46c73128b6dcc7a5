"""Documents as token ids: each split is one stream on disk, cut into blocks without padding."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ssd_lit.config import ConfigError
from ssd_lit.data.documents import SPLITS, Progress, count_groups, read_split, silent
from ssd_lit.data.side_by_side import encoded
from ssd_lit.data.tokenizer import check_tokenizer, end_of_text_id, load_tokenizer, mask_id, sentinel_ids
from ssd_lit.support.files import whole_file, write_json_checked

_REPORT_TOKENS = 10_000_000
_GROUPS_A_PROCESS = 16
"""About 16 MB of text: below it a process takes longer to start than it saves."""


def encode_documents(
    documents_dir: Path,
    tokenizer_dir: Path,
    out_dir: Path,
    sequence_length: int,
    progress: Progress = silent,
    *,
    held_out: Iterable[str] = (),
    processes: int = 1,
) -> dict[str, Any]:
    """Write `out_dir`/<split>.bin for train, validation, test and each of `held_out`, then the index.

    Up to `processes` of them encode, fewer if there is little text; their number does not change the result. A file has
    the token ids of the split's documents, each followed by end-of-text, as little-endian uint16, or uint32
    from a vocabulary of 65,536 on. Returns the index, which is `out_dir`/index.json: vocab_size, eos_id, mask_id (null
    if there is none), sentinel_ids (<extra_id_0> first), dtype, sequence_length; for each split tokens, documents,
    blocks and sha256; and a digest over all splits. Raises ConfigError if a split is shorter than one block or the
    tokenizer cannot encode it, ValueError if documents or tokenizer are damaged.
    """
    index_path = out_dir / "index.json"
    index_path.unlink(missing_ok=True)  # an old index must not describe new tokens
    check_tokenizer(tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    eos_id = end_of_text_id(tokenizer_dir)
    # Not the number of tokens: ids of a tokenizer made elsewhere may have gaps.
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    dtype = np.dtype("<u2" if vocab_size < 65536 else "<u4")
    splits = {}
    for name in (*SPLITS, *held_out):
        with whole_file(out_dir / f"{name}.bin") as part, part.open("wb") as file:
            stream = _Stream(file, dtype)
            needed = max(1, min(processes, count_groups(documents_dir, name) // _GROUPS_A_PROCESS))
            groups = stream.counted(read_split(documents_dir, name))
            for content in encoded(tokenizer_dir, dtype.str, groups, needed):
                stream.append(content)
                if stream.unreported >= _REPORT_TOKENS:
                    progress(f"encoded {stream.tokens / 1e6:.0f} M tokens of {name}")
                    stream.unreported = 0
        splits[name] = stream.summary(name, sequence_length)
    index = {
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "mask_id": mask_id(tokenizer_dir),
        "sentinel_ids": sentinel_ids(tokenizer_dir),
        "dtype": dtype.name,
        "sequence_length": sequence_length,
        "splits": splits,
        "digest": hashlib.sha256("".join(split["sha256"] for split in splits.values()).encode()).hexdigest(),
    }
    write_json_checked(index_path, index)
    return index


class _Stream:
    """Writes the token ids of one split to a file, counts and hashes them."""

    def __init__(self, file: BinaryIO, dtype: "np.dtype[Any]") -> None:
        self._file = file
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self.documents = 0
        self.tokens = 0
        self.unreported = 0
        """Tokens since the last progress message."""

    def counted(self, batches: Iterable[list[str]]) -> Iterator[list[str]]:
        """The batches, whose documents are counted as they go by."""
        for texts in batches:
            self.documents += len(texts)
            yield texts

    def append(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self.tokens += len(content) // self._dtype.itemsize
        self.unreported += len(content) // self._dtype.itemsize

    def summary(self, split: str, sequence_length: int) -> dict[str, Any]:
        """The index entry of the split. Raises ConfigError if there is not one block."""
        # A block of S tokens needs S + 1: the last one is only a target.
        blocks = (self.tokens - 1) // sequence_length
        if blocks < 1:
            raise ConfigError(
                f"the {split} split has {self.tokens} tokens, less than one block of sequence_length "
                f"{sequence_length} (+ 1): give more text, a larger share for this split or shorter blocks"
            )
        sha256 = self._sha256.hexdigest()
        return {"tokens": self.tokens, "documents": self.documents, "blocks": blocks, "sha256": sha256}
