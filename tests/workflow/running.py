"""Snakemake as a person calls it, and shipped experiments at a size for tests."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_text_files

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

TINY: dict[str, Any] = {
    "seeds": [0],
    "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32},
    "moe": {"experts": 4, "top_k": 2, "calibration_blocks": 8, "router_hidden": 8, "router_steps": 20},
    "optim": {"lr": 1e-2, "warmup_steps": 3},
    "training": {
        "steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
        "checkpoint_every": 10,
    },
    "switching": {
        "tau": 0.9, "check_every": 4, "sparse_share": 0.4, "warmup_min_steps": 4, "warmup_max_steps": 12,
        "sparse_steps": 16, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8,
    },
    "evaluation": {"blocks": 8, "top_k_curve": [1, 2, 4]},
}  # fmt: skip


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


def tiny(shipped: str, folder: Path, **changes: Any) -> Path:
    """A shipped experiment laid over by a tiny size and `changes`, on a text of the test's own."""
    write_text_files(folder)
    data = {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
        "validation_share": 0.1, "test_share": 0.1, "sequence_length": 16,
        "tokenizer": {"vocab_size": 300, "mask_token": True, "sentinels": 4},
    }  # fmt: skip
    (folder / "size.yaml").write_text(yaml.safe_dump({**TINY, "data": data}), encoding="utf-8")
    path = folder / "experiment.yaml"
    bases = [str(ROOT / "configs" / f"{shipped}.yaml"), "size.yaml"]
    path.write_text(yaml.safe_dump({"experiment": "tiny", "base": bases, **changes}), encoding="utf-8")
    return path
