"""Where results come from: code, packages and machine; for a stage of a run seed, threads and data too."""

import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

PACKAGES = (
    "torch", "lightning", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "scikit-learn",
    "pyarrow", "snakemake", "mlflow",
)  # fmt: skip


def git_commit(folder: Path = Path(__file__).parent) -> str:
    """The commit of the code, with `-dirty` if files differ from it; `unknown` outside a repository."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=folder, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told.stdout.strip()


def provenance() -> dict[str, object]:
    """Commit, versions, machine and time of writing."""
    return {
        "commit": git_commit(),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            "cores": psutil.cpu_count(),
            "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
            "processor": processor(),
        },
    }


def stage_provenance(seed: int, tokens: str) -> dict[str, object]:
    """The provenance of a stage of a run with that seed, which works on data with the digest `tokens`.

    `host` and `devices` tell, with the times of `timed`, which runs shared a device: a digest of the host's name, and
    "cpu" or the unique ids of the GPUs.
    """
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        **provenance(),
        "gpus": [gpu.name for gpu in gpus],
        "host": hashlib.sha256(platform.node().encode()).hexdigest()[:16],
        "devices": [str(gpu.uuid) for gpu in gpus] or ["cpu"],
        "threads": torch.get_num_threads(),
        "seed": seed,
        "tokens": tokens,
    }


def timed(provenance: Mapping[str, object], began: float | None) -> dict[str, object]:
    """The provenance of work that ends now, with its start and end in UNIX seconds.

    None for a start says that part of the work was done earlier, by a process that was interrupted.
    """
    return {**provenance, "began": began, "ended": time.time()}


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _version(package: str) -> str | None:
    """None where it is not installed: `ssd-lit train` does without Snakemake."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
