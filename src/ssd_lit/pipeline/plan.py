"""What the workflow asks about an experiment while it plans: which files a stage needs, and which results still stand.

Planning writes nothing under results/. Dates decide what follows from what; whether a result is what its inputs make is
decided by records and digests.
"""

import shutil
import tempfile
from atexit import register
from collections.abc import Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from ssd_lit.config import ConfigError, Experiment, find_experiment, load_experiment, read_changes
from ssd_lit.config.section import unknown_key
from ssd_lit.data.benchmarks import check_downstream
from ssd_lit.data.sources import is_other_text
from ssd_lit.data.tokenizer import is_other_tokenizer
from ssd_lit.paths import config_files, data_dir, run_dir, stage_path
from ssd_lit.pipeline.data import check_data
from ssd_lit.pipeline.resources import Resources, of_job
from ssd_lit.run import Run
from ssd_lit.stages import MEASUREMENTS, training_stages
from ssd_lit.support.files import read_json_checked

CONFIG_KEYS = ("experiment", "results", "jobs", "gpu_share", "set")
"""What `snakemake --config` may be given: the experiment, its results folder, how a run is divided into jobs, how many
runs share a GPU (0: none asks for one), and settings that are laid over the experiment."""


def experiment_of(config: Mapping[str, Any]) -> Experiment:
    """The experiment that `snakemake --config` asks for: configs/NAME.yaml, or a path, with the changes in `set`.

    Raises ConfigError for a mistake in it, or for a key of `config` that is unknown.
    """
    for key in config:
        if key not in CONFIG_KEYS:
            raise ConfigError(unknown_key(f"--config {key}", key, CONFIG_KEYS))
    jobs = config.get("jobs", "stages")
    if jobs not in ("stages", "runs"):
        raise ConfigError(f"jobs: given {jobs!r}; allowed: stages (a job for each stage of a run), runs (one for all)")
    share = config.get("gpu_share", 1)
    if not isinstance(share, int) or isinstance(share, bool) or not 0 <= share <= 1024:
        raise ConfigError(f"gpu_share: given {share!r}; allowed: 0 (no run asks for a GPU) to 1024 runs on each GPU")
    path = find_experiment(str(config.get("experiment", "default")))
    try:
        changes = read_changes(config["set"]) if "set" in config else None
    except ConfigError as error:
        raise ConfigError(f"set: {error}") from None
    return load_experiment(path, changes)


class Plan:
    """An experiment, its runs and their results as they lie there now."""

    def __init__(self, experiment: Experiment, results: Path):
        """Raises ConfigError if data that is still to be read cannot be."""
        self.experiment = experiment
        self.results = results
        self.here = results / experiment.experiment
        self.data = data_dir(results, experiment.data)
        if not (self.data / "tokens" / "index.json").exists() or self._is_other_text:
            check_data(experiment)
        if experiment.downstream is not None:
            check_downstream(experiment.downstream)
        self.configs = {run.name: run for run in experiment.runs()}
        self._runs: dict[str, Run] = {}
        for name, config in self.configs.items():
            self._runs[name] = Run(run_dir(results, config), results, config, self._runs)
        self._tried = {run.name for run in experiment.downstream_runs()}

    # Which files there are.

    def stage(self, run: str, stage: str) -> Path:
        """What a stage of a run leaves last."""
        if stage in MEASUREMENTS:
            return self.here / "runs" / run / MEASUREMENTS[stage][1]
        return stage_path(self.here / "runs" / run, stage)

    def final(self, run: str) -> Path:
        """The record of the stage that makes the final model of a run."""
        return self.stage(run, training_stages(self.configs[run])[-1])

    def measurements(self, run: str) -> list[Path]:
        """What is measured on the final model of a run."""
        asked = {"evaluate": True, "analyse": self.experiment.analysis is not None, "downstream": run in self._tried}
        return [self.stage(run, name) for name, wanted in asked.items() if wanted]

    def of_all_runs(self, measurement: str) -> list[Path]:
        """The results of a measurement, of every run on which it is asked for."""
        found = {run: self.stage(run, measurement) for run in self.configs}
        return [path for run, path in found.items() if path in self.measurements(run)]

    # What a stage needs.

    def before(self, run: str, stage: str) -> list[Path]:
        """The records that a training stage of a run goes on from."""
        config, stages = self.configs[run], training_stages(self.configs[run])
        place = stages.index(stage)
        if place:
            before = stages[place - 1]
            owner = config.shares_warmup if before == "warmup" else None
            return [self.stage(owner or run, before)]
        return [self.final(other) for other in (config.parent_run, config.matches) if other]

    def before_run(self, run: str) -> list[Path]:
        """What a whole run goes on from: a warm-up that it shares, another run that it builds on."""
        config = self.configs[run]
        owner = config.shares_warmup or (run if run in self.shared_warmups else None)
        others = [self.stage(other, "evaluate") for other in (config.parent_run, config.matches) if other]
        return [*([self.stage(owner, "warmup")] if owner else []), *others]

    @cached_property
    def shared_warmups(self) -> set[str]:
        """The runs whose warm-up is that of others too."""
        return {config.shares_warmup for config in self.configs.values() if config.shares_warmup}

    # What a job asks for.

    def resources(self, run: str, stage: str, *, uses_gpu: bool, cluster: bool) -> Resources:
        """What the job of a stage of a run asks for, or of the whole run for the stage `run`."""
        config = self.configs[run]
        stages = training_stages(config) if stage == "run" else (stage,)
        return of_job(config, stages, uses_gpu=uses_gpu, cluster=cluster)

    # What still stands.

    def stale(self, run: str, *stages: str) -> list[Path]:
        """A file newer than any result, if the stage's result is there but not what its inputs make; else none."""
        return [_newer_than_all()] if any(self._is_stale(run, stage) for stage in stages) else []

    def stale_documents(self) -> list[Path]:
        """A file newer than any result, if local text is not what the documents were read from any more; else none."""
        return [_newer_than_all()] if self._is_other_text else []

    def stale_tokenizer(self) -> list[Path]:
        """A file newer than any result, if the tokenizer's folder holds another one now than was copied; else none."""
        try:
            is_other = is_other_tokenizer(self.experiment.data.tokenizer, self.data / "tokenizer")
        except ValueError:
            is_other = True
        return [_newer_than_all()] if is_other else []

    def stale_tables(self) -> list[Path]:
        """A file newer than any result, if the tables are of other settings or a measurement is missing; else none.

        Snakemake removes what a job is to make anew. Where that job ended without it, tables of before would stand:
        it does not make a missing file for a result that is there.
        """
        path = self.here / "experiment.yaml"
        missing = not all(result.exists() for run in self.configs for result in self.measurements(run))
        return [_newer_than_all()] if missing or (path.exists() and not self._as_written(path)) else []

    @cached_property
    def _is_other_text(self) -> bool:
        card = self.data / "documents" / "card.json"
        if not card.parent.exists():
            return False
        try:
            return is_other_text(self.experiment.data, read_json_checked(card), card.stat().st_mtime_ns)
        except ValueError:
            return True

    def _is_stale(self, run: str, stage: str) -> bool:
        if not self.stage(run, stage).exists():
            return False
        if stage in MEASUREMENTS and not self._as_written(self._runs[run].folder / MEASUREMENTS[stage][0]):
            return True
        try:
            return not self._runs[run].is_done(stage)
        except ValueError:
            return True

    def _as_written(self, path: Path) -> bool:
        """Whether a settings file is there, and says what the experiment says now."""
        return path.exists() and path.read_text(encoding="utf-8") == self._files[path]

    @cached_property
    def _files(self) -> dict[Path, str | None]:
        return config_files(self.experiment, self.results)


@cache
def _newer_than_all() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="ssd_lit-"))
    register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "its-result-is-not-what-it-is-made-from-now"
    path.touch()
    return path
