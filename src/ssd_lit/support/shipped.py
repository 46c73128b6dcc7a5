"""What ships beside the code: the workflow and the experiments."""

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def _shipped(name: str) -> Path:
    # A wheel holds the folder; in a clone, and where one is installed for editing, it lies at the repository's top.
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parents[1] / name


WORKFLOW = _shipped("workflow")
"""The folder of the Snakefile, its rules and its profiles."""
CONFIGS = _shipped("configs")
"""The folder of the experiments that ship."""
