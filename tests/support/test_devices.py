"""Processes spread over the GPUs of a machine. (What a GPU is, is the driver's word; only that is put on here.)"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssd_lit.support.devices import count_gpus

TAKE = """
import os, sys, types
sys.modules["torch"] = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: {there}))
from ssd_lit.support.devices import reserve_gpus
reserve_gpus({count}); reserve_gpus({count})
print(os.environ.get("CUDA_VISIBLE_DEVICES", "all"), flush=True)
sys.stdin.read()
"""


class Taker:
    """A process that takes GPUs and keeps them until it is told to end."""

    def __init__(self, folder: Path, count: int = 1, there: int = 2, visible: str | None = None):
        environment = {**_without("CUDA_VISIBLE_DEVICES"), "TMPDIR": str(folder)} | (
            {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKE.format(count=count, there=there)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        self.sees = self._process.stdout.readline().strip()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def _without(name: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != name}


def test_runs_spread_evenly_and_take_the_place_of_one_that_ended(tmp_path: Path) -> None:
    takers = [Taker(tmp_path) for _ in range(4)]
    assert [taker.sees for taker in takers] == ["0", "1", "0", "1"]
    # One stays on the first GPU, in its last place.
    for taker in (*takers[:2], takers[3]):
        taker.end()
    assert takers[2].sees == "0"
    later = [Taker(tmp_path) for _ in range(3)]
    assert [taker.sees for taker in later] == ["1", "0", "1"]
    for taker in (takers[2], *later):
        taker.end()


@pytest.mark.parametrize(
    ("count", "there", "visible", "sees"),
    [
        (2, 4, None, {"0,1"}),
        (1, 1, None, {"all"}),
        (2, 2, None, {"all"}),
        (1, 2, "GPU-ab,GPU-cd", {"GPU-ab"}),
    ],
)
def test_a_run_sees_as_many_as_it_trains_on_of_those_that_it_may(
    tmp_path: Path, count: int, there: int, visible: str | None, sees: set[str]
) -> None:
    taker = Taker(tmp_path, count, there, visible)
    taker.end()
    assert {taker.sees} == sees


@pytest.mark.parametrize(
    ("chosen", "count"),
    [("0", 1), ("2,3, 5", 3), ("GPU-ab,MIG-cd/1", 2), ("", 0), ("-1", 0), ("NoDevFiles", 0), ("0,-1,1", 1), (None, 2)],
)
def test_gpus_are_counted_without_asking_the_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str | None, count: int
) -> None:
    for name in ("nvidia0", "nvidia12", "nvidiactl", "nvidia-uvm", "nvidia-caps", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert count_gpus(tmp_path) == count
