import os
import shutil
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from tests.slurm.cluster import SETUP


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """A Slurm of two nodes, for as long as the tests take."""
    if not shutil.which("slurmctld") or find_spec("snakemake_executor_plugin_slurm") is None or os.getuid():
        pytest.skip("Slurm or its plugin is not installed, or you are not root; `make test-slurm` installs and tests")
    subprocess.run([SETUP, "down"], check=True)  # of a session that was killed
    subprocess.run([SETUP, "up"], check=True)
    yield
    subprocess.run([SETUP, "down"], check=True)
