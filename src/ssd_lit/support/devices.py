"""Which of a machine's GPUs a process takes: the one that the fewest others have taken."""

import os
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

_VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[FileLock] = []
"""What this process holds until it ends, however it ends."""


def reserve_gpus(count: int = 1) -> None:
    """Let this process and its children see `count` GPUs only, for good; a second call changes nothing.

    Every process of this user that calls it holds a place on each GPU it takes, and takes those on which the fewest
    places are held: four runs on two GPUs are two and two, whoever starts them. Of GPUs that a scheduler has chosen,
    only those are taken. Must come before anything else asks for a GPU. Leaves a machine with no more than `count`
    GPUs as it is.
    """
    # Imported late, as by all stages; asks the driver's library, and begins nothing on a GPU.
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
    """The places on a GPU: how many are held, and the first that is not."""

    held: int
    first: FileLock


def _free_places(gpu: Path) -> _Places:
    gpu.mkdir(exist_ok=True)
    known = [FileLock(path) for path in sorted(gpu.iterdir())]
    free = [lock for lock in known if _is_free(lock)]
    return _Places(len(known) - len(free), free[0] if free else FileLock(gpu / f"{len(known):04d}"))


def _is_free(lock: FileLock) -> bool:
    try:
        with lock.acquire(blocking=False):
            return True
    except Timeout:
        return False
