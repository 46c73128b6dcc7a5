"""What a long stage has found so far, so that it goes on where it was ended."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssd_lit.support.files import read_json_checked, write_json_checked


class ResumableResults:
    """ResumableResults of a stage's work, each kept in a file of the folder as soon as it is done.

    `inputs` is all that decides them, as JSON has it: pieces of other inputs are thrown away.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any]):
        self._folder = folder
        book = folder / "inputs.json"
        if not (book.exists() and read_json_checked(book) == inputs):
            shutil.rmtree(folder, ignore_errors=True)
            write_json_checked(book, inputs)

    def get(self, name: str, work: Callable[[], Any]) -> Any:
        """The piece of that name: read, if it was done before, or else done and kept."""
        path = self._folder / f"{name}.json"
        if path.exists():
            return read_json_checked(path)["found"]
        found = work()
        write_json_checked(path, {"found": found})
        return found
