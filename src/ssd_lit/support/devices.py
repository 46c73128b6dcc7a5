"""The GPUs of this machine: their number, and those with the fewest processes, reserved for one more."""

import os
import re
import tempfile
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_GPU = re.compile(r"\d+|(GPU|MIG)-.+")
_DEVICE_FILE = re.compile(r"nvidia\d+")
_held: list[FileLock] = []
"""The locks that this process holds until it ends, however it ends."""


def count_gpus(device_files: Path = Path("/dev")) -> int:
    """The number of GPUs that this process may use: those in CUDA_VISIBLE_DEVICES, or else those with a device file.

    Asks neither torch, whose import takes seconds, nor the driver.
    """
    chosen = os.environ.get(_VISIBLE)
    if chosen is None:
        return sum(_DEVICE_FILE.fullmatch(path.name) is not None for path in device_files.iterdir())
    # As CUDA reads it: up to the first entry that is none, such as -1 or nothing.
    return len([*takewhile(_GPU.fullmatch, (entry.strip() for entry in chosen.split(",")))])


def reserve_gpus(count: int = 1) -> None:
    """Restrict this process and its children to `count` GPUs, until it ends; a second call changes nothing.

    Takes the GPUs on which the fewest processes of this user hold a place, and holds a place on each: four runs on two
    GPUs are two on each, whoever starts them. Stays within the GPUs that a scheduler has chosen. Must be called before
    any GPU is used. Has no effect on a machine with at most `count` GPUs.
    """
    # Imported late, because it takes seconds. The count comes from the driver's library and initialises no GPU.
    import torch

    if _held or torch.cuda.device_count() <= count:
        return
    chosen = os.environ.get(_VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    places = Path(tempfile.gettempdir()) / f"ssd_lit-gpus-{os.getuid()}"
    places.mkdir(mode=0o700, exist_ok=True)
    with FileLock(places / "choosing"):
        free = {gpu: _free_places(places / gpu.strip().replace("/", "_")) for gpu in chosen.split(",")}
        taken = sorted(free, key=lambda gpu: free[gpu].held)[:count]
        for gpu in taken:
            free[gpu].first.acquire()
            _held.append(free[gpu].first)
    os.environ[_VISIBLE] = ",".join(taken)


class _Places(NamedTuple):
    """The number of places held on a GPU, and its first free place."""

    held: int
    first: FileLock


def _free_places(gpu: Path) -> _Places:
    gpu.mkdir(exist_ok=True)
    places = [FileLock(path) for path in sorted(gpu.iterdir())]
    free = [lock for lock in places if _is_free(lock)]
    return _Places(len(places) - len(free), free[0] if free else FileLock(gpu / f"{len(places):04d}"))


def _is_free(lock: FileLock) -> bool:
    try:
        with lock.acquire(blocking=False):
            return True
    except Timeout:
        return False
