"""Which of a machine's GPUs a process takes: the one that the fewest others have taken."""

import itertools
import os
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

_VISIBLE = "CUDA_VISIBLE_DEVICES"

_held: list[FileLock] = []
"""What this process holds until it ends, however it ends."""


def take_gpus(count: int = 1) -> None:
    """Let this process and its children see `count` GPUs only, for good; a second call changes nothing.

    Every process of this user that calls it holds a place on each GPU it takes. Places are filled evenly, so four
    runs on two GPUs are two and two, whoever starts them. Of GPUs that a scheduler has chosen, only those are taken.
    Must come before anything else asks for a GPU. Leaves a machine with no more than `count` GPUs as it is.
    """
    # Imported late, as by all stages; asks the driver's library, and begins nothing on a GPU.
    import torch

    if _held or torch.cuda.device_count() <= count:
        return
    chosen = os.environ.get(_VISIBLE) or ",".join(map(str, range(torch.cuda.device_count())))
    places = Path(tempfile.gettempdir()) / f"ssd_lit-gpus-{os.getuid()}"
    places.mkdir(mode=0o700, exist_ok=True)
    taken: list[str] = []
    for row in itertools.count():
        for gpu in chosen.split(","):
            if len(taken) < count and gpu not in taken and _hold(places / f"{gpu.strip().replace('/', '_')}-{row}"):
                taken.append(gpu)
        if len(taken) == count:
            os.environ[_VISIBLE] = ",".join(taken)
            return


def _hold(place: Path) -> bool:
    lock = FileLock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return False
    _held.append(lock)
    return True
