"""One process at a time writes into a folder of results, and clears away what killed ones left there."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ssd_lit.support.files import naming

FIRST_WORD, NEXT_WORD = 10.0, 60.0
"""Seconds of waiting before a newcomer says who holds the folder, and before it says so again."""

_SETTINGS_AGE = 3600.0
"""Seconds after which a part of a settings file has surely lost its writer."""


@contextmanager
def exclusive(folder: Path, stage: str) -> Iterator[None]:
    """Hold the folder for `stage` against every other process that would write there; waits for one that does.

    A killed workflow may have left a stage at work. The system frees the lock of a process that has ended, however it
    ended. What was half written then is removed; `folder`/.holder says who holds the lock, for those who wait.
    """
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    wait = FIRST_WORD
    while True:
        try:
            lock.acquire(timeout=wait)
            break
        except Timeout:
            who = holder.read_text(encoding="utf-8").strip() if holder.exists() else ""
            print(f"{folder}: held by {who or 'another process'}; waiting for it to end", flush=True)
            wait = NEXT_WORD
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with naming(holder):
            holder.write_text(f"{stage}, process {os.getpid()} on {platform.node()}, since {since}\n", "utf-8")
        _remove_leftovers(folder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def _remove_leftovers(folder: Path) -> None:
    """Remove what was being written when its writer died: all writers hold the lock, but those of settings files."""
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(place) / name
            if not (name.startswith(".") and (name.endswith(".part") or name.startswith(".work."))):
                continue
            if ".yaml." in name and not _is_old(path):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        # The runs of an experiment have locks of their own.
        folders[:] = [name for name in folders if name != "runs" and (Path(place) / name).exists()]


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _SETTINGS_AGE
    except FileNotFoundError:
        return False  # it has become what it was to be
