"""`ssd-lit plan`: prints what an experiment will take."""

import os
from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from tqdm import tqdm

from ssd_lit.config import find_experiment, load_experiment, parse_changes
from ssd_lit.pipeline.forecast import Forecast, Outlook, device_bytes, side_by_side
from ssd_lit.report.formatting import duration, percent, scaled
from ssd_lit.support.console import console, table
from ssd_lit.support.devices import count_gpus


def plan(name: str, results: Path, settings: Sequence[str], repeats: int) -> None:
    """Print runs, tokens, FLOPs, parameters and memory of an experiment, and hours after `repeats` timed steps.

    Writes nothing. Raises ConfigError for a mistake in the experiment.
    """
    from ssd_lit.pipeline.data import check_data

    experiment = load_experiment(find_experiment(name), parse_changes(settings))
    outlook = Outlook(experiment, results)
    if outlook.train_tokens is None or not outlook.train_tokens[1]:
        check_data(experiment)
    out = console()
    _show_costs(outlook)
    out.print(_text(outlook))
    flops = sum(run.flops for run in outlook.runs.values())
    out.print(f"All runs: {len(outlook.runs)}, {scaled(flops, 'FLOPs')}, first phases that runs share counted once.")
    if any(run.config.method == "ssd" and run.config.switching.switch_points is None for run in outlook.runs.values()):
        out.print("Dense phases of SSD are taken at their ceilings: a pattern that settles sooner ends them sooner.")
    for arm, runs in _by_arm(outlook).items():
        wanted, total = runs[0].config.switching.sparse_fraction, runs[0].total
        adaptive = runs[0].config.method == "ssd" and runs[0].config.switching.switch_points is None
        if adaptive and total.sparse_steps < (wanted - 0.01) * total.steps:
            room = percent(total.sparse_steps / total.steps)
            out.print(f"{escape(arm)}: switching.sparse_fraction {wanted}, but its phases leave room for {room}.")
    if repeats:
        _show_hours(outlook, repeats)


def _show_costs(outlook: Outlook) -> None:
    numbers = ("runs", "steps", "sparse", "tokens", "FLOPs", "parameters", "memory a device")
    shown = table("arm", "method", *numbers, numbers=numbers, title=escape(outlook.experiment.experiment))
    memory = device_bytes()
    for arm, runs in _by_arm(outlook).items():
        config, total = runs[0].config, runs[0].total
        trains = total.steps > 0
        shown.add_row(
            escape(arm),
            config.method,
            str(len(runs)),
            f"{total.steps:,}",
            percent(total.sparse_steps / total.steps) if trains else "-",
            scaled(total.tokens) if trains else "-",
            scaled(total.flops) if total.flops else "-",
            scaled(outlook.parameters(config)),
            f"{outlook.memory(config, memory) / 2**30:.2f} GiB" if trains else "-",
        )
    console().print(shown)


def _text(outlook: Outlook) -> str:
    """How much text there is, and how often the longest run reads it."""
    tokens = outlook.train_tokens
    if tokens is None:
        return "Text: not encoded yet, and its size is not known before."
    number, counted = tokens
    read = max(run.total.tokens for run in outlook.runs.values())
    how = "" if counted else "about "
    return (
        f"Text: {how}{scaled(number)} training tokens; the longest run reads it {how}{read / max(1, number):.1f} times."
    )


def _show_hours(outlook: Outlook, repeats: int) -> None:
    out = console()
    where = f"one GPU of {count_gpus()}" if count_gpus() else f"CPU, {os.cpu_count()} cores"
    out.print(f"\nTiming {repeats} steps of each kind on this machine ({where}), on random tokens ...")
    shown = table("run", "training", numbers=("training",))
    timing = outlook.step_seconds(repeats)
    seconds = dict(tqdm(timing, total=len(outlook.runs), unit="run", disable=None, leave=False))
    for name, one in seconds.items():
        shown.add_row(escape(name), duration(one) if one else "-")
    out.print(shown)
    total = sum(seconds.values())
    together = min(side_by_side(next(iter(outlook.runs.values())).config), sum(map(bool, seconds.values())) or 1)
    line = f"Training: {duration(total)} one run after another"
    if together > 1:
        line += f", at best {duration(max(total / together, *seconds.values()))} with {together} side by side"
    out.print(f"{line}. Text, compiling, validation, checkpoints and measurements come on top.")


def _by_arm(outlook: Outlook) -> dict[str, list[Forecast]]:
    arms: dict[str, list[Forecast]] = {}
    for run in outlook.runs.values():
        arms.setdefault(run.config.arm, []).append(run)
    return arms
