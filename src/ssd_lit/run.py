"""A run: its folder, its config, its records and its data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from ssd_lit.config import RunConfig, load_run
from ssd_lit.config.effects import digest_of
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.paths import checkpoint_path, data_dir, results_of, stage_path
from ssd_lit.records import PhaseRecord, StageRecord, read_chain, read_phases
from ssd_lit.stages import MEASUREMENTS, training_stages
from ssd_lit.support.files import read_json_checked, sha256, size_of

Inputs = dict[str, str | None]


@dataclass(frozen=True)
class Run:
    """A run as every stage of it gets it. Imports neither Lightning nor MLflow nor the training."""

    folder: Path
    results: Path
    config: RunConfig
    others: "Mapping[str, Run]" = field(default_factory=dict, repr=False, compare=False)
    """Open runs of the same experiment, by name."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises ValueError if the folder has no valid config.yaml, or is in no results folder with its data."""
        config = load_run(folder / "config.yaml")
        return cls(folder.absolute(), results_of(folder, config.data), config)

    def other(self, name: str) -> "Run":
        """Another run of the experiment, by its folder name."""
        return self.others.get(name) or Run.open(self.folder.parent / name)

    # The data.

    @property
    def data(self) -> Path:
        return data_dir(self.results, self.config.data)

    @property
    def tokens(self) -> Path:
        return self.data / "tokens"

    @property
    def tokenizer(self) -> Path:
        return self.data / "tokenizer"

    @cached_property
    def vocab(self) -> VocabInfo:
        return VocabInfo.of(load_index(self.tokens))

    @cached_property
    def tokens_digest(self) -> str:
        return str(load_index(self.tokens)["digest"])

    # Its inputs.

    @cached_property
    def config_digest(self) -> str:
        return digest_of(self.config)

    def made_from(self) -> Inputs:
        """Digests of all inputs of the run's weights: its config, its tokens and the weights that it starts from.

        The latter are of the parent run's final model; None for initial weights of its own, also where another run
        trains the first phase for both: that is the same, whoever does it. If the run matches another's FLOPs, also the
        other's final weights. Raises ValueError if another run that it needs is not done.
        """
        config, start = self.config, None
        if config.parent_run is not None:
            start = self.other(config.parent_run).final().weights
        inputs: Inputs = {"config": self.config_digest, "tokens": self.tokens_digest, "start": start}
        if config.matches is not None:
            inputs["matched"] = self.other(config.matches).final().weights
        return inputs

    def measured_from(self, measurement: str) -> Inputs:
        """The inputs of a measurement: digests of the final weights, the settings and the tokens."""
        settings = self.folder / MEASUREMENTS[measurement][0]
        return {"weights": self.final().weights, "settings": sha256(settings), "tokens": self.tokens_digest}

    # What is done.

    @property
    def training_stages(self) -> tuple[str, ...]:
        return training_stages(self.config)

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages of the run in order: training, then the measurements that have settings."""
        measurements = [name for name, (settings, _) in MEASUREMENTS.items() if (self.folder / settings).exists()]
        return (*self.training_stages, *measurements)

    def phases(self) -> list[PhaseRecord]:
        """The recorded phases, up to the first that is not done."""
        return read_phases(self.folder, self.config.method)

    def chain(self) -> list[PhaseRecord]:
        """All phases. Raises ValueError if one of them is not done."""
        return read_chain(self.folder, self.config.method)

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint at the end of a training stage; a shared warm-up's is in its owner's folder."""
        if stage == "warmup" and self.config.shares_warmup is not None:
            return checkpoint_path(self.folder.parent / self.config.shares_warmup, stage)
        return checkpoint_path(self.folder, stage)

    def stage(self, stage: str) -> StageRecord:
        """The record of a training stage. Raises ValueError if it is not done."""
        path = stage_path(self.folder, stage)
        if not path.exists():
            raise ValueError(f"{path}: not found; `ssd-lit train {self.folder} --until {stage}` makes it")
        return StageRecord.read(path)

    def final(self) -> StageRecord:
        """The record of the stage that made the final model.

        Raises ValueError if it is not done, or was done with other settings, tokens or weights to start from.
        """
        record = self.stage(self.training_stages[-1])
        if record.inputs != self.made_from():
            raise ValueError(f"{self.folder}: was trained with other settings or data; `ssd-lit train` trains it anew")
        return record

    @property
    def has_experts(self) -> bool:
        """Whether the final model was MoEfied."""
        return self.config.method != "dense"

    @property
    def has_dense_mode(self) -> bool:
        """Whether the final model runs densely: not where experts are copies of whole FFNs."""
        return self.config.method != "upcycle"

    @property
    def router(self) -> str:
        """The router of the final model."""
        return self.config.moe.posthoc_router or self.config.moe.router

    def is_done(self, stage: str) -> bool:
        """Whether a stage's result exists and was made from the current inputs. Raises ValueError if it is damaged."""
        return self._is_trained(stage) if stage in self.training_stages else self._is_measured(stage)

    def _is_trained(self, stage: str) -> bool:
        """A stage counts as done without its checkpoint if a later stage is: that does not need it any more."""
        if not stage_path(self.folder, stage).exists():
            return False
        record = self.stage(stage)
        last = next((self.folder / "phases").glob(f"{record.phase:02d}-*/phase.json"), None)
        if last is None or record.inputs != self.made_from():
            return False
        later = self.training_stages[self.training_stages.index(stage) + 1 :]
        return self.has_checkpoint(stage) or any(map(self._is_trained, later))

    def has_checkpoint(self, stage: str) -> bool:
        """Whether the checkpoint of a recorded stage exists. Raises ValueError if its size is not the recorded one."""
        path = self.checkpoint(stage)
        if path.exists() and size_of(path) != self.stage(stage).size:
            raise ValueError(f"{path}: damaged (its size differs from the recorded size); delete it and run again")
        return path.exists()

    def _is_measured(self, measurement: str) -> bool:
        result = self.folder / MEASUREMENTS[measurement][1]
        if not result.exists() or not stage_path(self.folder, self.training_stages[-1]).exists():
            return False
        # Weights of other settings may lie there still.
        of_these = self.stage(self.training_stages[-1]).inputs == self.made_from()
        return of_these and read_json_checked(result).get("inputs") == self.measured_from(measurement)
