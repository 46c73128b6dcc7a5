"""Exclusive lock on a results folder, which also removes the temporary files of killed processes; who holds it."""

import fcntl
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ssd_lit.support.files import naming

FIRST_MESSAGE, NEXT_MESSAGE = 10.0, 60.0
"""Seconds of waiting before the first message about the holder of the folder, and between later ones."""
_SETTINGS_AGE = 3600.0
"""Seconds after which a temporary settings file is taken for a killed process's."""


@contextmanager
def exclusive(folder: Path, stage: str) -> Iterator[None]:
    """Hold the lock of a folder for `stage`; waits while another process holds it.

    The system frees the lock of a process that has ended, however it ended. Removes the temporary files that it left.
    `folder`/.holder names the holder of the lock for processes that wait.
    """
    lock, holder = FileLock(folder / ".lock"), folder / ".holder"
    wait = FIRST_MESSAGE
    while True:
        try:
            lock.acquire(timeout=wait)
            break
        except Timeout:
            name = holder.read_text(encoding="utf-8").strip() if holder.exists() else ""
            print(f"{folder}: held by {name or 'another process'}; waiting for it to end", flush=True)
            wait = NEXT_MESSAGE
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        with naming(holder):
            holder.write_text(f"{stage}, process {os.getpid()} on {platform.node()}, since {since}\n", "utf-8")
        _remove_leftovers(folder)
        yield
    finally:
        holder.unlink(missing_ok=True)
        lock.release()


def holder_of(folder: Path) -> tuple[str, bool] | None:
    """Who last took the lock of a folder and whether it holds it still; None if it was given back, or never taken.

    A holder that does not hold it any more was killed. Writes nothing.
    """
    holder, lock = folder / ".holder", folder / ".lock"
    name = holder.read_text(encoding="utf-8").strip() if holder.exists() else ""
    try:
        descriptor = os.open(lock, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        # Shared, and let go at once: a process that wants the lock meanwhile asks again.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return name or "another process", True
    finally:
        os.close(descriptor)
    return (name, False) if name else None


def _remove_leftovers(folder: Path) -> None:
    """Remove temporary files and folders. All their writers hold the lock, except those of settings files."""
    for parent, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(parent) / name
            if not (name.startswith(".") and (name.endswith(".part") or name.startswith(".work."))):
                continue
            if ".yaml." in name and not _is_old(path):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        # The runs of an experiment have locks of their own.
        folders[:] = [name for name in folders if name != "runs" and (Path(parent) / name).exists()]


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime > _SETTINGS_AGE
    except FileNotFoundError:
        return False  # it was renamed to its final name
