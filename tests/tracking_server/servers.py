"""A tracking server as a group would run it, on 127.0.0.1: MLflow with accounts, on PostgreSQL and an S3 store.

The S3 store is moto's, in this process: it speaks S3's protocol, needs no account, and keeps its objects in memory
while it does not listen. PostgreSQL and MLflow are processes of their own.
"""

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

if TYPE_CHECKING:
    import psycopg2

ADMIN, DATABASE_PASSWORD, BUCKET = ("admin", "an-admin-password"), "a-database-password", "artifacts"
DENIED, TIMEOUT = "NO_PERMISSIONS", 120.0
S3_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_DEFAULT_REGION": "us-east-1"}


def missing() -> str | None:
    """What these servers need and this machine lacks; None if nothing."""
    lacking = [name for name in ("psycopg2", "boto3", "moto", "flask_wtf") if importlib.util.find_spec(name) is None]
    if postgres_program("initdb") is None:
        lacking.append("PostgreSQL")
    return ", ".join(lacking) or None


def postgres_program(name: str) -> Path | None:
    """The newest of PostgreSQL's programs of that name; Debian keeps them outside PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    elsewhere = shutil.which(name)
    return found[-1] if found else Path(elsewhere) if elsewhere else None


class Postgres:
    """A PostgreSQL server with a user `mlflow`, in a folder of its own."""

    def __init__(self) -> None:
        # Not pytest's folder, into which only its owner may look: root must start it as somebody else.
        self._folder = Path(tempfile.mkdtemp(prefix="ssd-postgres-"))
        self._user = "postgres" if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()
        if self._user:
            shutil.chown(self._folder, self._user, self._user)
        password = self._folder / "password"
        password.write_text(DATABASE_PASSWORD)
        data = str(self._folder / "data")
        self._run("initdb", "-D", data, "-U", "mlflow", "-A", "scram-sha-256", "--pwfile", str(password), "-E", "UTF8")

    def start(self) -> None:
        program = postgres_program("postgres")
        assert program is not None
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [program, "-D", self._folder / "data", "-p", str(self.port), "-h", "127.0.0.1", "-k", self._folder],
                user=self._user, cwd=self._folder, stdout=log, stderr=log,
            )  # fmt: skip
        wait_until(self._answers, self._process, self._folder / "log")

    def stop(self, number: int = signal.SIGINT) -> None:
        """SIGINT ends it in order; SIGQUIT at once, as a crash does."""
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(TIMEOUT)

    def remove(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop(signal.SIGQUIT)
        shutil.rmtree(self._folder, ignore_errors=True)

    def uri(self, database: str) -> str:
        return f"postgresql+psycopg2://mlflow:{DATABASE_PASSWORD}@127.0.0.1:{self.port}/{database}"

    def dump(self, database: str) -> str:
        """All that a database holds, as SQL."""
        return self._run("pg_dump", "-h", "127.0.0.1", "-p", str(self.port), "-U", "mlflow", database)

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Execute a statement; returns the rows of a query."""
        connection = self._connect(database)
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            rows = cursor.fetchall() if cursor.description else []
        connection.close()
        return rows

    def _connect(self, database: str) -> "psycopg2.extensions.connection":
        import psycopg2

        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user="mlflow", password=DATABASE_PASSWORD, dbname=database
        )

    def _answers(self) -> bool:
        import psycopg2

        try:
            self._connect("postgres").close()
        except psycopg2.OperationalError:
            return False
        return True

    def _run(self, name: str, *arguments: str) -> str:
        program = postgres_program(name)
        assert program is not None
        done = subprocess.run(
            [program, *arguments], user=self._user, cwd=self._folder, capture_output=True, text=True, check=False,
            env={**os.environ, "PGPASSWORD": DATABASE_PASSWORD},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout


class ObjectStore:
    """An S3 store with one bucket."""

    def __init__(self) -> None:
        self.port = free_port()
        self.start()
        self.client.create_bucket(Bucket=BUCKET)

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs that reads and writes there."""
        return {"MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", **S3_KEYS}

    @property
    def client(self) -> Any:
        import boto3

        return boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{self.port}", region_name=S3_KEYS["AWS_DEFAULT_REGION"],
            aws_access_key_id=S3_KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=S3_KEYS["AWS_SECRET_ACCESS_KEY"],
        )  # fmt: skip

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """Refuse connections; what is stored stays."""
        self._server.stop()
        assert self._server._server is not None
        self._server._server.server_close()

    def names(self) -> list[str]:
        """The names of all objects."""
        return [item["Key"] for item in self.client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]

    def read(self, key: str) -> bytes:
        content: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return content


class MlflowServer:
    """`mlflow server --app-name basic-auth`; its artifacts go through it, or with `direct` from its clients to S3."""

    def __init__(self, folder: Path, postgres: Postgres, objects: ObjectStore, name: str, *, direct: bool = False):
        for database in (name, f"{name}_users"):
            postgres.execute(f"CREATE DATABASE {database}")
        folder.mkdir()
        accounts = folder / "auth.ini"
        accounts.write_text(
            f"[mlflow]\ndefault_permission = {DENIED}\ndatabase_uri = {postgres.uri(f'{name}_users')}\n"
            f"admin_username = {ADMIN[0]}\nauth_cache_ttl_seconds = 60\n"
        )
        place = f"s3://{BUCKET}/{name}"
        artifacts = (
            ["--default-artifact-root", place, "--no-serve-artifacts"] if direct else ["--artifacts-destination", place]
        )
        self.port = free_port()
        self.database = name
        self._log = folder / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [
            sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth", "--host", "127.0.0.1",
            "--port", str(self.port), "--workers", "2", *artifacts,
        ]  # fmt: skip
        self._environment = {
            **os.environ, **objects.environment, "MLFLOW_BACKEND_STORE_URI": postgres.uri(name),
            "MLFLOW_AUTH_CONFIG_PATH": str(accounts), "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }  # fmt: skip
        for client_only in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            self._environment.pop(client_only, None)

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._environment, cwd=self._log.parent, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        wait_until(self._answers, self._process, self._log)

    def kill(self) -> None:
        """All its processes at once, as when its machine goes down."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(TIMEOUT)

    def remove(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def add_user(self, name: str, password: str) -> None:
        self._as_admin("users/create", {"username": name, "password": password})

    def grant(self, name: str, experiment_id: str, permission: str) -> None:
        self._as_admin(
            "users/permissions/grant",
            {"username": name, "resource_type": "experiment", "resource_id": experiment_id, "permission": permission},
            version="3.0",
        )

    def _as_admin(self, endpoint: str, content: Mapping[str, str], version: str = "2.0") -> None:
        import requests

        answer = requests.post(
            f"{self.uri}/api/{version}/mlflow/{endpoint}", json=dict(content), auth=ADMIN, timeout=TIMEOUT
        )
        assert answer.ok, answer.text

    def _answers(self) -> bool:
        try:
            with urlopen(f"{self.uri}/health", timeout=TIMEOUT) as answer:
                return bool(answer.status == 200)
        except (URLError, ConnectionError):
            return False


class Servers:
    """PostgreSQL, the S3 store, and as many MLflow servers on them as are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mlflow: list[MlflowServer] = []
        self.objects = ObjectStore()
        self.postgres = Postgres()

    def mlflow(self, name: str, *, direct: bool = False) -> MlflowServer:
        """A started MLflow server with databases of its own."""
        server = MlflowServer(self._folder / name, self.postgres, self.objects, name, direct=direct)
        self._mlflow.append(server)
        server.start()
        return server

    def remove(self) -> None:
        for server in self._mlflow:
            server.remove()
        self.objects.stop()
        self.postgres.remove()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until(answers: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not answers():
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)
