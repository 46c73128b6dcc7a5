"""Tables on a terminal, and as plain lines where there is none."""

import sys

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

PIPED_WIDTH = 1000
"""Columns of a table in a pipe or a file, where nothing need be cut."""


def console() -> Console:
    """Standard output; without a terminal it gets no colours, no markup and no line breaks within a row."""
    return Console(width=None if sys.stdout.isatty() else PIPED_WIDTH, highlight=False, emoji=False)


def table(*columns: str, numbers: tuple[str, ...] = (), title: str | None = None) -> Table:
    """An empty table; the columns named in `numbers` stand at their right edge."""
    made = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, title=title, title_justify="left", pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", no_wrap=column in numbers)
    return made
