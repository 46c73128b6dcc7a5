"""Seconds to dense training's loss, and where SSD's seconds go, from the records of runs.

    python benchmarks/time_to_loss.py RESULTS/EXPERIMENT [--dense dense] [--other ssd]

One pair a seed. Seconds count from the beginning of a run's first phase, compilation, validations and checkpoints
included. Dense training's loss is its last validation loss; the other run is there when a line between its validations
crosses it, if it ever is. Both losses are told, and when each run reached the other's. A step of a mode is the median
over windows of `log_every` steps; a change of phase is what the window with its first step takes beyond its steps. Runs
that shared a device say nothing.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from machine import RESULTS

from ssd_lit.records import PhaseRecord
from ssd_lit.support.files import write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--dense", default="dense", help="the arm of dense training (dense)")
    parser.add_argument("--other", default="ssd", help="the arm to compare with it (ssd)")
    arguments = parser.parse_args()
    runs = arguments.experiment / "runs"
    seeds = [path.parts[-2].rpartition("-seed")[2] for path in sorted(runs.glob(f"{arguments.other}-seed*/phases"))]
    if not seeds:
        parser.error(f"{runs}: no run of {arguments.other} with records")
    found = {
        seed: compared(*(runs / f"{arm}-seed{seed}" for arm in (arguments.dense, arguments.other))) for seed in seeds
    }
    for seed, one in found.items():
        print(f"seed {seed}:")
        show(one)
    name = arguments.experiment.absolute().name
    write_json(RESULTS / f"time_to_loss-{name}.json", {"experiment": name, "seeds": found})
    return 0


def compared(*folders: Path) -> dict[str, Any]:
    """Dense training and the other run."""
    dense, other = (timed(folder) for folder in folders)
    (_, loss, dense_seconds), (_, other_loss, other_seconds) = dense["validations"][-1], other["validations"][-1]
    step, seconds = reached(other["validations"], loss)
    return {
        "commit": other["commit"],
        "loss": {"dense": loss, "other": other_loss},
        "seconds": {"dense": dense_seconds, "other": other_seconds},
        "other_at_dense_loss": {"step": step, "seconds": seconds},
        "dense_at_other_loss": dict(zip(("step", "seconds"), reached(dense["validations"], other_loss), strict=True)),
        "speed": None if seconds is None else dense_seconds / seconds,
        "step_milliseconds": {"dense": dense["step_milliseconds"], "other": other["step_milliseconds"]},
        "change_seconds": other["change_seconds"],
    }


def show(found: dict[str, Any]) -> None:
    loss, seconds, speed = found["loss"], found["seconds"], found["speed"]
    first, *later = found["change_seconds"].values()
    print(f"  last validation losses: dense training {loss['dense']:.4f} after {seconds['dense']:.1f} s, ", end="")
    print(f"the other {loss['other']:.4f} after {seconds['other']:.1f} s")
    for text, there in (
        ("the other at dense training's", found["other_at_dense_loss"]),
        ("dense training at the other's", found["dense_at_other_loss"]),
    ):
        print(f"  {text} loss: ", end="")
        print("never" if there["seconds"] is None else f"after {there['seconds']:.1f} s, at step {there['step']:.0f}")
    if speed is not None:
        print(f"  {speed:.3f} times as fast")
    for name, modes in found["step_milliseconds"].items():
        print(f"  {name}, ms a step: " + ", ".join(f"{mode} {value:.1f}" for mode, value in modes.items()))
    print(f"  changes of phase: the first {first:.1f} s, {len(later)} more {sum(later):.1f} s together")
    print(f"  ({min(later):.2f} to {max(later):.2f} s each)")


def timed(run: Path) -> dict[str, Any]:
    """Validations as (step, loss, seconds), milliseconds a step by mode, and seconds of each change by its step."""
    phases = [PhaseRecord.read(path) for path in run.glob("phases/*/phase.json")]
    trained = sorted((one for one in phases if one.steps), key=lambda one: one.index)
    began = trained[0].provenance["began"]
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {point["step"]: point["time"] / 1000 for point in points if "train/loss" in point["values"]}
    windows = [(a, b, clock[b] - clock[a]) for a, b in itertools.pairwise(sorted(clock))]
    modes = {step: one.mode for one in trained for step in range(one.first_step, one.last_step)}
    step_seconds = {
        mode: statistics.median(s / (b - a) for a, b, s in windows if {modes[i] for i in range(a, b)} == {mode})
        for mode in dict.fromkeys(modes.values())
    }
    changes = {one.first_step for one in trained[1:]}
    return {
        "commit": trained[0].provenance["commit"],
        "validations": [
            (point["step"], point["values"]["validation/loss"], point["time"] / 1000 - began)
            for point in points
            if "validation/loss" in point["values"]
        ],
        "step_milliseconds": {mode: 1000 * seconds for mode, seconds in step_seconds.items()},
        "change_seconds": {
            change: s - sum(step_seconds[modes[i]] for i in range(a, b))
            for a, b, s in windows
            for change in changes & set(range(a, b))
        },
    }


def reached(validations: list[tuple[int, float, float]], loss: float) -> tuple[float | None, float | None]:
    """Step and seconds at which a loss is first reached; None if it never is."""
    for (a, above, start), (b, below, end) in itertools.pairwise(validations):
        if above > loss >= below:
            part = (above - loss) / (above - below)
            return a + part * (b - a), start + part * (end - start)
    return None, None


if __name__ == "__main__":
    sys.exit(main())
