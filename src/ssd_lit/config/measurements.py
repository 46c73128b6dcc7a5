"""The sections of what is measured on the final models."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ssd_lit.config.section import Fraction, Positive, Section, Seed
from ssd_lit.config.yaml_file import ConfigError, shown
from ssd_lit.moe.names import Construction


class EvaluationConfig(Section):
    """What is measured on the final model."""

    blocks: Positive = 512
    """Validation blocks scored (all, if there are fewer); of a held-out text as many, from its beginning."""
    top_k_curve: list[Positive] = Field(default=[1, 2, 4, 6, 8, 12, 16], min_length=1)
    """Values of k at which sparse mode is scored; those above `experts` are left out."""
    thresholds: list[Fraction] = []
    """Dynamic k: every expert whose score is at least this share of the best one's (trained routers only)."""


class AnalysisConfig(Section):
    """What the analyses of a run look at, beside its evaluation."""

    blocks: Positive = 64
    """Validation blocks on which experts are watched."""
    experts: list[Positive] = Field(default=[8, 16, 32], min_length=1)
    """Numbers of clusters with which pairs of snapshots are compared; those that do not divide d_ff are left out."""
    constructions: list[Construction] = Field(default=["kmeans", "kmeans_activations"], min_length=1)
    """Clusterings with which they are compared."""
    tokens: Positive = 8
    """Tokens named for each expert."""


class GlueConfig(Section):
    """Fine-tuning of the final models of family bert on tasks of GLUE, scored on their development sets."""

    folder: str
    """Holds SST-2/train.tsv, SST-2/dev.tsv and so on as GLUE publishes them; or a .tar.xz of such a folder."""
    tasks: list[Literal["sst2", "rte", "mrpc", "stsb"]] = Field(default=["sst2", "rte", "mrpc", "stsb"], min_length=1)
    """The tasks that are learnt, each by a copy of the final model."""
    seeds: list[Seed] = Field(default=[0, 1, 2], min_length=1)
    """Of the head's first weights and the order of examples: every task is learnt once with each."""
    epochs: Positive = 3
    """How often the examples of a task are read."""
    batch_size: Positive = 32
    """Examples in one step."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """The highest; it rises and then falls to zero, linearly. BERT's own sizes took 2e-5 to 5e-5."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of all steps in which it rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled; not applied to norms and biases."""
    limit: Positive | None = None
    """Learn from the first so many examples of a task only; null takes all."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for key in ("tasks", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} {shown(values)}: each may stand there once")
        return self


class BlimpConfig(Section):
    """BLiMP's minimal pairs, scored without any fine-tuning by final models that predict the next token."""

    file: str
    """BLiMP.zip as published, or a folder of its .jsonl files."""
    limit: Positive | None = None
    """Score the first so many pairs of each set only; null takes all."""


class HarnessConfig(Section):
    """Tasks of EleutherAI's lm-evaluation-harness (`pip install ssd-lit[harness]`), for final models that predict the
    next token, in every mode that they have."""

    tasks: list[str] = Field(min_length=1)
    """Names of tasks or of groups of them."""
    folder: str | None = None
    """A folder of task files (YAML), which may name local data; null takes the package's own, which fetch theirs."""
    few_shot: Annotated[int, Field(ge=0)] | None = None
    """Examples before each question; null takes what the task says."""
    limit: Positive | None = None
    """Score the first so many questions of each task only; null takes all."""
    batch_size: Positive = 16
    """Questions scored at once."""

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks {shown(self.tasks)}: each may stand there once")
        return self


class DownstreamConfig(Section):
    """What the final models are worth on other tasks, beside their loss."""

    glue: GlueConfig | None = None
    """null leaves it out, as for every model that is no bert."""
    blimp: BlimpConfig | None = None
    """null leaves it out, as for every model that does not predict the next token."""
    harness: HarnessConfig | None = None
    """null leaves it out, as for every model that does not predict the next token."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.glue is None and self.blimp is None and self.harness is None:
            raise ValueError("nothing is asked for; allowed: glue, blimp, harness")
        return self

    def check_files(self) -> None:
        """Raises ConfigError if a file or folder to read is not there. Results stand without them."""
        if self.glue is not None and not Path(self.glue.folder).exists():
            raise ConfigError(f"downstream.glue: no file or folder {self.glue.folder!r}")
        if self.blimp is not None and not Path(self.blimp.file).exists():
            raise ConfigError(f"downstream.blimp: no file or folder {self.blimp.file!r}")
        if self.harness is not None and self.harness.folder is not None and not Path(self.harness.folder).is_dir():
            raise ConfigError(f"downstream.harness: no folder {self.harness.folder!r}")
