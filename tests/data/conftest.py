"""A small corpus, prepared once, and the means to prepare others."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ssd_lit.config import DataConfig, TokenizerConfig
from ssd_lit.data.documents import prepare_documents
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.tokenizer import train_tokenizer

SENTENCE = "the cat sat on a mat while naïve dogs — 漢字 and 🐈 — ran; it's 42 o'clock <|endoftext|>"
Prepare = Callable[..., Path]


def _some_texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(draw.choices(SENTENCE.split(), k=draw.randint(5, 200))) for i in range(count)]


def _prepare(folder: Path, texts: list[str], **settings: object) -> Path:
    source = folder / "texts.jsonl"
    folder.mkdir(exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    sources = [{"kind": "files", "paths": [str(source)]}]
    prepare_documents(DataConfig.model_validate({"name": "small", "sources": sources, **settings}), folder / "out")
    return folder / "out"


@pytest.fixture(scope="session")
def some_texts() -> Callable[..., list[str]]:
    """(count, seed) -> that many different texts of 5 to 200 words."""
    return _some_texts


@pytest.fixture
def prepare(tmp_path: Path) -> Prepare:
    """(texts, name of a folder, settings of DataConfig) -> the folder with their documents."""
    return lambda texts, name="data", **settings: _prepare(tmp_path / name, texts, **settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents/, tokenizer/ and tokens/ of 400 texts, in blocks of 16 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    prepared = _prepare(folder / "prepared", _some_texts(400), validation_fraction=0.1, test_fraction=0.1)
    prepared.rename(folder / "documents")
    train_tokenizer(TokenizerConfig(vocab_size=400), folder / "documents", folder / "tokenizer")
    encode_documents(folder / "documents", folder / "tokenizer", folder / "tokens", sequence_length=16)
    return folder
