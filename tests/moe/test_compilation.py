"""Every kernel that an H100 would run compiles for it, and fits it, without one (tests/moe/hopper.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

ROOT = Path(__file__).parents[2]
SHARED = 232_448
"""Bytes of shared memory that a block of an H100 can have."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    told = tmp_path_factory.mktemp("hopper") / "kernels.json"
    subprocess.run([sys.executable, "-m", "tests.moe.hopper", told], cwd=ROOT, check=True, capture_output=True)
    found: dict[str, dict[str, Any]] = json.loads(told.read_text())
    return found


def named(kernels: dict[str, dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [found for kernel, found in kernels.items() if kernel.split(":")[0] in names]


def test_kernels_compile_and_fit(kernels: dict[str, dict[str, Any]]) -> None:
    names = {kernel.split(":")[0] for kernel in kernels}
    assert {"up", "up_backward", "down", "down_in_parts", "_add_pairs", "_parts_of_gradient"} <= names
    assert {"_route", "_select", "_above", "_count", "_place_and_cut", "_group_few"} <= names
    assert {"attend", "project", "mix", "unembed"} <= names
    assert all(found["shared"] <= SHARED for found in kernels.values())


def test_steps_of_generation_keep_all_in_registers(kernels: dict[str, dict[str, Any]]) -> None:
    """The step once took four times as long with 24 experts as with 16: `down` kept its rows' experts in memory."""
    for found in named(kernels, "embed", "project", "attend", "mix", "up", "down", "down_in_parts", "unembed"):
        assert found["stack"] == 0, found
