"""Cleaned, without duplicates, shuffled and split, always in the same way."""

import hashlib
import json
import random
import unicodedata
from itertools import chain, pairwise
from pathlib import Path

import pyarrow.parquet
import pytest

from ssd_lit.config import ConfigError, DataConfig
from ssd_lit.data.documents import SPLITS, normalise, prepare_documents, read_split, split_of
from ssd_lit.support.files import read_json, sha256

SHARES = {"validation_fraction": 0.2, "test_fraction": 0.1}


def texts_in(folder: Path, split: str) -> list[str]:
    return list(chain.from_iterable(read_split(folder, split)))


def test_equals_sorting_everything_in_memory(prepare, some_texts) -> None:
    texts = some_texts(2000)
    folder = prepare(texts, **SHARES)
    reference: dict[str, list[str]] = {split: [] for split in SPLITS}
    hashed = {hashlib.blake2b(text.encode(), digest_size=16).digest(): text for text in map(normalise, texts)}
    for digest, text in sorted(hashed.items()):
        reference[split_of(digest, **SHARES)].append(text)
    assert {split: texts_in(folder, split) for split in SPLITS} == reference


def test_files_have_one_column_named_text(prepare, some_texts) -> None:
    folder = prepare(some_texts(200), **SHARES)
    for split in SPLITS:
        assert pyarrow.parquet.read_schema(folder / f"{split}.parquet").names == ["text"]


def test_shares_are_kept_roughly_and_order_is_shuffled(prepare, some_texts) -> None:
    texts = some_texts(3000)
    folder = prepare(texts, **SHARES)
    assert len(texts_in(folder, "validation")) == pytest.approx(600, rel=0.15)
    assert len(texts_in(folder, "test")) == pytest.approx(300, rel=0.2)
    places = [int(text.split()[0].split(".")[1]) for text in texts_in(folder, "train")]
    # Of a shuffled sequence, neighbours rise and fall equally often.
    rises = sum(a < b for a, b in pairwise(places))
    assert rises / len(places) == pytest.approx(0.5, abs=0.1)


def test_duplicates_are_dropped_after_cleaning(prepare, some_texts) -> None:
    texts = some_texts(300)
    folder = prepare([*texts, *texts[:50], f"  {texts[0]}\r\n", unicodedata.normalize("NFD", texts[1])], **SHARES)
    kept = [text for split in SPLITS for text in texts_in(folder, split)]
    assert sorted(kept) == sorted(map(normalise, texts))
    assert read_json(folder / "card.json")["duplicates"] == 52


def test_documents_stay_in_their_split_when_others_are_added(prepare, some_texts) -> None:
    few, more = some_texts(300), some_texts(300, seed=1)
    before = prepare(few, "before", **SHARES)
    after = prepare([*more, *few], "after", **SHARES)
    for split in SPLITS:
        assert set(texts_in(before, split)) <= set(texts_in(after, split))


def test_same_bytes_whatever_the_order_of_sources(prepare, some_texts) -> None:
    texts = some_texts(300)
    one = prepare(texts, "one", **SHARES)
    other = prepare(random.Random(0).sample(texts, len(texts)), "other", **SHARES)
    for split in SPLITS:
        assert sha256(one / f"{split}.parquet") == sha256(other / f"{split}.parquet")
    assert read_json(one / "card.json")["digest"] == read_json(other / "card.json")["digest"]


def test_max_megabytes_keeps_about_that_much_by_hash(prepare, some_texts) -> None:
    texts = some_texts(1000)
    all_of_it = prepare(texts, "all", **SHARES)
    half = prepare(texts, "half", max_megabytes=0.3, **SHARES)
    card = read_json(half / "card.json")
    assert sum(split["bytes"] for split in card["splits"].values()) == pytest.approx(300_000, abs=2000)
    assert sum(split["documents"] for split in card["splits"].values()) + card["left_out"] == 1000
    for split in SPLITS:
        kept = texts_in(half, split)
        assert kept == texts_in(all_of_it, split)[: len(kept)]


def test_card_tells_counts_sources_and_terms(prepare, some_texts) -> None:
    folder = prepare([*some_texts(200), "", " \n"], **SHARES)
    card = read_json(folder / "card.json")
    assert card["empty_documents"] == 2
    assert card["sources"][0]["documents"] == 200
    assert card["sources"][0]["files"][0]["sha256"] == sha256(folder.parent / "texts.jsonl")
    for split in SPLITS:
        texts = texts_in(folder, split)
        assert card["splits"][split]["documents"] == len(texts)
        assert card["splits"][split]["bytes"] == sum(len(text.encode()) for text in texts)
    assert "those of the files" in (folder / "card.md").read_text()


def test_nothing_but_the_outputs_remains(prepare, some_texts) -> None:
    folder = prepare(some_texts(200), **SHARES)
    names = {path.name for path in folder.iterdir()}
    assert names == {"train.parquet", "validation.parquet", "test.parquet", "card.json", "card.md"}


@pytest.mark.parametrize("texts", [[], ["", " \n\t"]])
def test_no_text_at_all(prepare, texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="no text in"):
        prepare(texts)


def test_empty_split_is_named_and_leaves_nothing(prepare, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none of 1 documents falls in the validation split"):
        prepare(["only one"], "data", validation_fraction=0.001, test_fraction=0.001)
    assert list((tmp_path / "data" / "out").iterdir()) == []


def test_mistake_in_the_last_source_is_told_before_reading(tmp_path: Path) -> None:
    (tmp_path / "good.jsonl").write_text('{"text": "one"}\nnot JSON\n')
    (tmp_path / "bad.csv").write_text("x")
    sources = [{"kind": "files", "paths": [str(tmp_path / name)]} for name in ("good.jsonl", "bad.csv")]
    config = DataConfig.model_validate({"name": "small", "sources": sources})
    with pytest.raises(ConfigError, match=r"bad\.csv: unknown kind"):
        prepare_documents(config, tmp_path / "out")


def test_progress_is_told(tmp_path: Path, some_texts) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts(200)))
    sources = [{"kind": "files", "paths": [str(tmp_path / "a.jsonl")]}]
    said: list[str] = []
    prepare_documents(
        DataConfig.model_validate({"name": "small", "sources": sources, **SHARES}), tmp_path / "out", said.append
    )
    assert said[-1] == "sorted 128 of 128 buckets"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("e\u0301", "é"),
        (" a\r\nb\rc ", "a\nb\nc"),
        ("a\n \n\t\n\nb", "a\n\nb"),
        ("a\n\nb", "a\n\nb"),
        ("a\x00\x1b\x7f\x85\ufeffb\tc", "ab\tc"),
        ("a\ud800b", "ab"),
        ("page\fnext\vline\u2028line\u2029paragraph", "page\nnext\nline\nline\nparagraph"),
        ("file\x1cgroup\x1drecord\x1eend\x1f.", "file\ngroup\nrecord\nend."),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean


def test_normalise_twice_is_once() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        raw = "".join(chr(draw.choice([draw.randrange(0x500), draw.randrange(0x11000)])) for _ in range(20))
        clean = normalise(raw)
        assert normalise(clean) == clean
        clean.encode("utf-8")


def test_missing_split_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.parquet: not found; run the stage"):
        list(read_split(tmp_path, "train"))


def test_a_document_longer_than_a_column_holds_is_told(prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_lit.data.documents._LONGEST_DOCUMENT", 100)
    with pytest.raises(ConfigError, match="blank lines end documents"):
        prepare(["short", "word " * 30])
