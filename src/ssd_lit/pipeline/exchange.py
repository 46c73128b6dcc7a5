"""Between Hugging Face checkpoint folders and ours: models come in and get experts, and go out whole."""

import os
import sys
from pathlib import Path
from typing import Any, get_args

from ssd_lit.config import ConfigError, MoEConfig
from ssd_lit.moe.names import Construction, Mode, PosthocRouter, UntrainedRouter
from ssd_lit.run import Run


def export(folder: Path, out: Path, threshold: float | None = None) -> str:
    """Write the final model of a run as a checkpoint folder, with the tokenizer of its data."""
    from ssd_lit.evaluation.scores import score_tables
    from ssd_lit.huggingface.export import export_run

    run = Run.open(folder)
    if export_run(run, out, threshold=threshold, scores=score_tables(run)):
        return f"{out}: {run.config.moe.experts} experts a layer, {_choice(run.config.moe.top_k, threshold)}"
    return f"{out}: dense only; `ssd-lit moefy --model {out}` gives it experts"


def moefy(
    *,
    model: Path,
    experts: int,
    top_k: int,
    out: Path,
    construction: Construction = "kmeans",
    router: UntrainedRouter = "center",
    seed: int = 0,
    text: Path | None = None,
    calibration_tokens: int = 8192,
    threshold: float | None = None,
    threads: int | None = None,
) -> str:
    """Write the model of a checkpoint folder into a new one, its neurons grouped into experts."""
    if top_k > experts:
        raise ConfigError(f"--top-k {top_k} is more than --experts {experts}; allowed: 1 to {experts}")
    import torch

    from ssd_lit.huggingface.moefy import moefy_folder

    torch.set_num_threads(threads or os.cpu_count() or 1)
    chosen: Any = {"posthoc_router" if router in get_args(PosthocRouter) else "router": router}
    moe = MoEConfig(experts=experts, top_k=top_k, construction=construction, **chosen)
    moefy_folder(
        model,
        out,
        moe,
        seed=seed,
        text=text,
        calibration_tokens=calibration_tokens,
        threshold=threshold,
        progress=print,
    )
    return f"{out}: {experts} experts a layer, {_choice(top_k, threshold)}"


def generate(
    *,
    model: Path,
    prompt: str,
    mode: Mode = "dense",
    top_k: int | None = None,
    threshold: float | None = None,
    new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    threads: int | None = None,
) -> str:
    """Write a prompt and what a folder's model continues it with to standard output, as it comes."""
    import torch

    from ssd_lit.data.tokenizer import load_tokenizer
    from ssd_lit.huggingface.folder import open_folder
    from ssd_lit.models.generation import Generator
    from ssd_lit.models.sampling import Sampling

    torch.set_num_threads(threads or os.cpu_count() or 1)
    sampling, tokenizer = Sampling(temperature, top_p), load_tokenizer(model)
    opened = open_folder(model, mode=mode, top_k=top_k, threshold=threshold)
    generator = Generator(opened.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, sampling=sampling)
    torch.manual_seed(seed)
    length = 0
    sys.stdout.write(prompt)
    for piece in generator.stream(prompt, new_tokens):
        sys.stdout.write(piece)
        sys.stdout.flush()
        length += len(piece)
    sys.stdout.write("\n")
    sys.stdout.flush()
    k = generator.mean_k
    return f"{length} characters in {mode} mode" + ("" if k is None else f", on average {k:.2f} experts a token")


def _choice(top_k: int, threshold: float | None) -> str:
    if threshold is None:
        return f"{top_k} a token in sparse mode"
    return f"those with {threshold} of a token's best score in sparse mode"
