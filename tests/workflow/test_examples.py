"""The commands and the Python of README and docs, run as they stand there, or marked with the reason why not."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_lit.cli import main
from tests.checkpoint_folders import save_model
from tests.pages import PAGES, blocks
from tests.workflow.running import prepared

pytestmark = pytest.mark.whole_run

TUTORIAL = "docs/tutorial.md"
"""Its blocks are run by tests/test_tutorial.py."""
DATA = {"yaml", "ini", "text", "mermaid", "json"}
RUN = {"sh": ["bash", "-ec"], "python": [sys.executable, "-c"]}


def examples(page: str) -> list[tuple[list[str], str]]:
    return [(RUN[block.language], block.code) for block in blocks(page) if block.language in RUN and block.why is None]


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_is_run_or_says_why_not(page: str) -> None:
    for block in blocks(page):
        assert block.language in DATA | RUN.keys(), block.code
        assert block.why is None or block.why.startswith("not run: ")


@pytest.fixture(scope="module")
def here(quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds what the pages call DIR, a checkpoint folder, and the results of the quick experiment."""
    folder = tmp_path_factory.mktemp("here")
    shutil.copytree(quick, folder / "results", symlinks=True)
    assert main(["store", str(folder / "results")]) == 0  # MLflow finds the artifacts at their new place
    save_model(folder / "DIR", "gpt2")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page != TUTORIAL and examples(page)])
def test_the_examples_of_a_page_run_one_after_the_other(page: str, here: Path) -> None:
    for command, code in examples(page):
        done = subprocess.run([*command, code], cwd=here, env=prepared(), capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr[-3000:]}"
