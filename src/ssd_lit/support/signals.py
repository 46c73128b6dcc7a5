"""The signals by which a scheduler or a person asks a stage to end: SIGTERM, SIGUSR1, and SIGINT, which is Ctrl-C."""

import os
import signal
import threading
from types import FrameType

STATUS = 75
"""Exit status of a stage that was stopped: EX_TEMPFAIL, "try again". No other end has it."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_IMPORT_SECONDS = 0.05
"""After so long a signal that came during an import is sent again."""


class Preempted(BaseException):
    """The stage ends because it was asked to. Not an Exception: nobody on the way may take it for an error."""


class _Request:
    """What was asked, and whether to obey at once."""

    signal: str | None = None
    deferred: bool = False


_request = _Request()


def raise_on_signal() -> None:
    """From now on the first such signal raises `Preempted` where the process stands; any more change nothing.

    One that comes while a module is imported waits until it is. Raises `Preempted` at once if a signal came while they
    were deferred.
    """
    _request.deferred = False
    _listen()
    if _request.signal is not None:
        raise Preempted(_request.signal)


def defer() -> None:
    """From now on such a signal is kept for those who ask `pending()`, and end where nothing is half done."""
    _request.deferred = True
    _listen()


def ignore(_: int) -> None:
    """For processes that read data (the argument is their number): the stage that they read for ends them."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def pending() -> str | None:
    """The name of the signal that asked this process to end, if one did."""
    return _request.signal


def _listen() -> None:
    for number in _SIGNALS:
        signal.signal(number, _hear)


def _hear(number: int, frame: FrameType | None) -> None:
    if _request.signal is not None:
        return
    if not _request.deferred and _is_importing(frame):
        # An extension module that is left half way through its import can bring the interpreter down.
        again = threading.Timer(_IMPORT_SECONDS, os.kill, (os.getpid(), number))
        again.daemon = True
        again.start()
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
