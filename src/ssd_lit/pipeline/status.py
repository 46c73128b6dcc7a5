"""`ssd-lit status`: prints where runs stand, once or until all are done."""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from ssd_lit.config import ConfigError
from ssd_lit.pipeline.progress import Progress, Standing, State, experiment_dirs, progress_of
from ssd_lit.report.formatting import duration, number, percent, scaled
from ssd_lit.support.console import console, table

SECONDS, PIPED_SECONDS = 2.0, 15.0
"""Between two looks at the files, with a terminal and without one."""
COLOURS: dict[State, str] = {
    "done": "green",
    "running": "cyan",
    "waiting": "dim",
    "stopped": "yellow",
    "failed": "bold red",
}
NUMBERS = ("step", "sparse", "loss", "ppl", "sparse ppl", "tok/s", "left")


def status(exp_dir: Path | None, results: Path, *, watch: bool) -> None:
    """Print the runs of an experiment, of all under `results` if None is named; with `watch` until all are done.

    Raises ConfigError if there is none, ValueError if the one that is named is damaged.
    """
    folders = [exp_dir] if exp_dir is not None else experiment_dirs(results)
    if not folders:
        raise ConfigError(f"{results}: holds no experiment yet; `ssd-lit list` shows those that can be run")
    look = partial(_look, folders, strict=exp_dir is not None)
    found, out = look(), console()
    if not watch:
        out.print(_shown(found))
    elif sys.stdout.isatty():
        with Live(_shown(found), console=out, auto_refresh=False) as live:
            while not _all_done(found):
                time.sleep(SECONDS)
                found = look()
                live.update(_shown(found), refresh=True)
    else:
        out.print(_shown(found))
        while not _all_done(found):
            time.sleep(PIPED_SECONDS)
            found = look()
            out.print(time.strftime("\n%H:%M:%S"))
            out.print(_shown(found))


def _look(folders: Sequence[Path], *, strict: bool) -> list[Progress | str]:
    """How each experiment stands, or why that cannot be told; with `strict` that is raised instead."""
    found: list[Progress | str] = []
    for folder in folders:
        try:
            found.append(progress_of(folder))
        except ValueError as error:
            if strict:
                raise
            found.append(f"{folder}: {error}")
    return found


def _all_done(found: Sequence[Progress | str]) -> bool:
    return all(run.state == "done" for one in found if isinstance(one, Progress) for run in one.runs)


def _shown(found: Sequence[Progress | str]) -> RenderableType:
    """The experiments; those that cannot be read first."""
    broken = [Text(one, style=COLOURS["failed"]) for one in found if isinstance(one, str)]
    return Group(*broken, *[part for one in found if isinstance(one, Progress) for part in _experiment(one)])


def _experiment(progress: Progress) -> list[RenderableType]:
    counts = Counter(run.state for run in progress.runs)
    states = ", ".join(f"{counts[state]} {state}" for state in COLOURS if counts[state])
    left = progress.seconds_left
    ahead = f"; training left: about {duration(left)}" if left else ""
    parts: list[RenderableType] = [Text(f"{progress.name}: {len(progress.runs)} runs: {states}{ahead}")]
    if progress.text is not None:
        parts.append(Text(f"text {progress.text}"))
    shown = table("run", "state", "phase", *NUMBERS, numbers=NUMBERS)
    for run in progress.runs:
        shown.add_row(*_row(run))
    return [*parts, shown, *_notes(progress.runs), Text()]


def _notes(runs: Sequence[Standing]) -> list[Text]:
    """Where runs are at work, why they ended, what they wait for; a column of it would leave no room for numbers."""
    lines, waiting = [], dict[str, list[str]]()
    for run in runs:
        if run.state == "waiting":
            waiting.setdefault(run.note, []).append(run.run)
        elif run.state != "done":
            log = "" if run.log is None else f"; log: {run.log}"
            lines.append(Text(f"{run.run} {run.state}: {run.note}{log}", style=COLOURS[run.state]))
    return [*lines, *[Text(f"waiting {note}: {', '.join(names)}", style="dim") for note, names in waiting.items()]]


def _row(run: Standing) -> list[str]:
    colour, left = COLOURS[run.state], run.seconds_left
    return [
        escape(run.run),
        f"[{colour}]{run.state}[/]",
        run.phase or "-",
        "-" if run.steps == 0 else f"{run.step:,}" + (f"/{run.steps:,}" if run.steps is not None else ""),
        "-" if run.sparse_fraction is None else percent(run.sparse_fraction),
        "-" if run.loss is None else f"{run.loss:.3f}",
        number(run.perplexity),
        number(run.sparse_perplexity),
        "-" if run.tokens_per_second is None else scaled(run.tokens_per_second),
        duration(left) if left and run.state != "waiting" else "-",
    ]
