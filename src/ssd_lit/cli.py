"""`ssd-lit STAGE ...`: what the workflow calls, and a person can call too.

Libraries that take seconds to import are imported by the stages that need them.
"""

import argparse
import gc
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, get_args

from ssd_lit import exchange, stages, stopping
from ssd_lit.config import ConfigError, Construction, TrainedRouter, load_experiment, load_run

Stage = Callable[[argparse.Namespace], str]


def main(arguments: list[str] | None = None) -> int:
    """Run one stage; returns the exit status: 0 done, 1 failed with a message, 2 called wrongly, 75 stopped."""
    args = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    _set_threads(args.threads or os.cpu_count() or 1)
    if not sys.stderr.isatty():
        # Ours too are for a terminal only.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    told = [str(value) for name in args.shown if (value := getattr(args, name)) is not None]
    title = " ".join([args.stage, *told])
    began = time.monotonic()
    _say(f"{title}: begins")
    try:
        outcome = args.run(args)
    except (ConfigError, ValueError, OSError) as error:
        _say(f"{title}: failed: {error}")
        return 1
    except stopping.Stopped as asked:
        _say(f"{title}: stopped by {asked}; start it again to go on")
        return stopping.STATUS
    except KeyboardInterrupt:
        _say(f"{title}: interrupted")
        return 130
    _say(f"{title}: done in {time.monotonic() - began:.1f} s; {outcome}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssd-lit", description="Switchable Sparse-Dense Learning, stage by stage. `snakemake` runs them all.",
        epilog="The stages of an experiment, in order: configs, prepare, tokenizer, encode; for each run phases "
        "(train, moefy, route), evaluate, analyse, downstream; then summarise, figures, report. `ssd-lit run` does all "
        "of it where Snakemake is not installed. `ssd-lit STAGE --help` tells more.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="stage", metavar="STAGE", required=True)

    def add(name: str, run: Stage, text: str, *places: tuple[str, str]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        for place, meaning in places:
            command.add_argument(place, help=meaning, type=str if place == "phase" else Path)
        command.add_argument("--threads", type=_threads, help="CPU threads (of a run what its config says, else all)")
        command.set_defaults(run=run, shown=[place for place, _ in places])
        return command

    data = ("data_dir", "a folder under results/data that holds config.yaml")
    run_dir = ("run_dir", "results/EXPERIMENT/runs/RUN, which holds config.yaml")
    phase = ("phase", "a phase by its folder name, such as 02-sparse; the phases before it must be done")
    exp_dir = ("exp_dir", "results/EXPERIMENT, which holds experiment.yaml")
    results = ("results", "the results folder")

    configs = add(
        "configs", stages.configs, "Check an experiment and write the resolved config of its data and runs.",
        ("experiment", "a YAML file under configs/"),
    )  # fmt: skip
    configs.add_argument("--results", type=Path, default=Path("results"), help="the results folder (results)")
    whole = add(
        "run", _run_experiment, "Run a whole experiment, from text to report, without Snakemake; goes on where it was.",
        ("experiment", "a YAML file under configs/"),
    )  # fmt: skip
    whole.add_argument("--results", type=Path, default=Path("results"), help="the results folder (results)")
    whole.add_argument("--jobs", type=_positive, default=1, help="runs at a time (1)")
    whole.add_argument("--minutes", type=_minutes, help="save and stop after so many; exit status 75")
    add("finish", _finish, "Take a run to its end: every phase and measurement that is not there yet.", run_dir)
    add("prepare", stages.prepare, "Read, clean, deduplicate and split the text into documents/.", data)
    add("tokenizer", stages.tokenizer, "Train the tokenizer on the training documents into tokenizer/.", data)
    add("encode", stages.encode, "Encode all documents into memory-mapped blocks of tokens in tokens/.", data)
    add("train", stages.train, "Train one dense or sparse phase; goes on where it was interrupted.", run_dir, phase)
    _add_moefy(add("moefy", exchange.moefy, "Group the neurons of a model into experts (MoEfication)."), run_dir, phase)
    add("route", stages.route, "Train the routers of a MoEfied model, and no other weight.", run_dir, phase)
    add("evaluate", stages.evaluate, "Measure the final model of a run into evaluation.json.", run_dir)
    add("analyse", stages.analyse, "Compare a run's snapshots and watch its experts, into analysis/.", run_dir)
    add("downstream", stages.downstream, "Fine-tune on GLUE, score BLiMP: a run's final model on other tasks.", run_dir)
    add("summarise", stages.summarise, "Write summary.csv, one row a run.", exp_dir)
    add("figures", stages.figures, "Draw the figures of an experiment.", exp_dir)
    add("report", stages.report, "Write report.html, and keep report and figures in MLflow.", exp_dir)
    add(
        "verify", stages.verify, "Say whether results still match their inputs; exit status 1 if something does not.",
        ("folder", "results/EXPERIMENT/runs/RUN, or results/EXPERIMENT for all runs"),
    )  # fmt: skip
    add("store", stages.store, "Make the MLflow store, once, before jobs share it.", results)
    place = ("place", "results/EXPERIMENT, or results/EXPERIMENT/runs/RUN")
    add("send", stages.send, "Send MLflow the points that it has not got, and the report.", place)
    out = add("export", exchange.export, "Write a run's final model as a Hugging Face checkpoint folder.", run_dir)
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    ui = add("ui", stages.ui, "Serve the MLflow UI on 127.0.0.1.")
    ui.add_argument("--results", type=Path, default=Path("results"), help="the results folder (results)")
    ui.add_argument("--port", type=_port, default=5000, help="the port (5000)")
    return parser


def _add_moefy(command: argparse.ArgumentParser, *places: tuple[str, str]) -> None:
    """The two forms of `moefy`: a phase of a run, which its config describes, or any checkpoint folder."""
    command.usage = "%(prog)s RUN_DIR PHASE | --model DIR --experts E --top-k K --out DIR [options]"
    for place, meaning in places:
        command.add_argument(place, nargs="?", help=meaning, type=str if place == "phase" else Path)
    add = command.add_argument_group("a checkpoint folder instead of a run").add_argument
    add("--model", type=Path, metavar="DIR", help="a gpt2, bert, t5 or llama checkpoint in safetensors")
    add("--experts", type=_positive, metavar="E", help="experts of one FFN; must divide its neurons")
    add("--top-k", type=_positive, metavar="K", help="experts a token in sparse mode, unless told otherwise")
    add("--out", type=Path, metavar="DIR", help="the new folder")
    add("--construction", choices=get_args(Construction), help="how neurons are grouped (kmeans)")
    add("--router", choices=("center", "random", *get_args(TrainedRouter)), help="what chooses experts (center)")
    add("--seed", type=int, help="of construction and router (0)")
    add("--text", type=Path, metavar="FILE", help="what kmeans_activations, coactivation and trained routers look at")
    add("--calibration-tokens", type=_positive, metavar="T", help="tokens of it that are read (8192)")
    command.set_defaults(shown=[*(place for place, _ in places), "model"])


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < float(text) <= 1e9):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to a billion")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes")
    return minutes


def _threads(text: str) -> int:
    if _positive(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text} is too many; allowed: 1 to 1024")
    return int(text)


def _port(text: str) -> int:
    if _positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port; allowed: 1 to 65535")
    return int(text)


def _set_threads(threads: int) -> None:
    # Read by the libraries when they are imported: OpenMP and BLAS, and the tokenizer's own pool.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _say(text: str) -> None:
    # Whoever listened may be gone: a killed workflow's, or stopped by the same signal.
    with suppress(BrokenPipeError):
        print(f"[{time.strftime('%H:%M:%S')}] ssd-lit {text}", file=sys.stderr, flush=True)


def _run_experiment(args: argparse.Namespace) -> str:
    from ssd_lit.conductor import conduct

    experiment = load_experiment(args.experiment)
    stages.configs(args)
    conduct(experiment, args.results, args.jobs, None if args.minutes is None else 60 * args.minutes, _say)
    return str(args.results / experiment.experiment / "report.html")


def _finish(args: argparse.Namespace) -> str:
    """One stage after the other in this process: what it has imported and compiled serves them all."""
    from ssd_lit.chain import next_stage

    config, done = load_run(args.run_dir / "config.yaml"), list[list[str]]()
    while (stage := next_stage(args.run_dir, config)) is not None:
        if stage in done:
            raise ConfigError(f"{' '.join(stage)}: its result does not match what it was made from")
        # A stage leaves a phase with a record as it is, whatever it was made from.
        for phase in stage[2:]:
            (args.run_dir / "phases" / phase / "phase.json").unlink(missing_ok=True)
        # Each of several processes that train together is started with the command line of the first.
        command = [sys.executable, "-m", "ssd_lit", *stage]
        status = main(stage) if config.training.devices == 1 else subprocess.run(command, check=False).returncode
        if status == stopping.STATUS:
            raise stopping.Stopped(stopping.asked() or "a signal")
        if status:
            raise ConfigError(f"{stage[0]} failed, as told above")
        done.append(stage)
        # Trainers and models hold each other; the next ones need the room.
        gc.collect()
    return f"{len(done)} stages"


def run() -> NoReturn:
    """Entry point of the console script."""
    # The libraries make a million objects that live to the end. Traced seldom while they are imported, and not once
    # more as the interpreter ends, they cost two seconds less a stage.
    gc.set_threshold(100_000, 50, 50)
    stopping.obey()
    status = main()
    gc.freeze()
    sys.exit(status)
