"""Snakemake as a person calls it."""

import atexit
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from tests.preloaded import Server

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(experiment: str | Path, results: Path, *arguments: str, jobs: str = "stages") -> list[str]:
    # Before `--config`, which takes all that follows it.
    return [
        sys.executable, "-m", "snakemake", "--cores", "2", *arguments,
        "--config", f"experiment={experiment}", f"results={results}", f"jobs={jobs}",
    ]  # fmt: skip


@cache
def prepared() -> dict[str, str]:
    """ENVIRONMENT, but with an `ssd-lit` whose libraries are there already (`tests.preloaded`)."""
    server = Server()
    atexit.register(server.close)
    return {**ENVIRONMENT, "PATH": f"{server.path}{os.pathsep}{ENVIRONMENT['PATH']}"}


def snakemake(experiment: str | Path, results: Path, *arguments: str, jobs: str = "stages") -> str:
    done = subprocess.run(
        command(experiment, results, *arguments, jobs=jobs), cwd=ROOT, env=prepared(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
