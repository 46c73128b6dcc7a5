"""A small corpus, prepared once."""

import json
import random
from pathlib import Path

import pytest

from ssd_lit.config import DataConfig, TokenizerConfig
from ssd_lit.data.documents import prepare_documents
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.tokenizer import train_tokenizer

WORDS = "the cat sat on a mat while naïve dogs — 漢字 and 🐈 — ran; it's 42 o'clock <|endoftext|>".split()


def some_texts(count: int, seed: int = 0) -> list[str]:
    """Different texts of 5 to 200 words."""
    draw = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(5, 200))) for i in range(count)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def data_config(*paths: Path, **settings: object) -> DataConfig:
    source = {"kind": "files", "paths": [str(path) for path in paths]}
    return DataConfig.model_validate({"name": "small", "sources": [source], **settings})


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with documents/, tokenizer/ and tokens/ of 400 texts, in blocks of 16 tokens."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = write_jsonl(folder / "texts.jsonl", some_texts(400))
    prepare_documents(data_config(texts, validation_share=0.1, test_share=0.1), folder / "documents")
    train_tokenizer(TokenizerConfig(vocab_size=400), folder / "documents", folder / "tokenizer")
    encode_documents(folder / "documents", folder / "tokenizer", folder / "tokens", sequence_length=16)
    return folder
