"""The servers, up once for all tests of this folder, and what a person sets who uses them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import ssd_lit.tracking.client
from tests.conftest import Bench
from tests.forked import Forked
from tests.tracking_server.servers import S3_KEYS, MlflowServer, Servers, missing

PASSWORDS = {"ann": "the-password-of-ann", "bob": "the-password-of-bob"}


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    lacking = missing()
    if lacking:
        pytest.skip(f"no {lacking}: `make test-server` installs what is needed and runs these tests")
    servers = Servers(tmp_path_factory.mktemp("servers"))
    try:
        servers.postgres.start()
        yield servers
    finally:
        servers.remove()


@pytest.fixture(scope="session")
def server(servers: Servers) -> MlflowServer:
    """A server whose clients need no access to S3."""
    return _with_users(servers.mlflow("shared"))


@pytest.fixture(scope="session")
def direct_server(servers: Servers) -> MlflowServer:
    """A server whose clients write artifacts to S3 themselves."""
    return _with_users(servers.mlflow("direct", direct=True))


def _with_users(server: MlflowServer) -> MlflowServer:
    for name, password in PASSWORDS.items():
        server.add_user(name, password)
    return server


@dataclass
class Person:
    """Somebody with an account; sets the environment of this process and of processes that it starts."""

    patch: pytest.MonkeyPatch

    def uses(self, server: MlflowServer, name: str = "ann", password: str | None = None) -> None:
        self.environment = {
            "MLFLOW_TRACKING_URI": server.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": PASSWORDS[name] if password is None else password,
        }
        self._set()

    def uses_uri(self, uri: str) -> None:
        """A URI that holds user and password."""
        self.environment = {"MLFLOW_TRACKING_URI": uri}
        self._set()

    def train(self, run: Path, *options: str) -> Forked:
        """`ssd-lit train`, in a process of its own, which sends often: few seconds are all that a test has."""
        return Forked("train", run, "--threads", "1", *options, before=partial(_begin, self.environment))

    def _set(self) -> None:
        for name in CLIENT:
            self.patch.delenv(name, raising=False)
        for name, value in self.environment.items():
            self.patch.setenv(name, value)


CLIENT = (
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_S3_ENDPOINT_URL", *S3_KEYS,
)  # fmt: skip


def _begin(environment: dict[str, str]) -> None:
    for name in CLIENT:
        os.environ.pop(name, None)
    os.environ.update(environment)
    ssd_lit.tracking.client.SEND_SECONDS = 0.2


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Person:
    monkeypatch.setenv("HOME", str(tmp_path))  # where MLflow looks for passwords, and boto3 for keys
    return Person(monkeypatch)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """An ssd run of a thousand steps, in an experiment of its own; its name is that of the folder."""
    training = {"steps": 1000, "batch_size": 4, "log_every": 3, "validate_every": 50, "validation_blocks": 6,
                "checkpoint_every": 20}  # fmt: skip
    name = "e" + os.urandom(6).hex()
    return Bench(tmp_path, experiment=name, training=training, arms={"ssd": {"method": "ssd"}})
