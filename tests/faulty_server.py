"""A real MLflow server that can be slow, answer 500, or carry a request out and break the connection.

As a program: python tests/faulty_server.py FOLDER PORT FAULT serves a store in FOLDER until it is killed.
"""

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from werkzeug.serving import BaseWSGIServer, WSGIRequestHandler, make_server


class FaultyServer:
    """MLflow's own application over a sqlite store, on 127.0.0.1.

    `fault` is None, "500", "slow" (answers after `seconds`) or "lost" (half of the answers to requests that change
    something do not arrive); it may be changed at any time. One a process: the application keeps its store.
    """

    def __init__(self, folder: Path, port: int = 0, seconds: float = 10.0):
        os.environ["_MLFLOW_SERVER_FILE_STORE"] = f"sqlite:///{folder / 'mlflow.db'}"
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = str(folder / "artifacts")
        from mlflow.server import app

        self._app = app
        self._server: BaseWSGIServer | None = None
        self._random = random.Random(0)
        self.port = port
        self.seconds = seconds
        self.fault: str | None = None
        self.requests = 0

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen, on the same port as before if there was one."""
        self._server = make_server("127.0.0.1", self.port, self._answer, threaded=True, request_handler=_Silent)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.requests += 1
        if self.fault == "500":
            start("500 INTERNAL SERVER ERROR", [("Content-Type", "text/plain")])
            return [b"out of order"]
        if self.fault == "slow":
            time.sleep(self.seconds)
        answer: Iterable[bytes] = self._app.wsgi_app(environ, start)
        changing = environ["REQUEST_METHOD"] == "POST" and "search" not in environ["PATH_INFO"]
        if self.fault == "lost" and changing and self._random.random() < 0.5:
            list(answer)
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer


class _Silent(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Requests are not told, nor that an answer could not be sent."""


if __name__ == "__main__":
    server = FaultyServer(Path(sys.argv[1]), int(sys.argv[2]))
    server.fault = None if sys.argv[3] == "healthy" else sys.argv[3]
    server.start()
    print("ready", flush=True)
    threading.Event().wait()
