"""`ssd-lit` as the jobs of a workflow call it, in forks of one server that has imported the libraries.

Each job would import for five seconds what the one before it has imported. A script of the same name, first on the
PATH, hands its arguments, folder, environment and streams to the server and ends with the status of the fork. It passes
signals on, and a fork whose script is gone is killed. The rest is as in a process of its own.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

LIBRARIES = (
    "ssd_lit.training.fit", "ssd_lit.training.moefication", "ssd_lit.evaluation.evaluate", "ssd_lit.report.page",
    "ssd_lit.report.figures", "ssd_lit.data.documents", "mlflow.tracking",
)  # fmt: skip
LENGTH = 8
"""Bytes that hold the length of a request."""
SCRIPT = """#!{python} -IS
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({place!r})
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [len(request).to_bytes({length}, "big")], [0, 1, 2])
server.sendall(request)
process = int.from_bytes(server.recv(4), "big")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, _: os.kill(process, number))
status = server.recv(4)
sys.exit(int.from_bytes(status, "big") if status else 1)
"""


class Server:
    """A server, and a folder for the PATH whose `ssd-lit` asks it.

    It has the ssd_lit of that interpreter, in that environment.
    """

    def __init__(self, python: str | Path = sys.executable, environment: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = self._folder.name
        place = f"{self.path}/server"
        script = Path(self.path) / "ssd-lit"
        script.write_text(SCRIPT.format(python=sys.executable, place=place, length=LENGTH))
        script.chmod(0o755)
        self._process = subprocess.Popen(
            [python, "-m", "tests.preloaded", place], cwd=Path(__file__).parents[1], env=environment,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._folder.cleanup()


def serve(place: str) -> None:
    """Answer every script with a fork, until terminated."""
    for library in LIBRARIES:
        import_module(library)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    print("ready", flush=True)
    while True:
        script, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.setsid()
            answer(script)
            os._exit(0)
        script.close()


def answer(script: socket.socket) -> None:
    """Start the command of a script, and tell it the process and in the end the status."""
    header, streams, _, _ = socket.recv_fds(script, LENGTH, 3)
    length, request = int.from_bytes(header, "big"), b""
    while len(request) < length:
        request += script.recv(length - len(request))
    process = os.fork()
    if process == 0:
        script.close()
        run(*json.loads(request), streams=streams)
    script.sendall(process.to_bytes(4, "big"))
    ended = os.pidfd_open(process)
    readable, _, _ = select.select([ended, script], [], [])
    if ended not in readable:
        os.kill(process, signal.SIGKILL)  # the script is gone
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if ended in readable:
        script.sendall((status if status >= 0 else 128 - status).to_bytes(4, "big"))


def run(arguments: list[str], folder: str, environment: dict[str, str], streams: list[int]) -> None:
    """Be `ssd-lit` with these arguments; does not return."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate(("r", "w", "w")))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(Path(sys.executable).with_name("ssd-lit")), *arguments]
    sys.modules["__main__"].__spec__ = None

    from ssd_lit.cli import run as command

    command()


if __name__ == "__main__":
    serve(sys.argv[1])
