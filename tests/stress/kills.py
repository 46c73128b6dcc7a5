"""Kill the quick experiment again and again; in the end it must be as if nothing had happened.

    python -m tests.stress.kills --folder DIR [--seed 0] [--out docs/data/kills.json]

Runs `configs/quick.yaml` once undisturbed into DIR/whole, and again into DIR/killed-0, where every job is to be killed
one to three times: at a random time, or while it writes a certain file; the job alone, snakemake alone, or all
processes at once; by SIGKILL, SIGTERM or SIGUSR1. After each, plain `snakemake` is called again. A moment may be
missed, for many jobs pass while others are killed: there are more rounds, until 30 kills are done. Takes about ten
minutes on two cores; says what differs, and exits 1 if anything does.
"""

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from ssd_lit.support.provenance import provenance
from tests.stress.same_results import differences, leftovers
from tests.workflow.running import ENVIRONMENT, ROOT, command

WRITES = {
    "prepare": ["documents/.work.*", "documents/.card.json.*.part"],
    "tokenizer": ["tokenizer/.tokenizer.json.*.part"],
    "encode": ["tokens/.train.bin.*.part", "tokens/.index.json.*.part"],
    "train": ["work/.rolling.ckpt.*.part", "checkpoints/.STAGE.ckpt.*.part", "stages/.STAGE.json.*.part",
              ".mlflow.json.*.part"],
    "evaluate": [".evaluation.json.*.part"],
    "summarise": [".summary.csv.*.part"],
    "figures": ["figures/.*.part"],
    "report": [".report.html.*.part"],
}  # fmt: skip
"""What each stage writes that a kill may hit, below the folder that it is called with."""

JOBS = {
    "prepare": 3, "tokenizer": 2, "encode": 3, "store": 2,
    "train dense-seed0 dense": 3, "train ssd-seed0 warmup": 3, "train ssd-seed0 moefy": 2,
    "train ssd-seed0 sparse_phases": 4, "train sparse-seed0 moefy": 2, "train sparse-seed0 sparse_phases": 3,
    "train posthoc-seed0 moefy": 2,
    "evaluate dense-seed0": 1, "evaluate ssd-seed0": 1, "evaluate sparse-seed0": 1, "evaluate posthoc-seed0": 1,
    "summarise": 2, "figures": 3, "report": 2,
}  # fmt: skip
"""The jobs of the quick experiment, and how often each is killed."""

ENOUGH = 30
"""Kills of a campaign, at least."""

WAYS = {
    "writing": [
        ("job", "SIGKILL"), ("all", "SIGKILL"), ("job", "SIGKILL"), ("all", "SIGKILL"), ("snakemake", "SIGKILL"),
        ("job", "SIGTERM"),
    ],
    "after": [
        ("job", "SIGKILL"), ("snakemake", "SIGKILL"), ("all", "SIGKILL"),
        ("job", "SIGTERM"), ("snakemake", "SIGTERM"), ("all", "SIGTERM"), ("job", "SIGUSR1"),
    ],
}  # fmt: skip
"""Whom a kill hits, and how, at either kind of moment."""


@dataclass
class Kill:
    """One kill: what it aims at, and what was seen."""

    job: str
    moment: str
    target: str
    signal: str
    left_behind: list[str] = field(default_factory=list)
    """What was half written just after."""
    snakemake: str = ""
    """How the workflow ended."""
    orphan: bool = False
    """Whether the job lived on without its workflow."""
    joined: str = ""
    """What the next workflow said while it waited for an orphan."""


def plan(draw: random.Random, whole: Path) -> dict[str, list[Kill]]:
    """The kills that each job is to meet; how long it takes undisturbed, the results in `whole` tell."""
    decks: dict[str, list[tuple[str, str]]] = {"writing": [], "after": []}
    kills: dict[str, list[Kill]] = {}
    for job, count in JOBS.items():
        stage = job.split()[0]
        writes = draw.sample(WRITES.get(stage, []), len(WRITES.get(stage, [])))
        for i in range(count):
            # Every other kill hits a file, as long as there are any.
            moment = "writing" if i % 2 == 0 and writes else "after"
            if not decks[moment]:
                decks[moment] = draw.sample(WAYS[moment], len(WAYS[moment]))
            target, name = decks[moment].pop()
            late = draw.uniform(0.1, _seconds(job, whole))
            moment += f" {writes.pop()}" if moment == "writing" else f" {late:.1f} s"
            kills.setdefault(job, []).append(Kill(job, moment, target, name))
    return kills


def _seconds(job: str, whole: Path) -> float:
    """How long a job took, as Snakemake's benchmark of it says."""
    stage, *names = job.split()
    folder = f"quick/runs/{names[0]}" if names else "*/*" if stage in ("prepare", "tokenizer", "encode") else "*"
    (benchmark,) = whole.glob(
        f"{folder}/benchmarks/{(names[1:] or [stage])[0]}.tsv" if stage != "store" else "logs/store.tsv"
    )
    with benchmark.open() as file:
        return float(next(csv.DictReader(file, delimiter="\t"))["s"])


class Workflow:
    """One call of plain `snakemake`, with all it started in one process group."""

    def __init__(self, results: Path, log: Path):
        self._log = log.open("w")
        self.log = log
        self._process = subprocess.Popen(
            command("quick", results), cwd=ROOT, env=ENVIRONMENT, start_new_session=True,
            stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def status(self) -> int | None:
        return self._process.poll()

    def jobs(self) -> dict[str, psutil.Process]:
        """The stages at work, by what they are called with."""
        found = {}
        try:
            processes = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return found
        for process in processes:
            job = _job_of(process)
            if job is not None:
                found[job] = process
        return found

    def send(self, kill: Kill, job: psutil.Process) -> None:
        number = signal.Signals[kill.signal]
        match kill.target:
            case "job":
                job.send_signal(number)
            case "snakemake":
                self._process.send_signal(number)
            case _:
                os.killpg(self._process.pid, number)

    def wait(self) -> int:
        return self._process.wait()


def _job_of(process: psutil.Process) -> str | None:
    """`train RUN STAGE`, `evaluate RUN` or `STAGE` of a process that is a stage; None for any other."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    if len(words) < 4 or not words[1].endswith("/ssd-lit"):
        return None
    stage, folder, *rest = words[2:]
    if stage in ("train", "evaluate"):
        return " ".join([stage, Path(folder).name, *rest[1:2]])
    return stage


def _watched(job: str, kill: Kill, results: Path) -> tuple[Path, str]:
    """The folder and the pattern that a kill waits for."""
    stage, *names = job.split()
    if stage in ("prepare", "tokenizer", "encode"):
        folder = next((results / "data").iterdir())
    else:
        folder = results / "quick" / (f"runs/{names[0]}" if names else "")
    pattern = kill.moment.removeprefix("writing ")
    return folder, pattern.replace("STAGE", names[1]) if len(names) > 1 else pattern


def _reached(job: str, kill: Kill, process: psutil.Process, results: Path) -> bool:
    """Whether the moment of a kill has come. Must be quicker than a small file is written."""
    if kill.moment.startswith("after"):
        return time.time() >= process.create_time() + float(kill.moment.split()[1])
    folder, pattern = _watched(job, kill, results)
    place, (head, _, tail) = (folder / pattern).parent, Path(pattern).name.partition("*")
    try:
        return any(name.startswith(head) and name.endswith(tail) for name in os.listdir(place))  # noqa: PTH208
    except FileNotFoundError:
        return False


def disturbed(results: Path, logs: Path, kills: dict[str, list[Kill]]) -> tuple[list[Kill], int]:
    """Run the experiment through all kills; returns those that were done, and the status of the last, undisturbed call.

    A workflow that ends by itself before, and not well, ends the campaign.
    """
    done: list[Kill] = []
    while True:
        workflow = Workflow(results, logs / f"{len(done):02d}.log")
        kill = _next_kill(workflow, results, kills)
        if done and done[-1].orphan:
            done[-1].joined = "; ".join(line for line in workflow.log.read_text().splitlines() if "held by" in line)
        if kill is None:
            return done, workflow.wait()
        done.append(kill)
        print(f"{len(done):3} {kill.job:30} {kill.moment:40} {kill.signal:8} to {kill.target:10} {kill.snakemake}",
              "orphan" if kill.orphan else "", *kill.left_behind, flush=True)  # fmt: skip


def _next_kill(workflow: Workflow, results: Path, kills: dict[str, list[Kill]]) -> Kill | None:
    """Do the first kill whose moment comes; None if the workflow ends without any."""
    jobs: dict[str, psutil.Process] = {}
    listed = 0.0
    while workflow.status is None:
        if time.monotonic() - listed > 0.2:
            jobs, listed = workflow.jobs(), time.monotonic()
        for job, process in jobs.items():
            # Whichever comes first: a moment that is missed must not keep the others from coming.
            kill = next((kill for kill in kills.get(job, []) if _reached(job, kill, process, results)), None)
            if kill is None or not process.is_running():
                continue
            kills[job].remove(kill)
            workflow.send(kill, process)
            if kill.signal == "SIGKILL":
                time.sleep(0.05)
                kill.left_behind = [path.name for path in leftovers(results)]
            status = workflow.wait()
            kill.snakemake = f"killed by {-status}" if status < 0 else f"exit {status}"
            kill.orphan = kill.target == "snakemake" and process.is_running()
            return kill
        time.sleep(0.0005)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for both results; keeps an undisturbed run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/kills.json")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    whole = args.folder / "whole"
    if not (whole / "quick/report.html").exists() and Workflow(whole, args.folder / "whole.log").wait():
        print(f"the undisturbed run failed: see {args.folder / 'whole.log'}")
        return 1
    began, draw = time.monotonic(), random.Random(args.seed)
    rounds: list[list[Kill]] = []
    found: list[str] = []
    while sum(map(len, rounds)) < ENOUGH and not found:
        killed = args.folder / f"killed-{len(rounds)}"
        done, status = disturbed(killed, args.folder, plan(draw, whole))
        rounds.append(done)
        found = [f"snakemake ended with {status}"] if status else sorted(differences(whole, killed, "quick"))
        print(f"round {len(rounds)}: {len(done)} kills, {len(found)} differences", flush=True)
    record = {
        "command": " ".join(["python -m tests.stress.kills --seed", str(args.seed)]),
        **provenance(),
        "seconds": round(time.monotonic() - began),
        "rounds": [[asdict(kill) for kill in done] for done in rounds],
        "differences": found,
    }
    args.out.write_text(json.dumps(record, indent=1).replace(f"{args.folder}/", "") + "\n", encoding="utf-8")
    print(f"{sum(map(len, rounds))} kills; {'no difference' if not found else '; '.join(found[:20])}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
