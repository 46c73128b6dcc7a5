"""Handling of the signals that stop a stage: SIGTERM, SIGUSR1 and SIGINT (Ctrl-C)."""

import os
import signal
import threading
from types import FrameType

STATUS = 75
"""Exit status of a stage that was stopped, and of no other: EX_TEMPFAIL, "try again"."""
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_IMPORT_SECONDS = 0.05
"""Delay after which a signal that came during an import is sent again."""


class Preempted(BaseException):
    """The stage was stopped by a signal. Not an Exception, so that no handler of errors catches it."""


class _Request:
    """The signal that came, if any, and whether the reaction to it is deferred."""

    signal: str | None = None
    deferred: bool = False


_request = _Request()


def raise_on_signal() -> None:
    """From now on the first signal raises `Preempted` at once; later ones have no effect.

    During the import of a module it raises after the import. Raises `Preempted` immediately if a signal came while
    signals were deferred.
    """
    _request.deferred = False
    _install_handlers()
    if _request.signal is not None:
        raise Preempted(_request.signal)


def defer() -> None:
    """From now on a signal is only recorded, for `pending()`, so that the caller can stop at a safe point."""
    _request.deferred = True
    _install_handlers()


def ignore(_: int) -> None:
    """Ignore the signals in a data worker, which its stage ends; the argument is the worker's index."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def pending() -> str | None:
    """The name of the signal that came, if any."""
    return _request.signal


def _install_handlers() -> None:
    for number in _SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if _request.signal is not None:
        return
    if not _request.deferred and _is_importing(frame):
        # Interrupting the import of an extension module can crash the interpreter.
        timer = threading.Timer(_IMPORT_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
        return
    _request.signal = signal.Signals(number).name
    if not _request.deferred:
        raise Preempted(_request.signal)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
