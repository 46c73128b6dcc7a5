"""`ssd-lit COMMAND ...`: what the workflow calls, and a person can call too.

Every command imports what it needs: the settings take a quarter of a second, other libraries seconds.
"""

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
from typing import Annotated, Any, Literal, NoReturn

from typer import Argument, Exit, Option, Typer

from ssd_lit import __version__
from ssd_lit.moe.names import Construction, Mode, UntrainedRouter
from ssd_lit.stages import ALL_STAGES
from ssd_lit.support import signals
from ssd_lit.support.processes import this_process

Experiment = Annotated[str, Argument(metavar="EXPERIMENT", help="a YAML file, or a name that `ssd-lit list` shows")]
DataDir = Annotated[Path, Argument(metavar="DATA_DIR", help="a folder under results/data, which holds config.yaml")]
RunDir = Annotated[Path, Argument(metavar="RUN_DIR", help="results/EXPERIMENT/runs/RUN, which holds config.yaml")]
ExpDir = Annotated[Path, Argument(metavar="EXP_DIR", help="results/EXPERIMENT, which holds experiment.yaml")]
Place = Annotated[Path, Argument(metavar="PLACE", help="results/EXPERIMENT, or results/EXPERIMENT/runs/RUN")]
Results = Annotated[Path, Option(help="the results folder")]
Settings = Annotated[
    list[str] | None, Argument(metavar="KEY=VALUE", help="settings to change, such as training.steps=100")
]
Threads = Annotated[
    int | None, Option(min=1, max=1024, metavar="N", help="CPU threads (of a run what its config says, else all)")
]
MOST = 10**9


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


@shown
def init(
    folder: Annotated[Path, Argument(metavar="DIR", help="the new folder")],
    text: Annotated[
        list[Path] | None, Option(metavar="PATH", help="a file or folder of text; may be repeated (DIR/text)")
    ] = None,
    size: Annotated[
        Literal["cpu", "gpu"] | None, Option(help="of the model: for a CPU or for a GPU (what this machine has)")
    ] = None,
) -> None:
    """Make a project of your own: a commented experiment, a Snakefile, a Makefile, profiles."""
    from ssd_lit.pipeline import project

    print(project.init(folder, text or [], size), end="")


@shown
def list_() -> None:
    """Show the experiments that there are, here and as shipped."""
    from ssd_lit.pipeline import project

    project.show_experiments()


@shown
def plan(
    experiment: Experiment,
    settings: Settings = None,
    *,
    results: Results = Path("results"),
    steps: Annotated[
        int, Option(min=0, max=1000, help="steps of each kind that are timed on this machine; 0: none")
    ] = 3,
) -> None:
    """Say what an experiment will take before anything runs: runs, tokens, FLOPs, parameters, memory, hours."""
    from ssd_lit.pipeline import estimate

    estimate.plan(experiment, results, settings or [], steps)


@stage
def configs(experiment: Experiment, settings: Settings = None, *, results: Results = Path("results")) -> str:
    """Check an experiment and write the resolved config of its data and runs.

    Settings are laid over the experiment: training.steps=100 arms.ssd.switching.tau=0.9. Values are YAML; null drops
    an arm.
    """
    from ssd_lit.pipeline import data

    return data.configs(experiment, results, settings or [])


@stage
def prepare(data_dir: DataDir) -> str:
    """Read, clean, deduplicate and split the text."""
    from ssd_lit.pipeline import data

    return data.prepare(data_dir)


@stage
def tokenizer(data_dir: DataDir) -> str:
    """Train the tokenizer on the training documents."""
    from ssd_lit.pipeline import data

    return data.tokenizer(data_dir)


@stage
def encode(data_dir: DataDir) -> str:
    """Encode all documents into blocks of tokens."""
    from ssd_lit.pipeline import data

    return data.encode(data_dir)


@stage
def train(
    run_dir: RunDir,
    settings: Settings = None,
    *,
    until: Annotated[
        str | None, Option(metavar="STAGE", help=f"only to the end of this stage ({', '.join(ALL_STAGES)})")
    ] = None,
    start: Annotated[
        str | None,
        Option("--from", metavar="STAGE", help="do this stage, or a phase such as 05-sparse, and all behind it anew"),
    ] = None,
    threads: Threads = None,
) -> str:
    """Take a run from where it stands to its end, measurements included; goes on where it was interrupted.

    Settings such as training.steps=100 are written into the run's config.yaml, and what was made from other settings is
    made anew. They stay until `ssd-lit configs` or snakemake writes the experiment's again.
    """
    from ssd_lit.pipeline import train as training

    return training.train(run_dir, settings=settings or [], until=until, start=start, threads=threads)


@shown
def status(
    exp_dir: Annotated[Path | None, Argument(metavar="EXP_DIR", help="results/EXPERIMENT (all of them)")] = None,
    *,
    watch: Annotated[bool, Option("--watch", help="go on until all runs are done")] = False,
    results: Results = Path("results"),
) -> None:
    """Show where every run stands: its state, phase, step, loss, time left, and why it stopped."""
    from ssd_lit.pipeline import status as board

    board.status(exp_dir, results, watch=watch)


@stage
def evaluate(run_dir: RunDir, threads: Threads = None) -> str:
    """Measure the final model of a run into evaluation.json."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "evaluate", threads=threads)


@stage
def analyse(run_dir: RunDir, threads: Threads = None) -> str:
    """Compare a run's snapshots and watch its experts, into analysis/."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "analyse", threads=threads)


@stage
def downstream(run_dir: RunDir, threads: Threads = None) -> str:
    """Fine-tune on GLUE, score BLiMP: a run's final model on other tasks."""
    from ssd_lit.pipeline import train as training

    return training.measure_run(run_dir, "downstream", threads=threads)


@stage
def moefy(
    model: Annotated[Path, Option(metavar="DIR", help="a checkpoint of a supported family in safetensors")],
    experts: Annotated[int, Option(min=1, max=MOST, metavar="E", help="experts of one FFN; must divide its neurons")],
    top_k: Annotated[int, Option(min=1, max=MOST, metavar="K", help="experts a token, unless told otherwise")],
    out: Annotated[Path, Option(metavar="DIR", help="the new folder")],
    construction: Annotated[Construction, Option(help="how neurons are grouped")] = "kmeans",
    router: Annotated[UntrainedRouter, Option(help="what chooses experts")] = "center",
    seed: Annotated[int, Option(metavar="N", help="of construction and router")] = 0,
    text: Annotated[
        Path | None,
        Option(metavar="FILE", help="what kmeans_activations, coactivation and trained routers look at"),
    ] = None,
    calibration_tokens: Annotated[int, Option(min=1, max=MOST, metavar="T", help="tokens of it that are read")] = 8192,
    threads: Threads = None,
) -> str:
    """Group the neurons of a checkpoint folder's model into experts (MoEfication)."""
    from ssd_lit.pipeline import exchange

    return exchange.moefy(
        model=model,
        experts=experts,
        top_k=top_k,
        out=out,
        construction=construction,
        router=router,
        seed=seed,
        text=text,
        calibration_tokens=calibration_tokens,
        threads=threads,
    )


@stage
def summarise(exp_dir: ExpDir) -> str:
    """Write summary.csv, one row a run."""
    from ssd_lit.pipeline import publish

    return publish.summarise(exp_dir)


@stage
def figures(exp_dir: ExpDir) -> str:
    """Draw the figures of an experiment."""
    from ssd_lit.pipeline import publish

    return publish.figures(exp_dir)


@stage
def report(exp_dir: ExpDir) -> str:
    """Write report.html; keep it and the figures in MLflow."""
    from ssd_lit.pipeline import publish

    return publish.report(exp_dir)


@stage
def verify(folder: Place) -> str:
    """Say whether results still match their inputs; exit status 1 if something does not."""
    from ssd_lit.pipeline import publish

    return publish.verify(folder)


@stage
def store(results: Annotated[Path, Argument(metavar="RESULTS", help="the results folder")]) -> str:
    """Make the MLflow store, once, before jobs share it."""
    from ssd_lit.pipeline import publish

    return publish.store(results)


@stage
def send(place: Place) -> str:
    """Send MLflow the points that it has not got, and the report."""
    from ssd_lit.pipeline import publish

    return publish.send(place)


@stage
def export(run_dir: RunDir, out: Annotated[Path, Option(metavar="DIR", help="the new folder")]) -> str:
    """Write a run's final model as a Hugging Face checkpoint folder."""
    from ssd_lit.pipeline import exchange

    return exchange.export(run_dir, out)


@stage
def generate(
    model: Annotated[Path, Option(metavar="DIR", help="a folder that moefy or export wrote, with a tokenizer")],
    prompt: Annotated[str, Option(metavar="TEXT", help="what the text begins with")],
    mode: Annotated[Mode, Option(help="how FFNs are computed")] = "dense",
    top_k: Annotated[
        int | None, Option(min=1, max=MOST, metavar="K", help="experts a token, else what the folder says")
    ] = None,
    new_tokens: Annotated[int, Option(min=1, max=MOST, metavar="N", help="tokens to add at most")] = 100,
    temperature: Annotated[float, Option(min=0, help="0 takes the likeliest token; above, tokens are drawn")] = 0.0,
    top_p: Annotated[float, Option(help="draw from the likeliest tokens that have this probability together")] = 1.0,
    seed: Annotated[int, Option(metavar="N", help="of the draws")] = 0,
    threads: Threads = None,
) -> str:
    """Continue a text with a folder's model, in either mode, and print it as it comes."""
    from ssd_lit.pipeline import exchange

    return exchange.generate(
        model=model,
        prompt=prompt,
        mode=mode,
        top_k=top_k,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        threads=threads,
    )


@stage
def ui(
    port: Annotated[int, Option(min=1, max=65535, help="the port")] = 5000,
    results: Results = Path("results"),
) -> str:
    """Serve the MLflow UI on 127.0.0.1."""
    from ssd_lit.pipeline import publish

    return publish.ui(results, port)


@stage
def schema(
    out: Annotated[Path, Option(metavar="FILE", help="the JSON schema")] = Path("configs/schema.json"),
    page: Annotated[Path, Option(metavar="FILE", help="the reference page")] = Path("docs/settings.md"),
) -> str:
    """Write the JSON schema of an experiment's YAML, and the reference page of all settings."""
    from ssd_lit.pipeline import data

    return data.schema(out, page)


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
