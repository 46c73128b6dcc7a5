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


def table(*columns: str, numbers: tuple[str, ...] = (), cut: str | None = None, title: str | None = None) -> Table:
    """An empty table, a line a row; the columns named in `numbers` stand at their right edge.

    On a terminal that is too narrow the column `cut` is cut, and the others are not.
    """
    on_terminal = sys.stdout.isatty()
    made = Table(
        box=SIMPLE_HEAD if on_terminal else None,
        title=title,
        title_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
        expand=on_terminal and cut is not None,
    )
    for column in columns:
        ratio = 1 if on_terminal and column == cut else None
        made.add_column(column, justify="right" if column in numbers else "left", no_wrap=True, ratio=ratio)
    return made
