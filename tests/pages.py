"""The pages of documentation and their blocks of code."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
BLOCK = re.compile(
    r"^(?:<!-- (?P<why>[^\n]+?) -->\n)?^ *```(?P<language>\w*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    code: str
    why: str | None
    """The comment right above it, which says why no test runs it."""


def blocks(page: str) -> Iterator[Block]:
    """All blocks of a page, in order."""
    for match in BLOCK.finditer((ROOT / page).read_text(encoding="utf-8")):
        yield Block(match["language"], match["code"], match["why"])
