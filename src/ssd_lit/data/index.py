"""The index of encoded documents, and the vocabulary in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_lit.support.files import read_json_checked


def load_index(tokens_dir: Path) -> dict[str, Any]:
    """The index that `encode_documents` wrote last. Raises ValueError if it is missing or damaged."""
    return read_json_checked(tokens_dir / "index.json")


@dataclass(frozen=True)
class VocabInfo:
    """The size of a vocabulary and the ids of its special tokens."""

    vocab_size: int
    eos_id: int
    mask_id: int | None = None
    sentinel_ids: tuple[int, ...] = ()
    """<extra_id_0> first."""

    @classmethod
    def of(cls, index: Mapping[str, Any]) -> "VocabInfo":
        """From the index of encoded documents; old ones have no mask token and no sentinels."""
        sentinels = tuple(index.get("sentinel_ids", ()))
        return cls(index["vocab_size"], index["eos_id"], index.get("mask_id"), sentinels)
