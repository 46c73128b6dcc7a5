"""Whether local text is what a data card tells of."""

import os
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.config import DataConfig
from ssd_lit.data.sources import describe, describe_file, is_other_text

WRITTEN = 10**18


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    """Two texts and one that is held out, all older than WRITTEN."""
    for name in ("a.txt", "b.txt", "held_out"):
        write(tmp_path / name, "some text", WRITTEN - 1)
    sources = [{"kind": "files", "paths": [f"{tmp_path}/*.txt"]}]
    return DataConfig.model_validate({"name": "d", "sources": sources, "held_out": {"h": f"{tmp_path}/held_out"}})


@pytest.fixture
def card(data: DataConfig) -> dict[str, Any]:
    held_out = [describe_file(Path(path)) for path in data.held_out.values()]
    return {"sources": [describe(source) for source in data.sources], "held_out": held_out}


def write(path: Path, text: str, date: int) -> None:
    path.write_text(text)
    os.utime(path, ns=(date, date))


def test_the_same_text_is_no_other_whatever_its_date(data: DataConfig, card: dict[str, Any], tmp_path: Path) -> None:
    assert not is_other_text(data, card, WRITTEN)
    write(tmp_path / "a.txt", "some text", WRITTEN + 1)
    assert not is_other_text(data, card, WRITTEN)


@pytest.mark.parametrize("name", ["a.txt", "held_out"])
def test_another_size_or_later_content_is_other_text(
    data: DataConfig, card: dict[str, Any], tmp_path: Path, name: str
) -> None:
    write(tmp_path / name, "some texts", WRITTEN - 1)
    assert is_other_text(data, card, WRITTEN)
    write(tmp_path / name, "some_text", WRITTEN)
    assert is_other_text(data, card, WRITTEN)


def test_what_is_older_and_as_large_is_not_read(data: DataConfig, card: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "some_text", WRITTEN - 1)
    assert not is_other_text(data, card, WRITTEN)


def test_a_new_text_counts_and_one_that_is_gone_does_not(
    data: DataConfig, card: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("a.txt", "b.txt", "held_out"):
        (tmp_path / name).unlink()
        assert not is_other_text(data, card, WRITTEN)
    write(tmp_path / "c.txt", "some text", WRITTEN - 1)
    assert is_other_text(data, card, WRITTEN)


def test_a_card_from_before_held_out_texts_were_told(data: DataConfig, card: dict[str, Any]) -> None:
    del card["held_out"]
    assert not is_other_text(data, card, WRITTEN)
