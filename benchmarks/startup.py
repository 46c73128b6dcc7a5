"""What it takes to start each kind of stage, and the share of an experiment's time that goes into starting.

    python benchmarks/startup.py [--rounds 5] [--experiment results/default]

A stage has started when it has imported what it needs, read its inputs, and built its model: the point at which its own
work begins is named in STAGES. Seconds from the start of the process, and the processor seconds it took to get there,
user and system, which other work on the machine hardly touches. Beside them, the seconds that LIBRARIES take to import.
All in turns; medians. With --experiment, a results folder that one call of the workflow has finished, the share of its
time that is overhead: the time in which no stage ran (Snakemake itself), and of the rest what starting its stages
takes, and ending them: the stages of a run, which tell MLflow what they did, are counted at the whole time that they
take where there is next to nothing to do. `train` stands for every stage that trains the model: warmup, sparse_phases
and dense. Exits with 1 if the share is too large.
"""

import argparse
import compileall
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from machine import RESULTS, machine

import ssd_lit
from ssd_lit.config import load_run
from ssd_lit.support.files import write_json

RESULT = RESULTS / "startup.json"

STAGES = {
    # Kind of stage: the module that must be imported first, and where its own work begins.
    "--help": ("ssd_lit.command", "app"),
    "configs": ("ssd_lit.pipeline.data", "write_configs"),
    "prepare": ("ssd_lit.data.documents", "prepare_documents"),
    "tokenizer": ("ssd_lit.data.tokenizer", "train_tokenizer"),
    "encode": ("ssd_lit.data.encode", "encode_documents"),
    "store": ("ssd_lit.tracking.store", "ensure_store"),
    "train": ("ssd_lit.training.fit", "Trainer.fit"),
    "moefy": ("ssd_lit.training.moefication", "find_experts"),
    "route": ("ssd_lit.training.routers", "fit_routers"),
    "evaluate": ("ssd_lit.evaluation.evaluate", "scoring_batches"),
    "analyse": ("ssd_lit.evaluation.experts", "final_model"),
    "summarise": ("ssd_lit.report.tables", "write_arms"),
    "figures": ("ssd_lit.report.figures", "write_figures"),
    "report": ("ssd_lit.report.page", "write_report"),
}
KINDS = {"warmup": "train", "sparse_phases": "train", "dense": "train", "run": "train", "downstream": "evaluate"}
"""Kind of stage of the jobs that have another name, the nearest for those that are not measured themselves."""
CHILD = """
import sys
from ssd_lit import cli, command

def begun(*_, **__):
    import json, os, time
    told = os.times()
    print(json.dumps({"time": time.time(), "processor": told.user + told.system}), flush=True)
    os._exit(0)

def main():
    from functools import reduce
    from importlib import import_module
    *path, last = sys.argv[2].split(".")
    setattr(reduce(getattr, path, import_module(sys.argv[1])), last, begun)
    return real(sys.argv[3:])

real, command.main = command.main, main
cli.run()
"""
"""Calls the command line as the console script does, and tells the time where the stage would begin its work."""

LIBRARIES = {
    "torch": "import torch",
    "GPT-2": "from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel",
}
"""What a stage with a model cannot start without: torch, and Transformers' class of a GPT-2, which imports torch."""
IMPORT = "import gc, os; gc.set_threshold(100_000, 50, 50); {}; os._exit(0)"
"""Imports as the command line does: objects are traced seldom, and not taken apart at the end."""

LIMITS = {"--help": 0.2, "train": 6.0, "route": 6.0}
OTHERS = 3.0
ALLOWED_SHARE = 0.05


def main() -> int:
    arguments = parse()
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    processor: dict[str, list[float]] = {stage: [] for stage in seconds}
    libraries: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    # As pip does; some containers forbid Python to write bytecode as it runs.
    compileall.compile_dir(Path(ssd_lit.__file__).parent, quiet=1)
    with tempfile.TemporaryDirectory() as name:
        calls, whole = prepare(Path(name))
        for number in range(arguments.rounds + 1):
            for stage in seconds:
                wall, cpu = started(stage, calls[stage])
                if number:  # the first round fills the caches of the file system
                    seconds[stage].append(wall)
                    processor[stage].append(cpu)
            for library, statement in LIBRARIES.items():
                wall = imported(statement)
                if number:
                    libraries[library].append(wall)
    found: dict[str, Any] = {
        "seconds": seconds,
        "processor_seconds": processor,
        "median_seconds": {stage: statistics.median(values) for stage, values in seconds.items()},
        "median_processor_seconds": {stage: statistics.median(values) for stage, values in processor.items()},
    }
    found["libraries"] = libraries
    found["median_libraries"] = {name: statistics.median(values) for name, values in libraries.items()}
    found["empty_stage_seconds"] = whole
    if arguments.experiment is not None:
        found["experiment"] = share_of(arguments.experiment, found["median_seconds"] | whole)
    write_json(RESULT, {"machine": machine("lightning", "transformers", "mlflow"), **found})
    show(found)
    return int("experiment" in found and found["experiment"]["overhead_share"] > ALLOWED_SHARE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experiment", type=Path, help="a finished folder of results, such as results/default")
    return parser.parse_args()


def prepare(folder: Path) -> tuple[dict[str, list[str]], dict[str, float]]:
    """A tiny experiment, run to its end: for each stage the arguments with which it begins its work again.

    Beside them, the seconds that the stages of a run took as a whole.
    """
    words = np.random.default_rng(0).choice(["river", "moves", "senate", "the", "harvest", "praises"], (300, 60))
    (folder / "text.txt").write_text("\n\n".join(" ".join(row) for row in words), encoding="utf-8")
    experiment = folder / "tiny.yaml"
    content = {
        "experiment": "tiny", "description": "A start.",
        "data": {
            "name": "words", "sources": [{"kind": "files", "paths": [str(folder / "text.txt")]}],
            "validation_fraction": 0.1, "test_fraction": 0.1, "tokenizer": {"vocab_size": 260}, "sequence_length": 16,
        },
        "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32},
        "moe": {"experts": 4, "top_k": 2, "router_steps": 4},
        "optim": {"warmup_steps": 2},
        "training": {"steps": 12, "batch_size": 4, "validation_blocks": 4},
        "evaluation": {"blocks": 4, "top_k_curve": [2]},
        "analysis": {"blocks": 4},
        "arms": {
            "dense": {"method": "dense"},
            "posthoc": {"method": "posthoc", "parent_arm": "dense", "moe": {"posthoc_router": "mass_mlp"}},
        },
    }  # fmt: skip
    experiment.write_text(yaml.safe_dump(content), encoding="utf-8")
    results = folder / "results"
    stage(["configs", str(experiment), "--results", str(results)])
    data = next((results / "data").iterdir())
    here = results / "tiny"
    for name in ("prepare", "tokenizer", "encode"):
        stage([name, str(data)])
    stage(["store", str(results)])
    calls: dict[str, list[str]] = {
        "--help": ["--help"],
        "configs": ["configs", str(experiment), "--results", str(results)],
        "store": ["store", str(results)],
        **{name: [name, str(data)] for name in ("prepare", "tokenizer", "encode")},
        **{name: [name, str(here)] for name in ("summarise", "figures", "report")},
    }
    whole = {}
    for kind, (run, command, *options) in {
        "train": ("dense-seed0", "train", "--until", "dense"),
        "moefy": ("posthoc-seed0", "train", "--until", "moefy"),
        "route": ("posthoc-seed0", "train", "--until", "route"),
        "evaluate": ("posthoc-seed0", "evaluate"),
        "analyse": ("posthoc-seed0", "analyse"),
    }.items():
        # Each begins again and again in results of its own, as they were before it.
        shutil.copytree(results, folder / kind)
        calls[kind] = [command, str(folder / kind / "tiny/runs" / run), *options]
        started(kind, calls[kind])  # fills the caches of the file system
        whole[kind] = stage([command, str(here / "runs" / run), *options])
    stage(["train", str(here / "runs/dense-seed0")])
    for name in ("summarise", "figures", "report"):
        stage(calls[name])
    return calls, whole


def stage(arguments: list[str]) -> float:
    """Run a stage to its end; returns the seconds it took."""
    began = time.perf_counter()
    command = [sys.executable, "-c", "from ssd_lit.cli import run; run()", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - began


def started(name: str, arguments: list[str]) -> tuple[float, float]:
    """Seconds and processor seconds until a stage begins its work."""
    command = [sys.executable, "-c", CHILD, *STAGES[name], *arguments]
    began = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        told = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise RuntimeError(f"{name} did not begin:\n{done.stderr[-2000:]}") from None
    return told["time"] - began, told["processor"]


def imported(statement: str) -> float:
    """Seconds of a process that only imports."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORT.format(statement)], check=True)
    return time.perf_counter() - began


def share_of(folder: Path, seconds: dict[str, float]) -> dict[str, Any]:
    """The overhead of an experiment that one call of the workflow ran, from the records of its jobs."""
    data = {folder.parent / "data" / one for one in data_names(folder)}
    records = [path for place in (folder, *data) for path in place.rglob("benchmarks/*.tsv")]
    records += (folder.parent / "logs").glob("store.tsv")
    jobs = [(KINDS.get(path.stem, path.stem), duration(path), path.stat().st_mtime) for path in records]
    spans = sorted((end - wall, end) for _, wall, end in jobs)
    total = max(end for _, end in spans) - spans[0][0]
    idle, reached = 0.0, spans[0][0]
    for begin, end in spans:
        idle += max(0.0, begin - reached)
        reached = max(reached, end)
    starting = sum(seconds[kind] for kind, _, _ in jobs)
    working = sum(wall for _, wall, _ in jobs)
    return {
        "jobs": dict(Counter(kind for kind, _, _ in jobs)),
        "seconds": total,
        "seconds_without_a_job": idle,
        "job_seconds": working,
        "starting_and_ending_seconds": starting,
        "overhead_share": idle / total + (1 - idle / total) * starting / working,
    }


def data_names(folder: Path) -> Iterator[str]:
    """The data sets of an experiment's runs, by the names of their folders."""
    for path in folder.glob("runs/*/config.yaml"):
        data = load_run(path).data
        yield f"{data.name}-{data.digest()}"


def duration(path: Path) -> float:
    """Seconds of a job, as Snakemake recorded them."""
    return float(path.read_text(encoding="utf-8").splitlines()[1].split("\t")[0])


def show(found: dict[str, Any]) -> None:
    print(f"{'stage':<12}{'seconds':>9}{'processor':>11}{'at most':>9}{'whole':>9}")
    for name, seconds in found["median_seconds"].items():
        limit = LIMITS.get(name, OTHERS)
        whole = f"{found['empty_stage_seconds'][name]:9.2f}" if name in found["empty_stage_seconds"] else ""
        print(f"{name:<12}{seconds:9.2f}{found['median_processor_seconds'][name]:11.2f}{limit:9.1f}{whole}")
    for name, seconds in found["median_libraries"].items():
        print(f"{name:<12}{seconds:9.2f}")
    told = found.get("experiment")
    if told is not None:
        print(
            f"overhead: {told['overhead_share']:.1%} (at most {ALLOWED_SHARE:.0%}): "
            f"{told['seconds_without_a_job']:.0f} of {told['seconds']:.0f} s without a job; "
            f"{told['starting_and_ending_seconds']:.0f} of {told['job_seconds']:.0f} s of jobs to start and end them"
        )


if __name__ == "__main__":
    sys.exit(main())
