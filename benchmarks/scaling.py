"""Training on several GPUs of one machine through `ssd-lit train`: speed beside one GPU, memory, and changes of phase.

    python benchmarks/scaling.py --tokens FILE --shapes small 1.3b [--devices 2] [--shard 6.7b] [--profile]

FILE is the train.bin of any prepared data. `--shapes` are trained on one GPU and on all, each of which has the model
and a batch as large as the one GPU's; `--shard` are trained on all, the model divided among them (FSDP2) and
activations computed again. Every run is one of benchmarks/switching.py, in a process of its own with all callbacks: 200
steps (130 of a divided model), dense and sparse (K 6 of 32) in turns. Runs on one GPU go side by side, each on its own.
Reported are

- milliseconds of a dense and of a sparse step (median over stretches of ten), tokens a second, and the speed of all
  GPUs over as many times that of one;
- seconds of a change of phase (median of those between modes that ran before), and of each checkpoint;
- the last loss of training of each, on other batches: all GPUs read as many times more tokens;
- the estimate of the memory that `training.micro_batch_size: null` goes by, beside the peak;
- with `--profile`, over ten more steps of each mode on the first GPU: how long it does nothing, how long NCCL runs, and
  how long NCCL alone runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gpt2 import SHAPES, Shape
from lightning.pytorch import Callback, Trainer
from machine import RESULTS, machine
from switching import Clock, Schedule, compile_bytecode, figures, write_run

from ssd_lit.config import MoEConfig, load_run
from ssd_lit.models.flops import Costs
from ssd_lit.models.memory import training_memory
from ssd_lit.run import Run
from ssd_lit.support.files import write_json
from ssd_lit.training.logger import Recorder
from ssd_lit.training.phase_switch import PhaseSwitch

RESULT = RESULTS / "scaling.json"
LEAST = {"small": 0.95, "1.3b": 0.97}
"""Speed over as many times that of one GPU, in both modes."""
SCHEDULE = Schedule((200, 40, 60, 20, 40), validate_every=100, check_every=100, checkpoint_every=1000)
SHARDED = Schedule((130, 20, 30, 20, 30), validate_every=65, check_every=65, checkpoint_every=1000)
PROFILED = {"sparse": range(132, 136), "dense": range(182, 186)}
"""Steps (0-based) that are profiled: no monitor and no check falls among them."""


def main() -> int:
    arguments = parse()
    if arguments.child is not None:
        return child(arguments.child, profiled=arguments.profile)
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    met = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compile_bytecode(folder / "bytecode")
        with ThreadPoolExecutor(arguments.devices) as pool:
            alone = list(pool.map(lambda shape: measured(folder, shape, 1, arguments), arguments.shapes))
        for shape, single in zip(arguments.shapes, alone, strict=True):
            runs = {1: single, arguments.devices: measured(folder, shape, arguments.devices, arguments)}
            one, several = (runs[n]["tokens_per_second"] for n in runs)
            linear = {mode: several[mode] / (arguments.devices * one[mode]) for mode in one}
            met &= min(linear.values()) >= LEAST.get(shape, 0)
            show(shape, runs, linear)
            known[f"{shape}-{arguments.devices}"] = {"machine": machine("lightning"), "linear": linear, **runs}
            write_json(arguments.out or RESULT, known)
        for shape in arguments.shard:
            run = measured(folder, shape, arguments.devices, arguments, shard=True, activation_checkpointing=True)
            show(f"{shape}, divided", {arguments.devices: run}, {})
            known[f"{shape}-{arguments.devices}-shard"] = {"machine": machine("lightning"), arguments.devices: run}
            write_json(arguments.out or RESULT, known)
    return int(not met)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required="--child" not in sys.argv, help="a train.bin of uint16 tokens")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--shard", nargs="*", choices=SHAPES, default=[])
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count())
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--cache", type=Path, help="where compiled code is kept; a temporary folder if not given")
    parser.add_argument("--out", type=Path, help="the JSON that the figures are added to")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(folder: Path, shape: str, devices: int, arguments: argparse.Namespace, **training: Any) -> dict[str, Any]:
    """Train a run on so many GPUs; what it told."""
    place = folder / f"{shape}-{devices}-{len(training)}"
    schedule = SHARDED if training.get("shard") else SCHEDULE
    run = write_run(place, SHAPES[shape], schedule, arguments.tokens, devices=devices, top_k=6, **training)
    cache = arguments.cache or folder / "cache"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "TRITON_CACHE_DIR": str(cache / "triton"),
                   "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}  # fmt: skip
    command = [sys.executable, __file__, "--child", str(run), *(["--profile"] if arguments.profile else [])]
    subprocess.run(command, check=True, env=environment)
    told = json.loads((run / "clock.json").read_text())
    config = load_run(run / "config.yaml")
    found = figures(told, config.model_dump(mode="json"))
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {point["step"]: point["values"]["train/loss"] for point in points if "train/loss" in point["values"]}
    return {
        "step_median_seconds": found["step_median_seconds"],
        "tokens_per_second": {m: found["tokens_a_step"] / s for m, s in found["step_median_seconds"].items()},
        "switch_median_seconds": found["switch_median_seconds"],
        "first_step_seconds": found["first_step_seconds"],
        "switches": found["switches"],
        "checkpoints": found["checkpoints"],
        "losses": losses,
        "peak_gibibytes": told["peak"] / 2**30,
        "estimated_gibibytes": estimated(SHAPES[shape], config.training.shard, devices) / 2**30,
        "profile": told["profile"],
    }


def estimated(shape: Shape, sharded: bool, devices: int) -> float:
    """Bytes, by the estimate, of the shape's batch on a device."""
    needed = training_memory(shape.model(), MoEConfig(experts=32, top_k=6), shape.vocab, shape.sequence, torch.bfloat16)
    return needed.of_step(
        shape.batch, shards=devices if sharded else 1, checkpointing=sharded, graphs=1 if sharded else 2
    )


class Profile(Callback):
    """Profiles some steps of each mode."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self._profiler: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if any(trainer.global_step == steps.start for steps in PROFILED.values()):
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for mode, steps in PROFILED.items():
            if self._profiler is not None and trainer.global_step == steps.stop:
                torch.cuda.synchronize()
                self._profiler.stop()
                self.found[mode] = occupied(self._profiler, len(steps))
                self._profiler = None


def occupied(profiler: Any, steps: int) -> dict[str, float]:
    """Milliseconds a step: of a stretch of steps, of nothing, of NCCL, and of NCCL alone."""
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), "nccl" in event.name().lower())
        for event in profiler.profiler.kineto_results.events()
        if "cuda" in str(event.device_type()).lower() and event.duration_ns()
    )
    edges = sorted([(begin, 1, nccl) for begin, _, nccl in spans] + [(end, -1, nccl) for _, end, nccl in spans])
    running, parts, last = {True: 0, False: 0}, {"nothing": 0, "nccl": 0, "nccl alone": 0}, edges[0][0]
    for at, change, nccl in edges:
        if not running[True] and not running[False]:
            parts["nothing"] += at - last
        if running[True]:
            parts["nccl"] += at - last
            parts["nccl alone"] += 0 if running[False] else at - last
        running[nccl] += change
        last = at
    parts["all"] = edges[-1][0] - edges[0][0]
    return {name: nanoseconds / 1e6 / steps for name, nanoseconds in parts.items()}


def child(folder: Path, *, profiled: bool) -> int:
    """`ssd-lit train RUN` in one of the processes, with a clock and perhaps a profile."""
    from ssd_lit import cli
    from ssd_lit.training import fit
    from ssd_lit.training.fit import build_trainer

    callbacks: list[Any] = []

    def watched(run: Run, switch: PhaseSwitch, costs: Costs, recorder: Recorder | None) -> Trainer:
        trainer = build_trainer(run, switch, costs, recorder)
        callbacks.extend([Clock(switch, folder / "clock.json"), Profile()])
        trainer.callbacks[:0] = callbacks[: 2 if profiled else 1]  # type: ignore[attr-defined]
        return trainer

    fit.build_trainer = watched
    status = cli.main(["train", str(folder), "--until", "sparse_phases"])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        clock, profile = callbacks
        clock.told |= {"peak": torch.cuda.max_memory_reserved(), "profile": profile.found}
        clock.write()
    return status


def show(title: str, runs: dict[int, dict[str, Any]], linear: dict[str, float]) -> None:
    columns = f"{'dense ms':>18}{'sparse ms':>10}{'tokens/s':>12}{'':>12}{'GiB':>8}{'estimate':>10}{'loss':>8}"
    print(f"\n{title}\n          {columns}")
    for devices, found in runs.items():
        seconds, speed = found["step_median_seconds"], found["tokens_per_second"]
        print(
            f"  {devices} GPUs {1e3 * seconds['dense']:18.2f}{1e3 * seconds['sparse']:10.2f}{speed['dense']:12,.0f}"
            f"{speed['sparse']:12,.0f}{found['peak_gibibytes']:8.1f}{found['estimated_gibibytes']:10.1f}"
            f"{list(found['losses'].values())[-1]:8.3f}"
        )
        saves = [round(one["late"], 2) for one in found["checkpoints"]]
        print(f"    changes {found['switch_median_seconds']:.2f} s, first step {found['first_step_seconds']:.1f} s")
        print(f"    checkpoints {saves} s, all changes {[round(one['seconds'], 2) for one in found['switches']]} s")
        print(f"    losses {[round(loss, 3) for loss in found['losses'].values()]}")
        for mode, parts in found["profile"].items():
            print(f"    {mode}: " + ", ".join(f"{name} {ms:.2f} ms" for name, ms in parts.items()))
    print(
        f"  speed over that of as many single GPUs: { {mode: round(x, 3) for mode, x in linear.items()} }", flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
