"""Paths of data, experiments and runs under results/, and their settings files.

results/data/<name>-<digest>/        config.yaml, documents/, tokenizer/, tokens/
results/<experiment>/                experiment.yaml, summary.csv, figures/, report.html
results/<experiment>/runs/<run>/     config.yaml, evaluation.yaml, metrics.jsonl, evaluation.json, analysis/
    phases/<NN>-<mode>/              phase.json; weights.ckpt where training.keep_phases is set
    stages/<stage>.json              a training stage that is done, and the digest of its checkpoint
    checkpoints/<stage>.ckpt         the state at the end of that stage
    downstream/                      downstream.json, and pieces/ until it is complete
    snapshots/                       step-<NNNNNNNN>.pt with training.snapshot_every
    work/                            during training: made_from.json, rolling.ckpt and previous.ckpt
"""

from pathlib import Path

from ssd_lit.config import DataConfig, Experiment, RunConfig, dump
from ssd_lit.support.files import write_if_changed


def data_dir(results: Path, data: DataConfig) -> Path:
    return results / "data" / f"{data.name}-{data.digest()}"


def run_dir(results: Path, run: RunConfig) -> Path:
    return results / run.experiment / "runs" / run.name


def results_of(folder: Path, data: DataConfig) -> Path:
    """The results folder of a run's or an experiment's folder: the nearest parent that holds its data.

    Links are not resolved: an experiment's folder may be a link to another disk. Raises ValueError if there is none.
    """
    for parent in folder.absolute().parents:
        if data_dir(parent, data).is_dir():
            return parent
    raise ValueError(f"{folder}: no folder above it holds {data_dir(Path(), data)}; `ssd-lit configs` makes it")


def phase_name(index: int, mode: str) -> str:
    """Folder name of a phase: its index in the run, then its mode."""
    return f"{index:02d}-{mode}"


def phase_dir(run_dir: Path, index: int, mode: str) -> Path:
    return run_dir / "phases" / phase_name(index, mode)


def stage_path(run_dir: Path, stage: str) -> Path:
    """The record of a training stage that is done."""
    return run_dir / "stages" / f"{stage}.json"


def checkpoint_path(run_dir: Path, stage: str) -> Path:
    """The state of the run at the end of a training stage."""
    return run_dir / "checkpoints" / f"{stage}.ckpt"


def rolling_checkpoint(run_dir: Path) -> Path:
    """The state that training resumes from after an interruption."""
    return run_dir / "work" / "rolling.ckpt"


def previous_checkpoint(rolling: Path) -> Path:
    """The rolling checkpoint before the newest, in case that is damaged."""
    return rolling.with_name("previous.ckpt")


def snapshot_path(run_dir: Path, step: int) -> Path:
    """The weights after a step."""
    return run_dir / "snapshots" / f"step-{step:08d}.pt"


def snapshots(run_dir: Path) -> list[tuple[int, Path]]:
    """Steps and paths of a run's snapshots, by step."""
    return [(int(path.stem.removeprefix("step-")), path) for path in sorted((run_dir / "snapshots").glob("step-*.pt"))]


def write_configs(experiment: Experiment, results: Path) -> list[RunConfig]:
    """Write the resolved settings files of an experiment where their content changes; returns its runs.

    Deletes the settings of measurements that the experiment no longer has, and keeps their results.
    """
    for path, text in config_files(experiment, results).items():
        if text is None:
            path.unlink(missing_ok=True)
        else:
            write_if_changed(path, text)
    return experiment.runs()


def config_files(experiment: Experiment, results: Path) -> dict[Path, str | None]:
    """The settings files of an experiment and their content, None for a file that must not exist."""
    files: dict[Path, str | None] = {
        results / experiment.experiment / "experiment.yaml": dump(experiment),
        data_dir(results, experiment.data) / "config.yaml": dump(experiment.data),
    }
    evaluation = dump(experiment.evaluation)
    analysis = None if experiment.analysis is None else dump(experiment.analysis)
    downstream = None if experiment.downstream is None else dump(experiment.downstream)
    downstream_runs = {run.name for run in experiment.downstream_runs()}
    for run in experiment.runs():
        folder = run_dir(results, run)
        files[folder / "config.yaml"] = dump(run)
        files[folder / "evaluation.yaml"] = evaluation
        files[folder / "analysis.yaml"] = analysis
        files[folder / "downstream.yaml"] = downstream if run.name in downstream_runs else None
    return files
