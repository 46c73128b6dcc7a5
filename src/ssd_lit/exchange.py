"""Stages between Hugging Face checkpoint folders and ours: models come in and get experts, and go out whole."""

import argparse
import os
from pathlib import Path
from typing import Any, Literal, get_args

from ssd_lit import stages
from ssd_lit.config import ConfigError, Construction, MoEConfig, TrainedRouter, load_run
from ssd_lit.layout import data_dir, read_chain

MODEL_OPTIONS = ("model", "experts", "top_k", "out", "construction", "router", "seed", "text", "calibration_tokens")
"""What belongs to `moefy --model` alone; the first four must be given."""


def moefy(args: argparse.Namespace) -> str:
    """MoEfy a phase of a run, or the model of a checkpoint folder."""
    given = {name: value for name in MODEL_OPTIONS if (value := getattr(args, name)) is not None}
    if args.run_dir is None:
        missing = [_option(name) for name in MODEL_OPTIONS[:4] if name not in given]
        if missing:
            raise ConfigError(f"missing: {', '.join(missing)}; give RUN_DIR PHASE, or --model with all it needs")
        return _moefy_model(args.threads, **given)
    if given:
        raise ConfigError(
            f"{_option(next(iter(given)))}: not with RUN_DIR, whose config decides; give one or the other"
        )
    if args.phase is None:
        raise ConfigError("missing: PHASE; give RUN_DIR PHASE, or --model with all it needs")
    return stages.moefy(args)


def export(args: argparse.Namespace) -> str:
    """Write the final model of a run as a checkpoint folder, with the tokenizer of its data."""
    from ssd_lit.training.export import export_run

    config = load_run(args.run_dir / "config.yaml")
    chain = read_chain(args.run_dir, config.method)
    data = data_dir(args.run_dir.absolute().parents[2], config.data)
    if export_run(args.run_dir, config, chain, data, args.out):
        return f"{args.out}: {config.moe.experts} experts a layer, {config.moe.top_k} a token in sparse mode"
    return f"{args.out}: dense only; `ssd-lit moefy --model {args.out}` gives it experts"


def _moefy_model(
    threads: int | None,
    *,
    model: Path,
    experts: int,
    top_k: int,
    out: Path,
    construction: Construction = "kmeans",
    router: Literal["center", "random"] | TrainedRouter = "center",
    **calibration: Any,
) -> str:
    if top_k > experts:
        raise ConfigError(f"--top-k {top_k} is more than --experts {experts}; allowed: 1 to {experts}")
    import torch

    from ssd_lit.training.moefy_folder import moefy_folder

    torch.set_num_threads(threads or os.cpu_count() or 1)
    chosen: Any = {"trained_router" if router in get_args(TrainedRouter) else "router": router}
    moe = MoEConfig(experts=experts, top_k=top_k, construction=construction, **chosen)
    moefy_folder(model, out, moe, **calibration, progress=print)
    return f"{out}: {experts} experts a layer, {top_k} a token in sparse mode"


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
