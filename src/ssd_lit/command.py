"""What all commands of ssd-lit share: how they are declared, what they tell, and their exit status."""

import atexit
import gc
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, NoReturn

from typer import Exit, Option, Typer

from ssd_lit import __version__
from ssd_lit.support import signals
from ssd_lit.support.processes import this_process

Threads = Annotated[
    int | None, Option(min=1, max=1024, metavar="N", help="CPU threads (of a run what its config says, else all)")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"ssd-lit {__version__}")
        raise Exit


Version = Annotated[bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]

app = Typer(
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 100},
    help="Switchable Sparse-Dense Learning, stage by stage. `snakemake` runs them all.",
    epilog="An experiment, in order: configs, prepare, tokenizer, encode; train for each run; then summarise, figures, "
    "report. `ssd-lit COMMAND --help` tells more.",
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 failed with a message, 2 called wrongly, 75 stopped."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app(arguments, prog_name="ssd-lit")
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@app.callback()
def _options(version: Version = False) -> None:
    """Hold the options that stand before a command."""


def stage(function: Callable[..., str]) -> Callable[..., None]:
    """Make a command of a function that returns in a line what it came to.

    The command tells when it begins and ends, and has the option --threads beside those of the function.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def command(threads: int | None, **given: Any) -> None:
        _set_threads(threads or os.cpu_count() or 1)
        if not sys.stderr.isatty():
            # Ours too are for a terminal only.
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "threads" in signature.parameters:
            given["threads"] = threads
        place = next(iter(given.values()))
        title = f"{function.__name__} {place}" if isinstance(place, Path | str) else function.__name__
        raise Exit(_run(title, lambda: function(**given)))

    option = inspect.Parameter("threads", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Threads)
    parameters = [one for name, one in signature.parameters.items() if name != "threads"]
    command.__signature__ = signature.replace(parameters=[*parameters, option])  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, "threads": Threads}
    app.command(function.__name__)(command)
    return command


def shown(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function that prints what it was asked for, and does not tell when it begins and ends."""

    name = function.__name__.rstrip("_")

    @wraps(function)
    def command(**given: Any) -> None:
        try:
            function(**given)
        except (ValueError, OSError) as error:
            _say(f"{name}: failed: {error}")
            raise Exit(1) from None
        except (signals.Preempted, KeyboardInterrupt):
            raise Exit(130) from None

    app.command(name)(command)
    return command


def _run(title: str, function: Callable[[], str]) -> int:
    """Run a stage, tell how it went, and return the exit status."""
    began, place = time.monotonic(), this_process()
    if place.is_first:
        _say(f"{title}: begins")
    else:
        title = f"{title}, process {place.rank}"
    try:
        outcome = function()
    except (ValueError, OSError) as error:
        _say(f"{title}: failed: {error}")
        return 1
    except signals.Preempted as asked:
        _say(f"{title}: stopped by {asked}; start it again to go on")
        return signals.STATUS
    except KeyboardInterrupt:
        _say(f"{title}: interrupted")
        return 130
    if place.is_first:
        _say(f"{title}: done in {time.monotonic() - began:.1f} s; {outcome}")
    return 0


def _set_threads(threads: int) -> None:
    # Read by the libraries when they are imported: OpenMP and BLAS, and the tokenizer's own pool.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _say(text: str) -> None:
    # Whoever listened may be gone: a killed workflow's, or stopped by the same signal.
    with suppress(BrokenPipeError):
        print(f"[{time.strftime('%H:%M:%S')}] ssd-lit {text}", file=sys.stderr, flush=True)


def run() -> NoReturn:
    """Entry point of the console script."""
    # The libraries make a million objects that live to the end. Traced seldom while they are imported, and not taken
    # apart one by one as the interpreter ends, they cost two seconds less a stage.
    gc.set_threshold(100_000, 50, 50)
    signals.raise_on_signal()
    status = main()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    os._exit(status)
