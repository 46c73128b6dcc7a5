"""Whether local text is what a data card tells of."""

import os
from pathlib import Path
from typing import Any

import pytest

from ssd_lit.config import ConfigError, DataConfig, FilesSource
from ssd_lit.data.sources import check_sources, describe, describe_file, files_of, is_other_text

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


def test_a_held_out_text_among_the_sources_is_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/c.txt").write_text("some text")

    def checked(paths: str, held_out: str) -> None:
        sources = [{"kind": "files", "paths": [f"{tmp_path}/{paths}"]}]
        content = {"name": "d", "sources": sources, "held_out": {"h": f"{tmp_path}/{held_out}"}}
        check_sources(DataConfig.model_validate(content))

    checked("a.txt", "b.txt")
    checked("*.txt", "elsewhere/c.txt")
    for paths, held_out in (("", "b.txt"), ("*.txt", "b.txt"), ("b.txt", "link.txt"), ("link.txt", "b.txt")):
        with pytest.raises(ConfigError, match=r"data\.held_out\.h: .* is one of the files of data\.sources"):
            checked(paths, held_out)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("h.md", b"text", "not a .txt file"),
        ("h.txt", b" \n", "no text in"),
        ("h.txt", "caf\u00e9 noir".encode("latin-1"), "UTF-8"),
        ("gone.txt", None, "no file"),
    ],
)
def test_a_held_out_text_that_cannot_be_scored_is_told_before_any_is_read(
    tmp_path: Path, name: str, content: bytes | None, told: str
) -> None:
    (tmp_path / "a.txt").write_text("some text")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    sources = [{"kind": "files", "paths": [f"{tmp_path}/a.txt"]}]
    data = DataConfig.model_validate({"name": "d", "sources": sources, "held_out": {"h": f"{tmp_path}/{name}"}})
    with pytest.raises(ConfigError, match=rf"data\.held_out\.h: .*{told}"):
        check_sources(data)


def test_the_name_of_a_file_is_that_file_whatever_brackets_it_has(tmp_path: Path) -> None:
    for name in ("data[12].txt", "data1.txt", "data2.txt"):
        (tmp_path / name).write_text(name)

    def files() -> list[str]:
        source = FilesSource(kind="files", paths=[f"{tmp_path}/data[12].txt"])
        return [path.name for path in files_of(source)]

    assert files() == ["data[12].txt"]
    (tmp_path / "data[12].txt").unlink()
    assert files() == ["data1.txt", "data2.txt"]
