"""The site of the documentation: built without a network, warnings being errors."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssd_lit.cli import app
from tests.pages import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} | {"changelog", "contributing"}
    assert {path.parent.name for path in site.glob("*/index.html")} == pages
    assert 'href="tutorial/"' in (site / "index.html").read_text()


def test_commands_and_docstrings_are_shown(site: Path) -> None:
    commands = (site / "commands/index.html").read_text()
    for command in app.registered_commands:
        assert f'id="{command.name}"' in commands
    python = (site / "python/index.html").read_text()
    assert 'id="ssd_lit.load"' in python
    assert "Reads safetensors only and runs nothing of the folder." in " ".join(python.split())


def test_a_list_within_a_list_is_one(site: Path) -> None:
    """GitHub takes two blanks before it, the site's library four."""
    page = (site / "results/index.html").read_text()
    item = page[page.index("No time is saved yet") :]
    assert item.index("<ul>") < item.index("</li>")
