"""Shipped experiments at a size for tests."""

from pathlib import Path
from typing import Any

import yaml

from tests.conftest import write_text_files

ROOT = Path(__file__).parents[1]

TINY: dict[str, Any] = {
    "seeds": [0],
    "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32},
    "moe": {"experts": 4, "top_k": 2, "calibration_blocks": 8, "router_hidden": 8, "router_steps": 20},
    "optim": {"lr": 1e-2, "warmup_steps": 3},
    "training": {
        "steps": 40, "batch_size": 4, "log_every": 3, "validate_every": 10, "validation_blocks": 6,
        "checkpoint_every": 10, "compile": False,
    },
    "switching": {
        "tau": 0.9, "check_every": 4, "sparse_fraction": 0.4, "warmup_min_steps": 4, "warmup_max_steps": 12,
        "sparse_steps": 16, "dense_min_steps": 2, "dense_max_steps": 4, "final_dense_steps": 8,
    },
    "evaluation": {"blocks": 8, "top_k_curve": [1, 2, 4]},
}  # fmt: skip


def tiny(shipped: str, folder: Path, **changes: Any) -> Path:
    """A shipped experiment laid over by a tiny size and `changes`, on a text of the test's own."""
    write_text_files(folder)
    data = {
        "name": "grammar", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
        "validation_fraction": 0.1, "test_fraction": 0.1, "sequence_length": 16,
        "tokenizer": {"vocab_size": 300, "mask_token": True, "sentinels": 4},
    }  # fmt: skip
    (folder / "size.yaml").write_text(yaml.safe_dump({**TINY, "data": data}), encoding="utf-8")
    path = folder / "experiment.yaml"
    bases = [str(ROOT / "configs" / f"{shipped}.yaml"), "size.yaml"]
    path.write_text(yaml.safe_dump({"experiment": "tiny", "base": bases, **changes}), encoding="utf-8")
    return path
