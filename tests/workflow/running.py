"""Snakemake and `ssd-lit run` as a person calls them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def command(experiment: str | Path, results: Path, *arguments: str) -> list[str]:
    # Before `--config`, which takes all that follows it.
    return [
        sys.executable, "-m", "snakemake", "--cores", "2", *arguments,
        "--config", f"experiment={experiment}", f"results={results}",
    ]  # fmt: skip


def snakemake(experiment: str | Path, results: Path, *arguments: str) -> str:
    done = subprocess.run(
        command(experiment, results, *arguments), cwd=ROOT, env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def start(experiment: Path, results: Path, *arguments: str) -> "subprocess.Popen[str]":
    """Begin `ssd-lit run`."""
    # Kernels that need a GPU shall not run here in an interpreter instead.
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "ssd_lit", "run", str(experiment), "--results", str(results), "--jobs", "2", *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def run(experiment: Path, results: Path, *arguments: str) -> tuple[int, str]:
    """`ssd-lit run` to its end: its status and what it said."""
    process = start(experiment, results, *arguments)
    told, _ = process.communicate(timeout=900)
    return process.returncode, told
