"""Partial results of a long stage, from which it resumes after an interruption."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssd_lit.support.files import read_json_checked, write_json_checked


class ResumableResults:
    """Partial results, each written to a file of the folder as soon as it is done.

    `inputs`, as JSON, is all that they depend on: results of other inputs are deleted.
    """

    def __init__(self, folder: Path, inputs: dict[str, Any]):
        self._folder = folder
        path = folder / "inputs.json"
        if not (path.exists() and read_json_checked(path) == inputs):
            shutil.rmtree(folder, ignore_errors=True)
            write_json_checked(path, inputs)

    def get(self, name: str, work: Callable[[], Any]) -> Any:
        """The result of that name, read if it is there, else computed by `work` and written."""
        path = self._folder / f"{name}.json"
        if path.exists():
            return read_json_checked(path)["found"]
        result = work()
        write_json_checked(path, {"found": result})
        return result
