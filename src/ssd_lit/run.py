"""A run, opened once: its folder, its config, its records so far, and the data that it reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ssd_lit.config import RunConfig, load_run
from ssd_lit.data.index import VocabInfo, load_index
from ssd_lit.paths import checkpoint_path, data_dir, results_of, stage_path
from ssd_lit.records import (
    MEASUREMENTS,
    PhaseRecord,
    StageRecord,
    read_chain,
    read_phases,
    training_stages,
)
from ssd_lit.support.files import read_json_checked, sha256

Inputs = dict[str, str | None]


@dataclass(frozen=True)
class Run:
    """What every stage of a run is given. Nothing here imports torch's training, Lightning or MLflow."""

    folder: Path
    results: Path
    config: RunConfig
    others: "Mapping[str, Run]" = field(default_factory=dict, repr=False, compare=False)
    """Other runs of the experiment that are open already, by name."""

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Raises ValueError if the folder has no sound config.yaml, or lies in no results folder with its data."""
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
        """The digest of all tokens."""
        return str(load_index(self.tokens)["digest"])

    # What it is made from.

    def made_from(self) -> Inputs:
        """All that decides the run's weights: SHA-256 of its config, the digest of its tokens, weights it starts from.

        Those are of a warm-up that it shares, or of another run's final model; null where they are its own first
        ones. Where the run matches the FLOPs of another, also the other's final weights. Raises ValueError if what it
        needs of another run is not done.
        """
        config, start = self.config, None
        if config.shares_warmup is not None:
            start = self.other(config.shares_warmup).stage("warmup").weights
        elif config.parent_run is not None:
            start = self.other(config.parent_run).final().weights
        inputs: Inputs = {"config": sha256(self.folder / "config.yaml"), "tokens": self.tokens_digest, "start": start}
        if config.matches is not None:
            inputs["matched"] = self.other(config.matches).final().weights
        return inputs

    def measured_from(self, measurement: str) -> Inputs:
        """What a measurement of the final model is made from: its weights, the settings, the tokens."""
        settings = self.folder / MEASUREMENTS[measurement][0]
        return {"weights": self.final().weights, "settings": sha256(settings), "tokens": self.tokens_digest}

    # What is done.

    @property
    def training_stages(self) -> tuple[str, ...]:
        return training_stages(self.config)

    @property
    def stages(self) -> tuple[str, ...]:
        """All stages of the run in order, training and measurements that are asked for."""
        wanted = [name for name, (settings, _) in MEASUREMENTS.items() if (self.folder / settings).exists()]
        return (*self.training_stages, *wanted)

    def phases(self) -> list[PhaseRecord]:
        """The phases on record, up to the first that is not done."""
        return read_phases(self.folder, self.config.method)

    def chain(self) -> list[PhaseRecord]:
        """All phases. Raises ValueError when one of them is not done."""
        return read_chain(self.folder, self.config.method)

    def checkpoint(self, stage: str) -> Path:
        """The checkpoint at the end of a training stage; a shared warm-up's lies with the run that trained it."""
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
        """The record of the stage that made the final model. Raises ValueError if it is not done."""
        return self.stage(self.training_stages[-1])

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
        """What chooses the experts of the final model."""
        return self.config.moe.posthoc_router or self.config.moe.router

    def is_done(self, stage: str) -> bool:
        """Whether a stage's result is there, whole, and made from what there is now. Raises ValueError for damage."""
        return self._is_trained(stage) if stage in self.training_stages else self._is_measured(stage)

    def _is_trained(self, stage: str) -> bool:
        """What later stages were made from counts as done without its checkpoint: nobody needs that any more."""
        if not stage_path(self.folder, stage).exists():
            return False
        record = self.stage(stage)
        last = next((self.folder / "phases").glob(f"{record.phase:02d}-*/phase.json"), None)
        if last is None or record.inputs != self.made_from():
            return False
        later = self.training_stages[self.training_stages.index(stage) + 1 :]
        return self.has_checkpoint(stage) or any(self._is_trained(one) for one in later)

    def has_checkpoint(self, stage: str) -> bool:
        """Whether the checkpoint of a stage on record is there. Raises ValueError if it is not as large as it was."""
        path = self.checkpoint(stage)
        if path.exists() and path.stat().st_size != self.stage(stage).size:
            raise ValueError(f"{path}: damaged (not as large as it was written); delete it and run again")
        return path.exists()

    def _is_measured(self, measurement: str) -> bool:
        result = self.folder / MEASUREMENTS[measurement][1]
        if not result.exists() or not stage_path(self.folder, self.training_stages[-1]).exists():
            return False
        found: Any = read_json_checked(result).get("inputs")
        return bool(found == self.measured_from(measurement))
