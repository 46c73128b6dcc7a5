"""A whole SSD run through `ssd-lit train`: what changes of phase, checkpoints and the start of the process cost.

    python benchmarks/switching.py --tokens FILE [--shape small] [--devices 1] [--schedule short] [--runs cold warm]

FILE is the train.bin of any prepared data, such as results/data/english-*/tokens: how long clustering takes depends on
what the neurons have learnt, and of random tokens nothing can be learnt. Every run is a process of its own: the command
line with all callbacks, timed by one more callback that waits for the GPU where a phase ends. `cold` begins with an
empty cache of compiled code, `warm` with what the run before it left, or an earlier call with the same --cache. The
bytecode of the libraries is there in both, as pip leaves it. The phases of a schedule have a fixed length: `whole` is
that of configs/h100/gpt124m.yaml, `tenth` has a tenth of its steps and all of its changes, `short` has 150 steps.
Reported are

- the change of phase: from the end of a phase's last step to the beginning of the next step, without the validation
  between them, which stands beside it; those before a mode has run once are left out;
- the first step: from the start of the process to its end;
- the run: from the beginning of its first step to the final model on the disk, against the sum of its steps (median of
  a mode, over stretches between logged steps, times their number), without validations; with compilation of both modes
  and without; and where the difference goes;
- checkpoints: how much later the step after one begins, and their share of the run.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import yaml
from gpt2 import DEVICE, SHAPES, Shape
from lightning.pytorch import Callback, Trainer
from machine import RESULTS, machine, synchronize

from ssd_lit.config import DataConfig, RunConfig, dump
from ssd_lit.models.flops import Costs
from ssd_lit.paths import data_dir
from ssd_lit.run import Run
from ssd_lit.support.files import sha256, write_json, write_json_checked, write_text
from ssd_lit.training.logger import Recorder
from ssd_lit.training.phase_switch import PhaseSwitch

RESULT = RESULTS / "switching.json"
VALIDATION_BLOCKS = 256


class Schedule(NamedTuple):
    """Steps of a whole run, of its warm-up, a sparse phase, a dense one, the last; and what happens in between."""

    phases: tuple[int, int, int, int, int]
    validate_every: int
    check_every: int
    checkpoint_every: int


SCHEDULES = {
    # The real one has a warm-up of 600 to 1200 steps.
    "whole": Schedule((6200, 900, 400, 60, 1240), 200, 200, 1000),
    "tenth": Schedule((620, 90, 40, 6, 124), 50, 200, 200),
    "short": Schedule((150, 30, 20, 10, 30), 50, 50, 70),
}
LIMITS = {"small": {1: 0.4, 4: 0.8}, "1.3b": {1: 1.2}}
"""Seconds of a change of phase, by shape and devices."""


def main() -> int:
    arguments = parse()
    if arguments.child is not None:
        return child(arguments.child)
    shape = SHAPES[arguments.shape]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        cache = arguments.cache or Path(name) / "cache"
        compile_bytecode(Path(name) / "bytecode")
        for run in arguments.runs:
            if run == "cold":
                shutil.rmtree(cache, ignore_errors=True)
            schedule = SCHEDULES[arguments.schedule]
            folder = write_run(Path(name) / run, shape, schedule, arguments.tokens, devices=arguments.devices)
            found[run] = whole_run(folder, cache)
            show(f"{arguments.shape}, {arguments.devices} devices, {run}", found[run])
    key = f"{arguments.shape}-{arguments.devices}-{arguments.schedule}"
    result = arguments.out or RESULT
    known = json.loads(result.read_text()) if result.exists() else {}
    write_json(result, {**known, key: {"machine": machine("lightning"), **found}})
    limit = LIMITS.get(arguments.shape, {}).get(arguments.devices)
    return int(limit is not None and max(found[run]["switch_median_seconds"] for run in found) > limit)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required="--child" not in sys.argv, help="a train.bin of uint16 tokens")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--runs", nargs="+", choices=["cold", "warm"], default=["cold", "warm"])
    parser.add_argument("--schedule", choices=SCHEDULES, default="short")
    parser.add_argument("--cache", type=Path, help="where compiled code is kept; a temporary folder if not given")
    parser.add_argument("--out", type=Path, help="the JSON that the figures are added to")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_run(
    folder: Path, shape: Shape, schedule: Schedule, tokens: Path, *, devices: int, top_k: int = 8, **training: Any
) -> Path:
    """The folder of a run with its data, as `ssd-lit configs` and `encode` leave them; `training` changes settings."""
    steps, warmup, sparse, dense, last = schedule.phases
    config = RunConfig.model_validate(
        {
            "experiment": "switching", "arm": "ssd", "method": "ssd", "label": "SSD", "seed": 0,
            "data": {
                "name": "text", "sources": [{"kind": "files", "paths": ["text.txt"]}],
                "sequence_length": shape.sequence,
            },
            "model": shape.model().model_dump(),
            "moe": {"experts": 32, "top_k": top_k},
            "optim": {"lr": 6e-4, "warmup_steps": 5, "schedule": "wsd"},
            "training": {
                "steps": steps, "batch_size": shape.batch * devices, "devices": devices, "log_every": 10,
                "compile": DEVICE.type == "cuda", "precision": "bf16" if DEVICE.type == "cuda" else "fp32",
                "validate_every": schedule.validate_every, "validation_blocks": 2 * shape.batch * devices,
                "checkpoint_every": schedule.checkpoint_every, **training,
            },
            "switching": {
                "tau": 1.0, "check_every": schedule.check_every, "sparse_fraction": 0.5, "warmup_min_steps": warmup,
                "warmup_max_steps": warmup, "sparse_steps": sparse, "dense_min_steps": dense, "dense_max_steps": dense,
                "final_dense_steps": last,
            },
        }
    )  # fmt: skip
    run = folder / "results/switching/runs" / config.name
    write_text(run / "config.yaml", dump(config))
    write_tokens(data_dir(folder / "results", config.data), config.data, shape, tokens)
    return run


def write_tokens(folder: Path, config: DataConfig, shape: Shape, source: Path) -> None:
    tokens, splits = np.fromfile(source, dtype=np.uint16), {}
    (folder / "tokens").mkdir(parents=True)
    held_out = VALIDATION_BLOCKS * shape.sequence
    for split, part in (("train", tokens[held_out:]), ("validation", tokens[: held_out + 1])):
        path = folder / "tokens" / f"{split}.bin"
        part.tofile(path)
        splits[split] = {"blocks": (len(part) - 1) // shape.sequence, "sha256": sha256(path)}
    index = {"vocab_size": shape.vocabulary, "eos_id": 0, "dtype": "uint16", "sequence_length": shape.sequence}
    write_json_checked(folder / "tokens/index.json", {**index, "splits": splits, "digest": "some text"})
    write_text(folder / "config.yaml", dump(config))


def compile_bytecode(folder: Path) -> None:
    """Have Python write and use the bytecode of what training imports: images of containers may lack it."""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(folder)
    libraries = "torch._inductor.compile_fx, torch._dynamo.repro.after_dynamo, ssd_lit.training.fit"
    subprocess.run([sys.executable, "-c", f"import {libraries}"], check=True)


def whole_run(run: Path, cache: Path) -> dict[str, Any]:
    """Train the run in a process of its own; what its clock and its records tell."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
                   "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # fmt: skip
    began = time.time()
    subprocess.run([sys.executable, __file__, "--child", str(run)], check=True, env=environment)
    ended = time.time()
    told = json.loads((run / "clock.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    return {"process_seconds": ended - began, **figures(told, config)}


def figures(told: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the moments that a clock wrote down come to."""
    steps, switches = told["steps"], told["switches"]
    every = config["training"]["log_every"]
    windows: dict[str, list[float]] = {"dense": [], "sparse": []}
    # At a logged step the host waits for the GPU; between two of them nothing does, if nothing else happens there.
    for first in range(every, len(steps) - every, every):
        window = steps[first : first + every + 1]
        if len({step["phase"] for step in window}) == 1 and not any(step["before"] for step in window[1:]):
            windows[window[0]["mode"]].append((window[-1]["at"] - window[0]["at"]) / every)
    median = {mode: statistics.median(seconds) for mode, seconds in windows.items()}
    first_steps = {mode: [one["seconds"] for one in steps if one["mode"] == mode][:3] for mode in median}
    compiled = sum(max(0.0, one - median[mode]) for mode, some in first_steps.items() for one in some)
    run = told["ended"] - steps[0]["at"] - sum(told["validations"])
    ideal = sum(median[step["mode"]] for step in steps)
    known = [one["seconds"] for one in switches[2:]]  # the first two lead into modes that never ran
    late = [one["late"] for one in told["checkpoints"]]
    return {
        "first_step_seconds": steps[0]["at"] + steps[0]["seconds"] - told["process"],
        "step_median_seconds": median,
        "first_steps_of_mode_seconds": first_steps,
        "compilation_seconds": compiled,
        "switches": switches,
        "switch_median_seconds": statistics.median(known),
        "switch_longest_seconds": max(known),
        "validation_seconds": told["validations"],
        "run_seconds": run,
        "steps_seconds": ideal,
        "run_over_steps": run / ideal,
        "run_over_steps_without_compilation": (run - compiled) / ideal,
        "between_steps_seconds": between_steps(told, median, compiled),
        "beyond_steps_seconds": told["ended"] - told["process"] - sum(told["validations"]) - ideal,
        "checkpoints": told["checkpoints"],
        "checkpoint_share": sum(late) / run,
        "checkpoint_longest_seconds": max(late, default=0.0),
        "tokens_a_step": config["training"]["batch_size"] * config["data"]["sequence_length"],
    }


def between_steps(told: dict[str, Any], median: dict[str, float], compiled: float) -> dict[str, float]:
    """Where the seconds beyond the steps' own went, by what happened between two of them."""
    steps = told["steps"]
    seconds = {"compilation": compiled, "end": told["ended"] - steps[-1]["at"] - median[steps[-1]["mode"]]}
    for step, following in pairwise(steps):
        happened = following["before"][0] if following["before"] else "nothing"
        excess = following["at"] - step["at"] - following["validation"] - median[step["mode"]]
        seconds[happened] = seconds.get(happened, 0.0) + excess
    seconds["nothing"] = seconds.get("nothing", 0.0) - compiled
    return seconds


class Clock(Callback):
    """Writes down when steps begin, what lies between them, and how much memory there is at each change of phase."""

    def __init__(self, switch: Any, path: Path):
        self._switch = switch
        self._path = path
        self.told: dict[str, Any] = {"process": psutil.Process().create_time(), "steps": [], "switches": [],
                                     "validations": [], "checkpoints": []}  # fmt: skip
        self._check_every = switch.run.config.switching.check_every
        self._validating, self._validated = 0.0, False
        self._phase_ended: float | None = None
        self._parts: dict[str, float] = {}

    def watch_parts(self) -> None:
        """Have clustering and permuting tell how long they take."""
        from ssd_lit.training import phase_switch

        for name in ("find_experts", "group_neurons"):
            setattr(phase_switch, name, self._timed(name, getattr(phase_switch, name)))

    def _timed(self, name: str, part: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            synchronize()
            began = time.time()
            found = part(*arguments)
            synchronize()
            self._parts[name] = time.time() - began
            return found

        return timed

    def watch_saves(self, trainer: Trainer) -> None:
        """Have the trainer tell how long it takes to save."""
        save = trainer.save_checkpoint

        def timed(*arguments: Any, **named: Any) -> None:
            synchronize()
            began = time.time()
            save(*arguments, **named)
            self.told["checkpoints"].append({"step": trainer.global_step, "late": time.time() - began})

        trainer.save_checkpoint = timed  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.watch_saves(trainer)
        self.watch_parts()

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if self._phase_ended is not None:
            synchronize()
        now = time.time()
        saved = bool(self.told["checkpoints"]) and self.told["checkpoints"][-1]["step"] == trainer.global_step
        checked = self._switch.phase.mode == "dense" and trainer.global_step % self._check_every == 0
        happened = {"change": self._phase_ended is not None, "checkpoint": saved, "validation": self._validated,
                    "similarity": checked}  # fmt: skip
        if self._phase_ended is not None:
            memory = [torch.cuda.memory_allocated(), torch.cuda.memory_reserved()] if DEVICE.type == "cuda" else []
            self.told["switches"].append({
                "step": trainer.global_step, "to": self._switch.phase.mode, "memory": memory, "parts": self._parts,
                "seconds": now - self._phase_ended - self._validating,
            })  # fmt: skip
        phase = self._switch.phase
        self.told["steps"].append({
            "at": now, "mode": phase.mode, "phase": phase.index, "validation": self._validating,
            "before": [name for name, did in happened.items() if did],
        })  # fmt: skip
        self._phase_ended, self._validating, self._validated, self._parts = None, 0.0, False, {}

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """First of all callbacks: what the others do belongs to the change of phase, where one follows."""
        ends = trainer.global_step - self._switch.phase.first_step >= self._switch.phase.max_steps
        if ends:
            synchronize()
        now = time.time()
        self.told["steps"][-1]["seconds"] = now - self.told["steps"][-1]["at"]
        if ends:
            self._phase_ended = now

    def on_validation_start(self, *_: Any) -> None:
        synchronize()
        self._validating -= time.time()

    def on_validation_end(self, *_: Any) -> None:
        synchronize()
        self._validating += time.time()
        self._validated = True
        self.told["validations"].append(self._validating)

    def write(self) -> None:
        self.told["ended"] = time.time()
        write_json(self._path, self.told)


def child(folder: Path) -> int:
    """`ssd-lit train RUN`, with one more callback."""
    from ssd_lit import cli
    from ssd_lit.training import fit
    from ssd_lit.training.fit import build_trainer

    clocks: list[Clock] = []

    def with_clock(run: Run, switch: PhaseSwitch, costs: Costs, recorder: Recorder | None) -> Trainer:
        trainer = build_trainer(run, switch, costs, recorder)
        clocks.append(Clock(switch, folder / "clock.json"))
        trainer.callbacks.insert(0, clocks[0])  # type: ignore[attr-defined]
        return trainer

    fit.build_trainer = with_clock
    status = cli.main(["train", str(folder), "--until", "sparse_phases"])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clocks[0].write()
    return status


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}")
    for name, form in (
        ("first_step_seconds", "8.1f"), ("switch_median_seconds", "8.3f"), ("switch_longest_seconds", "8.3f"),
        ("run_seconds", "8.1f"), ("steps_seconds", "8.1f"), ("run_over_steps", "8.3f"),
        ("run_over_steps_without_compilation", "8.3f"), ("beyond_steps_seconds", "8.1f"),
        ("checkpoint_longest_seconds", "8.3f"), ("checkpoint_share", "8.4f"), ("process_seconds", "8.1f"),
    ):  # fmt: skip
        print(f"  {name:<40}{format(found[name], form)}")
    print(f"  steps: {found['step_median_seconds']}, first of each mode: {found['first_steps_of_mode_seconds']}")
    print(f"  changes: {[round(one['seconds'], 3) for one in found['switches']]}")
    print(f"  parts: {[{n: round(x, 3) for n, x in one['parts'].items()} for one in found['switches']]}")
    print(f"  between steps: { {name: round(x, 2) for name, x in found['between_steps_seconds'].items()} }")
    print(f"  checkpoints: {[(one['step'], round(one['late'], 2)) for one in found['checkpoints']]}")
    print(f"  memory: {[[round(x / 2**30, 2) for x in one['memory']] for one in found['switches']][::4]}")
    print(f"  validations: {[round(x, 2) for x in found['validation_seconds']]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
