"""`ssd-lit` in a process of its own that need not import for seven seconds what a server, of which it is a fork, has.

The rest is as in a process that a shell starts: its own session, its own signals, its own end.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ssd_lit import cli

PROGRAM = str(Path(sys.executable).with_name("ssd-lit"))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ssd_lit.training.fit", "ssd_lit.training.moefication", "mlflow.tracking"])


class Forked:
    """A process that runs a command; the methods that tests need of `subprocess.Popen`.

    `before` is called in the process first: a function at the top of a module, to be found there by its name.
    """

    def __init__(self, *arguments: object, before: Callable[[], None] | None = None):
        self._folder = tempfile.TemporaryDirectory()
        self._stderr = Path(self._folder.name) / "stderr"
        self._process = SERVER.Process(target=_run, args=([*map(str, arguments)], self._stderr, before))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120) -> int:
        self._process.join(timeout)
        assert self._process.exitcode is not None, f"still there after {timeout} s"
        return self._process.exitcode

    def communicate(self, timeout: float = 120) -> tuple[None, str]:
        """Wait for the end; what it said on stderr."""
        self.wait(timeout)
        return None, self._stderr.read_text(encoding="utf-8")


def run_forked(*arguments: object) -> None:
    """Run a command to its end, which must be a good one."""
    process = Forked(*arguments)
    _, told = process.communicate()
    assert process.returncode == 0, told[-4000:]


def _run(arguments: list[str], stderr: Path, before: Callable[[], None] | None) -> None:
    os.setsid()
    # Not the server's way, but the system's own, for processes that this one starts.
    multiprocessing.set_start_method(None, force=True)
    with stderr.open("wb") as told, Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), sys.stdout.fileno())
        os.dup2(told.fileno(), sys.stderr.fileno())
    if before is not None:
        before()
    # Of a program, by whose name Lightning starts the others of a training.
    sys.argv = [PROGRAM, *arguments]
    sys.modules["__main__"].__spec__ = None
    cli.run()
