"""Whether the same training gives the same bits twice on a GPU, and what torch's deterministic algorithms cost.

    python benchmarks/repeatable.py [--shape small] [--rounds 5]

SSD with fixed switches (dense, sparse, dense, in bf16 and compiled) is trained twice on random tokens by the real
trainer, with the algorithms that torch likes best and with deterministic ones; the tensors of the checkpoints of all
stages and of all phases, which are kept, are compared bit for bit. Then whole training steps of the shape, dense and
sparse, with and without, in turns.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpt2 import DEVICE, SHAPES, build, random_batch, stepper
from machine import RESULTS, machine, seconds_in_turns
from throughput import write_run
from torch import Tensor

from ssd_lit.config import MoEConfig, RunConfig
from ssd_lit.paths import checkpoint_path, phase_dir
from ssd_lit.support.files import write_json
from ssd_lit.training import fit
from ssd_lit.training.checkpoint import read_checkpoint

RESULT = RESULTS / "repeatable.json"
MOE = MoEConfig(experts=32, top_k=8)
POINTS, STEPS = [30, 60], 90
TIMED = 10
WAYS = {"fastest": False, "deterministic": True}
TRAINED = "30m" if DEVICE.type == "cuda" else "tiny"


def main() -> int:
    # Read when the GPU is first used; torch asks for it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default=TRAINED, choices=SHAPES, help="of the steps that are timed")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"machine": machine("transformers", "lightning"), "trained": TRAINED, "bits": {}}
    with tempfile.TemporaryDirectory() as name:
        for way, deterministic in WAYS.items():
            use(deterministic)
            first, second = (train(Path(name) / f"{way}-{number}") for number in range(2))
            found["bits"][way] = {place: list(different(path, second[place])) for place, path in first.items()}
            for place, tensors in found["bits"][way].items():
                verdict = f"{len(tensors)} tensors differ, first {tensors[0]}" if tensors else "the same bits"
                print(f"{way:<15}{place:<15}{verdict}", flush=True)
    found["steps"] = cost(arguments.shape, arguments.rounds)
    write_json(RESULT, found)
    return int(any(found["bits"]["deterministic"].values()))


def use(deterministic: bool) -> None:
    """Choose torch's algorithms for what follows; what was compiled is compiled anew."""
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(deterministic)
    # Only what is read before it was written needs filling, and nothing of ours is.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def train(results: Path) -> dict[str, Path]:
    """Train all phases; returns the checkpoints of the stages and of the phases, by name."""
    shape, began = SHAPES[TRAINED], time.perf_counter()
    config = RunConfig.model_validate(
        {
            "experiment": "repeatable", "arm": "ssd", "method": "ssd", "label": "SSD", "seed": 0,
            "data": {
                "name": "random", "sources": [{"kind": "files", "paths": ["random.txt"]}],
                "sequence_length": shape.sequence,
            },
            "model": shape.model().model_dump(),
            "moe": MOE.model_dump(),
            "training": {
                "steps": STEPS, "batch_size": shape.batch, "compile": True, "validate_every": 45,
                "precision": "bf16" if DEVICE.type == "cuda" else "fp32", "keep_phases": True,
            },
            "switching": {"switch_points": POINTS},
        }
    )  # fmt: skip
    run = write_run(results, config, shape)
    fit.train(run, run.training_stages[-1], recorder=None, provenance={})
    print(f"trained: {time.perf_counter() - began:.1f} s, {reserved():.1f} GiB reserved", flush=True)
    stages = {stage: checkpoint_path(run.folder, stage) for stage in run.training_stages}
    phases = {one.name: phase_dir(run.folder, one.index, one.mode) / "weights.ckpt" for one in run.chain()}
    return stages | phases


def reserved() -> float:
    """GPU memory that the process keeps after a run."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
    return torch.cuda.memory_reserved() / 2**30 if DEVICE.type == "cuda" else 0.0


def different(first: Path, second: Path) -> Iterator[str]:
    """Names of the tensors that two checkpoints do not have in common."""
    a, b = (dict(tensors(read_checkpoint(path))) for path in (first, second))
    yield from (name for name in a if name not in b or not torch.equal(a[name], b[name]))


def tensors(content: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(content, Tensor):
        yield where, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from tensors(value, f"{where}/{key}")
    elif isinstance(content, list | tuple):
        for number, value in enumerate(content):
            yield from tensors(value, f"{where}/{number}")


def several(step: Callable[[], Tensor]) -> None:
    for _ in range(TIMED):
        step()


def cost(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of a step of both modes by both ways. Each is compiled for itself, so each is timed by itself."""
    shape, found = SHAPES[name], dict[str, Any]()
    for way, deterministic in [*WAYS.items(), *WAYS.items()]:
        use(deterministic)
        model, batch = build(shape, MOE), random_batch(shape)
        step = stepper(model, batch)
        for mode in ("dense", "sparse"):
            model.set_mode(mode)
            seconds = seconds_in_turns({mode: partial(several, step)}, rounds, warmup=2)[mode]
            found.setdefault(mode, {}).setdefault(way, []).extend(one / TIMED for one in seconds)
    for mode, ways in found.items():
        medians = {way: statistics.median(seconds) for way, seconds in ways.items()}
        ratio = medians["deterministic"] / medians["fastest"]
        print(f"{name} {mode}: {', '.join(f'{way} {1e3 * s:.2f} ms' for way, s in medians.items())}; {ratio:.3f}")
    return {"shape": name, "seconds": found}


if __name__ == "__main__":
    sys.exit(main())
