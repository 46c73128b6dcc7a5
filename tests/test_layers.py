"""Imports point down only (CONTRIBUTING, Layout)."""

import ast
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "src/ssd_lit"
LAYERS = (
    "stages", "support", "moe", "config", "paths", "records", "tracking", "data", "run", "models", "training",
    "huggingface", "evaluation", "report", "pipeline", "command", "cli",
)  # fmt: skip
"""From the lowest: each may import those before it."""
OTHER_LIBRARIES = {"lightning", "transformers", "mlflow", "snakemake"}


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in it; what only type checkers read is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "ssd_lit":
            found |= {f"ssd_lit.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_what_is_below_it(layer: str) -> None:
    files = [SOURCES / f"{layer}.py"] if (SOURCES / f"{layer}.py").exists() else list((SOURCES / layer).rglob("*.py"))
    assert files
    allowed = {*LAYERS[: LAYERS.index(layer) + 1], "__version__"}
    for path in files:
        ours = {name.split(".")[1] for name in imported(path) if name.startswith("ssd_lit.")}
        assert ours <= allowed, path


def test_the_method_knows_no_framework() -> None:
    for path in (SOURCES / "moe").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & OTHER_LIBRARIES, path


def test_the_file_that_settings_take_names_from_imports_nothing_of_ours() -> None:
    """Planning must not import torch, and moe's names are all that settings may read of moe."""
    assert imported(SOURCES / "moe/names.py") == {"typing"}
    from_moe = {name for path in (SOURCES / "config").glob("*.py") for name in imported(path) if ".moe" in name}
    assert from_moe == {"ssd_lit.moe.names"}
