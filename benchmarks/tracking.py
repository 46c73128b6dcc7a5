"""What a tracking server that is away costs a training: steps per second with a healthy one and with others, in turns.

    python benchmarks/tracking.py [--rounds 5] [--steps 400]

The same dense phase of a small GPT, logged every second step, is trained in a process of its own while the server is
healthy, stopped, takes ten seconds for every answer, or answers 500. Steps per second are those that the phase itself
records; beside them the whole stage, with its start and its end, in seconds and in processor seconds, which other work
on the machine hardly touches. Medians, and the median over rounds of the ratio to the healthy server of that round.
Exits with 1 if a server that is away costs more than 2 %.
"""

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import yaml
from machine import RESULTS, machine

from ssd_lit.support.files import read_json, write_json
from ssd_lit.tracking.store import ensure_store

ROOT = Path(__file__).parents[1]
RESULT = RESULTS / "tracking.json"
SERVERS = ("healthy", "stopped", "slow", "500")
LEAST_SPEED = 0.98
THREADS = "1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {server: [] for server in SERVERS}
    with tempfile.TemporaryDirectory() as name, servers(Path(name)) as uris:
        run = prepare(Path(name), arguments.steps)
        for number in range(arguments.rounds + 1):
            for server in SERVERS:
                told = train(run, uris[server])
                if number:  # the first round fills the caches of the file system
                    rounds[server].append(told)
                    print(f"{server:<9}{told['steps_per_second']:8.1f} steps/s", flush=True)
    medians = {
        server: {key: statistics.median(one[key] for one in told) for key in told[0]} for server, told in rounds.items()
    }
    speed = {server: ratio(rounds, server) for server in SERVERS}
    write_json(
        RESULT, {"machine": machine("mlflow", "lightning"), "rounds": rounds, "medians": medians, "speed": speed}
    )
    print(f"{'server':<9}{'steps/s':>9}{'of healthy':>12}{'stage, s':>10}{'processor, s':>14}")
    for server, median in medians.items():
        print(
            f"{server:<9}{median['steps_per_second']:9.1f}{speed[server]:12.3f}{median['stage_seconds']:10.1f}"
            f"{median['stage_processor_seconds']:14.1f}"
        )
    return int(min(speed.values()) < LEAST_SPEED)


def ratio(rounds: dict[str, list[dict[str, float]]], server: str) -> float:
    """The median over rounds of the steps per second, as a share of the healthy server's in the same round."""
    pairs = zip(rounds[server], rounds["healthy"], strict=True)
    return statistics.median(one["steps_per_second"] / healthy["steps_per_second"] for one, healthy in pairs)


@contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """The addresses of the servers, each a process of its own; nobody listens at that of the stopped one."""
    uris, processes = {}, []
    try:
        for server in SERVERS:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            uris[server] = f"http://127.0.0.1:{port}"
            if server == "stopped":
                continue
            place = folder / f"server-{server}"
            ensure_store(place)
            command = [sys.executable, str(ROOT / "tests/faulty_server.py"), str(place), str(port), server]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            processes.append(process)
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise RuntimeError(f"{command} did not start")
        yield uris
    finally:
        for process in processes:
            process.kill()
            process.wait()


def prepare(folder: Path, steps: int) -> Path:
    """Everything but the training of a run of one dense phase; returns the run's folder."""
    words = np.random.default_rng(0).choice(["river", "moves", "senate", "the", "harvest", "praises"], (600, 60))
    (folder / "text.txt").write_text("\n\n".join(" ".join(row) for row in words), encoding="utf-8")
    content = {
        "experiment": "tracked", "description": "One dense phase.",
        "data": {
            "name": "words", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
            "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"vocab_size": 512}, "sequence_length": 64,
        },
        "model": {"layers": 2, "d_model": 64, "heads": 2, "d_ff": 256},
        "moe": {"experts": 8, "top_k": 3},
        "training": {"steps": steps, "batch_size": 8, "log_every": 2, "validate_every": 100, "validation_blocks": 4},
        "arms": {"dense": {"method": "dense"}},
    }  # fmt: skip
    experiment = folder / "tracked.yaml"
    experiment.write_text(yaml.safe_dump(content), encoding="utf-8")
    stage("configs", experiment, "--results", folder / "results")
    data = next((folder / "results/data").iterdir())
    for name in ("prepare", "tokenizer", "encode"):
        stage(name, data)
    return folder / "results/tracked/runs/dense-seed0"


def train(run: Path, uri: str) -> dict[str, float]:
    """Train the phase from its beginning, as a run that MLflow has never heard of."""
    for name in ("phases", "stages", "checkpoints", "work"):
        shutil.rmtree(run / name, ignore_errors=True)
    for name in ("metrics.jsonl", "mlflow.json"):
        (run / name).unlink(missing_ok=True)
    seconds, processor = stage("train", run, "--until", "dense", "--threads", THREADS, uri=uri)
    record = read_json(run / "phases/00-dense/phase.json")
    return {
        "steps_per_second": record["steps"] / record["seconds"],
        "stage_seconds": seconds,
        "stage_processor_seconds": processor,
    }


def stage(*arguments: str | Path, uri: str | None = None) -> tuple[float, float]:
    """Run a stage to its end; returns its seconds and its processor seconds."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from ssd_lit.cli import run; run()", *map(str, arguments)],
        env={**os.environ, **({} if uri is None else {"MLFLOW_TRACKING_URI": uri})}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{arguments} failed")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    sys.exit(main())
