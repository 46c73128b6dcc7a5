from pathlib import Path

import pytest

from ssd_lit.support.files import whole_folder


def fill(path: Path) -> None:
    with whole_folder(path) as part:
        (part / "a.txt").write_text("a")
        assert not path.exists() or not any(path.iterdir())


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "out") as part:
        (part / "no/such/folder.txt").write_text("a")
    assert not any(tmp_path.iterdir())
    fill(tmp_path / "new/out")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert [path.read_text() for path in (tmp_path / "new/out").iterdir()] == ["a"]
    # Others may read it, whoever wrote the files.
    assert (tmp_path / "new/out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "new/out/a.txt").stat().st_mode & 0o777 == 0o644


def test_an_empty_folder_may_stand_there_a_full_one_or_a_file_may_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    fill(tmp_path / "link")
    assert (tmp_path / "empty/a.txt").is_file()
    (tmp_path / "file").touch()
    for taken in ("empty", "link", "file"):
        with pytest.raises(ValueError, match="exists already"), whole_folder(tmp_path / taken):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "link"]
