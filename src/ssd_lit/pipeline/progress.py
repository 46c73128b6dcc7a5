"""Where the runs of an experiment stand, read from the files that they leave; nothing is written."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from ssd_lit.config import Experiment, RunConfig, load_resolved
from ssd_lit.evaluation.metrics import perplexity
from ssd_lit.paths import data_dir, phase_name, results_of, stage_path
from ssd_lit.records import FIRST_MODE, Ending, PhaseRecord, read_phases
from ssd_lit.stages import MEASUREMENTS, training_stages
from ssd_lit.support.files import read_json_checked
from ssd_lit.support.locks import holder_of
from ssd_lit.tracking.metrics_log import last_points

State = Literal["done", "running", "waiting", "stopped", "failed"]
DATA_STAGES = {"prepare": "documents/card.json", "tokenizer": "tokenizer/digests.json", "encode": "tokens/index.json"}
TAIL = 100_000
"""Bytes of metrics.jsonl that are read, from its end: fifty points and more."""
_PAUSE = 10
"""Between two points more than so many times the usual lie, the run was stopped."""


@dataclass(frozen=True)
class Standing:
    """A run as it stands. None is what is not known, or not yet."""

    run: str
    state: State
    note: str
    """What it waits for, where it runs, or why it ended."""
    log: Path | None = None
    """Of a run that failed."""
    phase: str | None = None
    """The phase that it is in; after the training the measurement."""
    step: int = 0
    steps: int | None = None
    sparse_fraction: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    """On the validation text; of a final model in dense mode."""
    sparse_perplexity: float | None = None
    """Of a final model in sparse mode."""
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    """Seconds of a step lately, with what is done between steps."""

    @property
    def seconds_left(self) -> float | None:
        """Until the end of the training."""
        if self.state == "done":
            return 0.0
        return None if self.step_seconds is None or self.steps is None else self.step_seconds * (self.steps - self.step)


@dataclass(frozen=True)
class Progress:
    """An experiment as it stands."""

    name: str
    text: str | None
    """What is done about the text; None once it is encoded."""
    runs: Sequence[Standing]

    @property
    def seconds_left(self) -> float | None:
        """Until all trainings end, if as many runs go on working side by side as do now."""
        known = [run.step_seconds for run in self.runs if run.step_seconds is not None]
        if not known:
            return None
        usual = statistics.mean(known)
        open_runs = [run for run in self.runs if run.state != "done" and run.steps is not None]
        left = [(run.step_seconds or usual) * ((run.steps or 0) - run.step) for run in open_runs]
        together = max(1, sum(run.state == "running" for run in self.runs))
        return max(sum(left) / together, max(left, default=0.0))


def experiment_dirs(results: Path) -> list[Path]:
    """The folders of all experiments under results/, by name."""
    return sorted(path.parent for path in results.glob("*/experiment.yaml"))


def progress_of(exp_dir: Path) -> Progress:
    """Raises ValueError if the folder is no experiment's, or its settings are damaged."""
    if not (exp_dir / "experiment.yaml").exists():
        raise ValueError(f"{exp_dir}: no experiment (no experiment.yaml); `ssd-lit list` shows those that can be run")
    experiment = _experiment(exp_dir / "experiment.yaml", (exp_dir / "experiment.yaml").stat().st_mtime_ns)
    text = _text(data_dir(results_of(exp_dir, experiment.data), experiment.data))
    return Progress(experiment.experiment, text, [*_standings(exp_dir, experiment, has_text=text is None)])


@lru_cache(maxsize=64)
def _experiment(path: Path, _written: int) -> Experiment:
    """The experiment in a file, read once as long as that is not written anew."""
    return load_resolved(path)


def _text(data: Path) -> str | None:
    missing = [stage for stage, file in DATA_STAGES.items() if not (data / file).exists()]
    if not missing:
        return None
    match holder_of(data):
        case name, True:
            return f"running: {name}"
        case name, False:
            return f"stopped, killed: {name}"
    log = data / "logs" / f"{missing[0]}.log"
    failure = _failure(log)
    return f"failed: {failure}; log: {log}" if failure else f"waiting for its turn: {missing[0]}"


def _standings(exp_dir: Path, experiment: Experiment, *, has_text: bool) -> Iterator[Standing]:
    configs = {config.name: config for config in experiment.runs()}
    for name, config in configs.items():
        folder = exp_dir / "runs" / name
        needed = _needed(folder, config, configs)
        try:
            yield _standing(folder, config, [] if has_text else ["the text"], needed)
        except ValueError as error:
            yield Standing(name, "failed", str(error))


def _standing(folder: Path, config: RunConfig, text: Sequence[str], runs: Sequence[str]) -> Standing:
    """A run that waits for `text` or other `runs`, unless it is at work or done."""
    stage = next((stage for stage in _stages(folder, config) if not _is_done(folder, stage)), None)
    state, note = _state(folder, stage, text or runs)
    phases = read_phases(folder, config.method)
    points = _points(folder / "metrics.jsonl")
    trained = [point for point in points if "train/loss" in point["values"]]
    last = trained[-1] if trained else None
    step = last["step"] if last else phases[-1].last_step if phases else 0
    final = _final(folder)
    # How many steps another run's FLOPs pay for is found out as the run begins.
    steps = config.training.steps if config.matches is None else step if stage is None else None
    return Standing(
        run=config.name,
        state=state,
        note=note,
        log=_log(folder) if state == "failed" else None,
        phase=_phase(config, phases, stage, state),
        step=step,
        steps=0 if config.method == "posthoc" else steps,
        sparse_fraction=_sparse_fraction(config, phases, step),
        loss=last["values"]["train/loss"] if last else None,
        perplexity=final.get("dense") or _latest(points, "validation/perplexity"),
        sparse_perplexity=final.get("sparse"),
        tokens_per_second=last["values"].get("train/tokens_per_second") if last and state == "running" else None,
        step_seconds=_step_seconds(trained),
    )


def _points(path: Path) -> list[dict[str, Any]]:
    return _points_of(path, path.stat().st_size) if path.exists() else []


@lru_cache(maxsize=10_000)
def _points_of(path: Path, _size: int) -> list[dict[str, Any]]:
    """The last points of a file, read once as long as it does not grow: most runs of a large experiment are done."""
    return last_points(path, TAIL)


def _stages(folder: Path, config: RunConfig) -> list[str]:
    measured = [name for name, (settings, _) in MEASUREMENTS.items() if (folder / settings).exists()]
    return [*training_stages(config), *(measured or ["evaluate"])]


def _is_done(folder: Path, stage: str) -> bool:
    path = folder / MEASUREMENTS[stage][1] if stage in MEASUREMENTS else stage_path(folder, stage)
    return path.exists()


def _state(folder: Path, stage: str | None, waits_for: Sequence[str]) -> tuple[State, str]:
    holder = holder_of(folder)
    if holder is not None and holder[1]:
        return "running", holder[0]
    if stage is None:
        return "done", ""
    if holder is not None:
        return "stopped", f"killed: {holder[0]}"
    if (ending := Ending.read(folder)) is not None:
        return ending.how, f"{ending.stage}, {ending.when}: {ending.why}"
    if failure := _failure(folder / "logs" / f"{stage}.log"):
        return "failed", failure
    return "waiting", f"for {' and '.join(waits_for)}" if waits_for else f"for its turn: {stage}"


def _needed(folder: Path, config: RunConfig, configs: Mapping[str, RunConfig]) -> list[str]:
    """The runs that a run goes on from, or whose FLOPs it may spend, and that are not so far yet."""
    last = {name: training_stages(configs[name])[-1] for name in (config.parent_run, config.matches) if name}
    if config.shares_warmup:
        last[config.shares_warmup] = "warmup"
    return [name for name, stage in last.items() if not _is_done(folder.parent / name, stage)]


def _failure(log: Path) -> str | None:
    """Why a stage failed before it began its work, by the last line of its log; None if that says nothing of it."""
    if not log.exists():
        return None
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = file.read().decode("utf-8", "replace").splitlines()
    return lines[-1].partition(": failed: ")[2] or None if lines else None


def _phase(config: RunConfig, phases: Sequence[PhaseRecord], stage: str | None, state: State) -> str | None:
    """The phase that the run is in; of a run that is trained, its measurement."""
    if stage is None:
        return None
    if stage in MEASUREMENTS:
        return stage
    if not phases:
        return phase_name(0, FIRST_MODE[config.method]) if state != "waiting" else None
    following = phases[-1].next
    return phases[-1].name if following is None else phase_name(len(phases), following)


def _sparse_fraction(config: RunConfig, phases: Sequence[PhaseRecord], step: int) -> float | None:
    if not step:
        return None
    done = phases[-1].last_step if phases else 0
    sparse = sum(record.steps for record in phases if record.mode == "sparse")
    if phases and phases[-1].next == "sparse":
        sparse += max(0, step - done)
    return sparse / max(step, done)


def _step_seconds(points: Sequence[dict[str, Any]]) -> float | None:
    """Seconds of a step by the clock, over stretches in which the run was not stopped."""
    stretches = [
        ((after["time"] - before["time"]) / 1000, after["step"] - before["step"])
        for before, after in pairwise(points)
        if after["step"] > before["step"]
    ]
    if not stretches:
        return None
    usual = statistics.median(seconds / steps for seconds, steps in stretches)
    kept = [(seconds, steps) for seconds, steps in stretches if seconds / steps <= _PAUSE * usual]
    return float(sum(seconds for seconds, _ in kept) / sum(steps for _, steps in kept))


def _latest(points: Sequence[dict[str, Any]], name: str) -> float | None:
    values = (point["values"].get(name) for point in reversed(points))
    return next((float(value) for value in values if value is not None), None)


def _final(folder: Path) -> dict[str, float]:
    """The perplexities of a final model, by mode."""
    path = folder / MEASUREMENTS["evaluate"][1]
    found = read_json_checked(path) if path.exists() else {}
    losses = {mode: found.get(f"loss_{mode}") for mode in ("dense", "sparse")}
    return {mode: perplexity(loss) for mode, loss in losses.items() if loss is not None}


def _log(folder: Path) -> Path | None:
    """The log that was written to last."""
    logs = [path for path in folder.glob("logs/*.log") if not path.name.startswith(".")]
    return max(logs, key=lambda path: path.stat().st_mtime, default=None)
