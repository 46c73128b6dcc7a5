"""A whole experiment without Snakemake: the same stages in the same order, each run in one process from end to end."""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

from ssd_lit import stopping
from ssd_lit.chain import next_stage
from ssd_lit.config import ConfigError, Experiment, RunConfig
from ssd_lit.layout import FIRST_MODE, data_dir, phase_dir, run_dir

DATA = {"prepare": "documents", "tokenizer": "tokenizer", "encode": "tokens/index.json"}
"""The stages that make the tokens, in order, and what each leaves last."""

TABLES = ("summarise", "figures", "report")


def conduct(
    experiment: Experiment, results: Path, jobs: int, seconds: float | None, say: Callable[[str], None]
) -> None:
    """Take all runs of an experiment, whose configs lie in `results`, to their ends and write the report.

    At most `jobs` runs at a time. After `seconds`, or at SIGTERM, SIGUSR1 or Ctrl-C, the stages at work save their
    state and end, and `stopping.Stopped` is raised: called again, all go on where they were. A run that fails leaves
    out those that build on it, and no others; ConfigError then names it and its log. `say` hears what begins and ends.
    """
    asyncio.run(_Conductor(experiment, results, jobs, say).conduct(seconds))


class _Conductor:
    def __init__(self, experiment: Experiment, results: Path, jobs: int, say: Callable[[str], None]):
        self._runs = {run.name: run for run in experiment.runs()}
        self._results = results
        self._say = say
        self._data = data_dir(results, experiment.data)
        self._here = results / experiment.experiment
        self._room = asyncio.Semaphore(jobs)
        self._stopped: str | None = None
        """What asked to stop."""
        self._processes: set[Process] = set()
        self._ended: dict[str, asyncio.Event] = {name: asyncio.Event() for name in self._runs}
        self._failed: dict[str, str] = {}
        """Why, by run."""

    async def conduct(self, seconds: float | None) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        if seconds is not None:
            loop.call_later(seconds, self._stop, f"its limit of {seconds / 60:g} minutes")
        for stage, made in DATA.items():
            if not (self._data / made).exists():
                await self._must(self._data / "logs" / f"{stage}.log", stage, self._data)
        await self._must(self._results / "logs" / "store.log", "store", self._results)
        await asyncio.gather(*map(self._run, self._runs.values()))
        self._raise_if_stopped()
        if self._failed:
            raise ConfigError("\n".join(f"{name}: {why}" for name, why in self._failed.items()))
        if not self._is_reported():
            for stage in TABLES:
                await self._must(self._here / "logs" / f"{stage}.log", stage, self._here)

    async def _run(self, run: RunConfig) -> None:
        try:
            await self._others_of(run)
            folder = run_dir(self._results, run)
            log = folder / "logs" / "finish.log"
            async with self._room:
                if self._stopped is None and next_stage(folder, run) and not await self._stage(log, "finish", folder):
                    self._fail(run, f"failed, see {log}:\n{_last_words(log)}")
        except (_LeftOut, ValueError) as why:
            self._fail(run, str(why))
        finally:
            self._ended[run.name].set()
            self._say(f"{sum(event.is_set() for event in self._ended.values())} of {len(self._runs)} runs have ended")

    def _fail(self, run: RunConfig, why: str) -> None:
        if self._stopped is None:
            self._failed[run.name] = why

    async def _others_of(self, run: RunConfig) -> None:
        """Wait for what the run builds on: another's first phase, or all of it."""
        for name in {run.starts_from, run.matches} - {None}:
            await self._ended[str(name)].wait()
            if name in self._failed:
                raise _LeftOut(f"left out, because {name} failed")
        if run.shares_warmup is not None:
            owner = self._runs[run.shares_warmup]
            first = phase_dir(run_dir(self._results, owner), 0, FIRST_MODE[owner.method]) / "phase.json"
            while not first.exists() and not self._ended[owner.name].is_set():
                await asyncio.sleep(1.0)
            if not first.exists():
                raise _LeftOut(f"left out, because {owner.name} has no first phase to share")

    async def _must(self, log: Path, *stage: str | Path) -> None:
        self._raise_if_stopped()
        done = await self._stage(log, *stage)
        self._raise_if_stopped()
        if not done:
            raise ConfigError(f"{stage[0]} failed, see {log}:\n{_last_words(log)}")

    async def _stage(self, log: Path, *arguments: str | Path) -> bool:
        """Run a stage in a process of its own, with all it says in its log; whether it succeeded."""
        title, began = " ".join(map(str, arguments)), time.monotonic()
        self._say(f"{title}: begins")
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            process = await _start(out, arguments)
        self._processes.add(process)
        if self._stopped is not None:
            process.terminate()
        status = await process.wait()
        self._processes.remove(process)
        ending = {0: "done", stopping.STATUS: "stopped"}.get(status, "failed")
        self._say(f"{title}: {ending} after {time.monotonic() - began:.0f} s")
        return status == 0

    def _stop(self, why: str) -> None:
        if self._stopped is None:
            self._stopped = why
            for process in self._processes:
                process.terminate()

    def _raise_if_stopped(self) -> None:
        if self._stopped is not None:
            raise stopping.Stopped(self._stopped)

    def _is_reported(self) -> bool:
        """Whether the report is younger than all that it tells of."""
        report = self._here / "report.html"
        told = [self._here / "experiment.yaml"]
        for run in self._runs.values():
            folder = run_dir(self._results, run)
            told += [folder / "evaluation.json", *folder.glob("analysis/*.json"), *folder.glob("downstream/*.json")]
        return report.exists() and all(path.stat().st_mtime <= report.stat().st_mtime for path in told)


class _LeftOut(Exception):
    """A run that cannot be, because another failed."""


async def _start(out: IO[bytes], arguments: Iterable[str | Path]) -> Process:
    # In a session of its own: Ctrl-C is for the conductor, which passes it on as a wish to save and stop.
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "ssd_lit", *map(str, arguments),
        stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip


def _last_words(log: Path) -> str:
    """What the stages at the end of a log say failed; the last two lines of all if they say nothing."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines[-100:] if ": failed: " in line][-2:] or lines[-2:])
