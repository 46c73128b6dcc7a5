"""A tiny experiment on text written here, shared by the tests that need a real run."""

import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import yaml

from ssd_lit.cli import main
from ssd_lit.config import RunConfig, load_experiment
from ssd_lit.paths import run_dir
from ssd_lit.records import PhaseRecord
from ssd_lit.run import Run
from ssd_lit.tracking.store import ensure_store

# Before any test imports MLflow: it reports its use to its makers by default.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
# Runs are compared bit for bit, which holds on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Before any test imports torch: tests run side by side, a process for each core, and threads that wait for a core that
# another test has would spin. Also in processes that tests start with threads of their own.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "passive"
# Before any test imports kernels: they are interpreted, which needs no GPU.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: side by side, what takes longest must not begin last."""
    items.sort(key=lambda item: item.get_closest_marker("whole_run") is None)


@cache
def sentences(documents: int) -> str:
    """Sentences of a small grammar: there is something to learn."""
    rng = np.random.default_rng(0)
    nouns, verbs = ["river", "senate", "actor", "harvest", "engine"], ["moves", "praises", "forgets", "carries"]
    text = [
        " ".join(f"the {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)} {n}." for _ in range(12))
        for n in range(documents)
    ]
    return "\n\n".join(text)


def write_text_files(folder: Path, documents: int = 400) -> None:
    (folder / "text.txt").write_text(sentences(documents), encoding="utf-8")


def tiny_experiment(folder: Path, **changes: Any) -> Path:
    """Write text and a config for it into the folder; `changes` replace whole sections."""
    write_text_files(folder)
    content = {
        "experiment": "tiny",
        "description": "A test.",
        "data": {
            "name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
            "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"vocab_size": 300}, "sequence_length": 16,
        },
        "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "dropout": 0.1},
        "moe": {"experts": 4, "top_k": 2},
        "optim": {"lr": 1e-2, "warmup_steps": 3},
        "training": {
            "steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
            "checkpoint_every": 4,
        },
        "switching": {
            "tau": 0.9, "check_every": 4, "sparse_fraction": 0.4, "warmup_min_steps": 4, "warmup_max_steps": 12,
            "sparse_steps": 8, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8,
        },
        "evaluation": {"blocks": 8, "top_k_curve": [1, 2, 4]},
    }  # fmt: skip
    arms = {
        "dense": {"method": "dense"}, "ssd": {"method": "ssd"}, "sparse": {"method": "sparse"},
        "posthoc": {"method": "posthoc", "parent_arm": "dense"},
    }  # fmt: skip
    # Sections lie in a base, for which not every arm need use all of them.
    shared = {**content, **{key: value for key, value in changes.items() if key != "arms"}}
    (folder / "size.yaml").write_text(yaml.safe_dump(shared), encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({"base": "size.yaml", "arms": changes.get("arms", arms)}), encoding="utf-8")
    return path


@cache
def empty_store() -> bytes:
    """An MLflow store as the stage `store` makes it: a hundred tables, which one copies sooner than one makes them."""
    with TemporaryDirectory() as folder:
        ensure_store(Path(folder))
        return (Path(folder) / "mlflow.db").read_bytes()


class Bench:
    """An experiment with its data prepared, driven stage by stage as a person would."""

    def __init__(self, folder: Path, *, config: Path | None = None, **changes: Any):
        self.results = folder / "results"
        config = config or tiny_experiment(folder, **changes)
        self.stage("configs", config, "--results", self.results)
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            (self.results / "mlflow.db").write_bytes(empty_store())
        self.data = next((self.results / "data").iterdir())
        for stage in ("prepare", "tokenizer", "encode"):
            self.stage(stage, self.data)
        self.runs: dict[str, RunConfig] = {run.arm: run for run in load_experiment(config).runs()}

    def stage(self, *arguments: object) -> None:
        # One thread: what is compared bit for bit must not depend on the number of cores.
        assert main([*map(str, arguments), *([] if arguments[0] == "ui" else ["--threads", "1"])]) == 0

    def dir(self, arm: str) -> Path:
        return run_dir(self.results, self.runs[arm])

    def open(self, arm: str) -> Run:
        return Run.open(self.dir(arm))

    def phases(self, arm: str, until: str | None = None) -> list[PhaseRecord]:
        """Train an arm to the end of a stage, of its last training stage by default; the phases on record then."""
        run = self.open(arm)
        self.stage("train", run.folder, "--until", until or run.training_stages[-1])
        return run.phases()

    def checkpoint(self, arm: str, stage: str | None = None) -> Path:
        """The checkpoint of a training stage, of the last by default; trains what is missing."""
        self.phases(arm, stage)
        run = self.open(arm)
        return run.checkpoint(stage or run.training_stages[-1])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)
