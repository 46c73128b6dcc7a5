"""Seconds to dense training's loss, and where SSD's seconds go, from the records of runs.

    python benchmarks/time_to_loss.py RESULTS/EXPERIMENT [--dense dense] [--others ssd ...]

One pair for each seed of each other arm. Seconds count from the beginning of a run's first phase, compilation,
validations and checkpoints included. Dense training's loss is its last validation loss; the other run is there when a
line between its validations crosses it, if it ever is; its FLOPs there are told too. At the end of each dense phase of
the other run it is told when dense training had the same loss: step, seconds, FLOPs. A step of a mode is the median
over windows of `log_every` steps; steps of both modes in turn, at the end of a run, are a mode of their own. The
beginning of a run and a change of phase are what the window with their first step takes beyond its steps. Runs that
shared a device say nothing.
"""

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import RESULTS

from ssd_lit.config import load_run
from ssd_lit.records import PhaseRecord
from ssd_lit.support.files import write_json


class Validation(NamedTuple):
    """A validation loss, or a place between two, and the seconds since the run began."""

    step: float
    loss: float
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--dense", default="dense", help="the arm of dense training (dense)")
    parser.add_argument("--others", nargs="+", default=["ssd"], help="the arms to compare with it (ssd)")
    arguments = parser.parse_args()
    runs = arguments.experiment / "runs"
    found: dict[str, dict[str, Any]] = {}
    for arm in arguments.others:
        seeds = [path.parts[-2].rpartition("-seed")[2] for path in sorted(runs.glob(f"{arm}-seed*/phases"))]
        if not seeds:
            parser.error(f"{runs}: no run of {arm} with records")
        found[arm] = {
            seed: compared(runs / f"{arguments.dense}-seed{seed}", runs / f"{arm}-seed{seed}") for seed in seeds
        }
        for seed, one in found[arm].items():
            print(f"{arm}, seed {seed}:")
            show(one)
    name = arguments.experiment.absolute().name
    write_json(RESULTS / f"time_to_loss-{name}.json", {"experiment": name, "arms": found})
    return 0


def compared(*folders: Path) -> dict[str, Any]:
    """Dense training's run and the other."""
    dense, other = (timed(folder) for folder in folders)
    last, there = dense["validations"][-1], reached(other["validations"], dense["validations"][-1].loss)
    phase_ends = []
    for validation in other["validations"]:
        same = reached(dense["validations"], validation.loss)
        if validation.step in other["dense_ends"] and same is not None:
            phase_ends.append({"other": placed(validation, other), "dense": placed(same, dense)})
    return {
        "commit": other["commit"],
        "last": {"dense": placed(last, dense), "other": placed(other["validations"][-1], other)},
        "other_at_dense_loss": there and placed(there, other),
        "speed": there and last.seconds / there.seconds,
        "ends_of_dense_phases": phase_ends,
        "step_milliseconds": {"dense": dense["step_milliseconds"], "other": other["step_milliseconds"]},
        "change_seconds": {"dense": dense["change_seconds"], "other": other["change_seconds"]},
    }


def placed(validation: Validation, run: dict[str, Any]) -> dict[str, float]:
    """A validation with the FLOPs that the run had taken, on a line between the ends of phases."""
    return {**validation._asdict(), "flops": float(np.interp(validation.step, *run["flops"]))}


def show(found: dict[str, Any]) -> None:
    for name, one in found["last"].items():
        print(f"  {name}: last validation loss {one['loss']:.4f} after {one['seconds']:.1f} s")
    there = found["other_at_dense_loss"]
    if there is None:
        print("  the other never reaches dense training's")
    else:
        print(f"  the other has dense training's after {there['seconds']:.1f} s, at step {there['step']:.0f}: ", end="")
        flops = found["last"]["dense"]["flops"] / there["flops"]
        print(f"{found['speed']:.3f} times as fast, for {flops:.3f} times fewer FLOPs ({there['flops'] / 1e15:.1f} P)")
    print("  the other at the end of a dense phase, dense training at the same loss: step, seconds, PFLOP")
    for pair in found["ends_of_dense_phases"]:
        other, dense = (
            f"{one['step']:.0f}, {one['seconds']:.1f}, {one['flops'] / 1e15:.1f}"
            for one in (pair["other"], pair["dense"])
        )
        print(f"    loss {pair['other']['loss']:.4f}: {other}; {dense}")
    for name, modes in found["step_milliseconds"].items():
        print(f"  {name}, ms a step: " + ", ".join(f"{mode} {value:.1f}" for mode, value in modes.items()))
    for name, changes in found["change_seconds"].items():
        beginning, *later = (f"{seconds:.1f}" for seconds in changes.values())
        print(f"  {name}, s beyond its steps: the beginning {beginning}; changes of phase {', '.join(later) or 'none'}")


def timed(run: Path) -> dict[str, Any]:
    """Validations, FLOPs at ends of phases, ends of dense ones, ms a step by mode, seconds of a change by step."""
    phases = [PhaseRecord.read(path) for path in run.glob("phases/*/phase.json")]
    trained = sorted((one for one in phases if one.steps), key=lambda one: one.index)
    began = trained[0].provenance["began"]
    points = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {0: began} | {point["step"]: point["time"] / 1000 for point in points if "train/loss" in point["values"]}
    windows = [(a, b, clock[b] - clock[a]) for a, b in itertools.pairwise(sorted(clock))]
    modes = {step: one.mode for one in trained for step in range(one.first_step, one.last_step)}
    if load_run(run / "config.yaml").switching.final_sparse_every is not None:
        modes |= dict.fromkeys(range(trained[-1].first_step, trained[-1].last_step), "both in turn")
    step_seconds = {
        mode: statistics.median(s / (b - a) for a, b, s in windows if {modes[i] for i in range(a, b)} == {mode})
        for mode in dict.fromkeys(modes.values())
    }
    changes = {one.first_step for one in trained}
    return {
        "commit": trained[0].provenance["commit"],
        "validations": [
            Validation(point["step"], point["values"]["validation/loss"], point["time"] / 1000 - began)
            for point in points
            if "validation/loss" in point["values"]
        ],
        "flops": ([0, *(one.last_step for one in trained)], [0.0, *(one.total.flops for one in trained)]),
        "dense_ends": {one.last_step for one in trained if one.mode == "dense"},
        "step_milliseconds": {mode: 1000 * seconds for mode, seconds in step_seconds.items()},
        "change_seconds": {
            change: s - sum(step_seconds[modes[i]] for i in range(a, b))
            for a, b, s in windows
            for change in changes & set(range(a, b))
        },
    }


def reached(validations: list[Validation], loss: float) -> Validation | None:
    """Where a loss is first reached, on a line between two validations; None if it never is."""
    for before, after in itertools.pairwise(validations):
        if before.loss > loss >= after.loss:
            part = (before.loss - loss) / (before.loss - after.loss)
            return Validation(*(a + part * (b - a) for a, b in zip(before, after, strict=True)))
    return None


if __name__ == "__main__":
    sys.exit(main())
