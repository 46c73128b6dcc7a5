"""`ssd-lit STAGE ...`: what the workflow calls, and a person can call too.

Libraries that take seconds to import are imported by the stages that need them.
"""

import argparse
import atexit
import gc
import logging
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, get_args

from ssd_lit.config import ConfigError
from ssd_lit.moe.names import Construction, PosthocRouter
from ssd_lit.pipeline import data, exchange, publish, train
from ssd_lit.records import ALL_STAGES
from ssd_lit.support import signals

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
    except signals.Preempted as asked:
        _say(f"{title}: stopped by {asked}; start it again to go on")
        return signals.STATUS
    except KeyboardInterrupt:
        _say(f"{title}: interrupted")
        return 130
    _say(f"{title}: done in {time.monotonic() - began:.1f} s; {outcome}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ssd-lit", description="Switchable Sparse-Dense Learning, stage by stage. `snakemake` runs them all.",
        epilog="An experiment, in order: configs, prepare, tokenizer, encode; train for each run; then summarise, "
        "figures, report. `ssd-lit COMMAND --help` tells more.",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="stage", metavar="COMMAND", required=True)

    def add(name: str, run: Stage, text: str, *places: tuple[str, str]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        for place, meaning in places:
            command.add_argument(place, help=meaning, type=Path)
        command.add_argument("--threads", type=_threads, help="CPU threads (of a run what its config says, else all)")
        command.set_defaults(run=run, shown=[place for place, _ in places])
        return command

    data_dir = ("data_dir", "a folder under results/data that holds config.yaml")
    run_dir = ("run_dir", "results/EXPERIMENT/runs/RUN, which holds config.yaml")
    exp_dir = ("exp_dir", "results/EXPERIMENT, which holds experiment.yaml")
    results = ("results", "the results folder")

    configs = add(
        "configs", lambda a: data.configs(a.experiment, a.results),
        "Check an experiment and write the resolved config of its data and runs.",
        ("experiment", "a YAML file under configs/"),
    )  # fmt: skip
    configs.add_argument("--results", type=Path, default=Path("results"), help="the results folder (results)")
    add("prepare", lambda a: data.prepare(a.data_dir), "Read, clean, deduplicate and split the text.", data_dir)
    add("tokenizer", lambda a: data.tokenizer(a.data_dir), "Train the tokenizer on the training documents.", data_dir)
    add("encode", lambda a: data.encode(a.data_dir), "Encode all documents into blocks of tokens.", data_dir)
    training = add(
        "train", lambda a: train.train(a.run_dir, until=a.until, start=a.start, threads=a.threads),
        "Take a run from where it stands to its end, measurements included; goes on where it was interrupted.", run_dir,
    )  # fmt: skip
    training.usage = "%(prog)s RUN_DIR [--until STAGE] [--from STAGE] [--threads N]"
    training.add_argument("--until", metavar="STAGE", help=f"only to the end of this stage ({', '.join(ALL_STAGES)})")
    training.add_argument(
        "--from",
        dest="start",
        metavar="STAGE",
        help="do this stage, or a phase such as 05-sparse, and all behind it anew",
    )
    for name, text in (
        ("evaluate", "Measure the final model of a run into evaluation.json."),
        ("analyse", "Compare a run's snapshots and watch its experts, into analysis/."),
        ("downstream", "Fine-tune on GLUE, score BLiMP: a run's final model on other tasks."),
    ):
        add(name, lambda a: train.measure_run(a.run_dir, a.stage, threads=a.threads), text, run_dir)
    _add_moefy(add("moefy", _moefy, "Group the neurons of a checkpoint folder's model into experts (MoEfication)."))
    add("summarise", lambda a: publish.summarise(a.exp_dir), "Write summary.csv, one row a run.", exp_dir)
    add("figures", lambda a: publish.figures(a.exp_dir), "Draw the figures of an experiment.", exp_dir)
    add("report", lambda a: publish.report(a.exp_dir), "Write report.html; keep it and the figures in MLflow.", exp_dir)
    add(
        "verify", lambda a: publish.verify(a.folder),
        "Say whether results still match their inputs; exit status 1 if something does not.",
        ("folder", "results/EXPERIMENT/runs/RUN, or results/EXPERIMENT for all runs"),
    )  # fmt: skip
    add("store", lambda a: publish.store(a.results), "Make the MLflow store, once, before jobs share it.", results)
    place = ("place", "results/EXPERIMENT, or results/EXPERIMENT/runs/RUN")
    add("send", lambda a: publish.send(a.place), "Send MLflow the points that it has not got, and the report.", place)
    text = "Write a run's final model as a Hugging Face checkpoint folder."
    out = add("export", lambda a: exchange.export(a.run_dir, a.out), text, run_dir)
    out.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    ui = add("ui", lambda a: publish.ui(a.results, a.port), "Serve the MLflow UI on 127.0.0.1.")
    ui.add_argument("--results", type=Path, default=Path("results"), help="the results folder (results)")
    ui.add_argument("--port", type=_port, default=5000, help="the port (5000)")
    return parser


def _add_moefy(command: argparse.ArgumentParser) -> None:
    command.usage = "%(prog)s --model DIR --experts E --top-k K --out DIR [options]"
    add = command.add_argument
    add("--model", type=Path, metavar="DIR", required=True, help="a gpt2, bert, t5 or llama checkpoint in safetensors")
    add("--experts", type=_positive, metavar="E", required=True, help="experts of one FFN; must divide its neurons")
    add("--top-k", type=_positive, metavar="K", required=True, help="experts a token, unless told otherwise")
    add("--out", type=Path, metavar="DIR", required=True, help="the new folder")
    add("--construction", choices=get_args(Construction), help="how neurons are grouped (kmeans)")
    add("--router", choices=("center", "random", *get_args(PosthocRouter)), help="what chooses experts (center)")
    add("--seed", type=int, help="of construction and router (0)")
    add("--text", type=Path, metavar="FILE", help="what kmeans_activations, coactivation and trained routers look at")
    add("--calibration-tokens", type=_positive, metavar="T", help="tokens of it that are read (8192)")
    command.set_defaults(shown=["model"])


def _moefy(args: argparse.Namespace) -> str:
    names = ("model", "experts", "top_k", "out", "construction", "router", "seed", "text", "calibration_tokens")
    given = {name: value for name in (*names, "threads") if (value := getattr(args, name)) is not None}
    return exchange.moefy(**given)


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < float(text) <= 1e9):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1 to a billion")
    return int(text)


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
