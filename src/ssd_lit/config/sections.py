"""The sections that decide a run's weights: model, experts, optimiser, training and phases."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ssd_lit.config.pretrained import HEAD_WIDTH, ROTARY, check_weights, checkpoint_shape
from ssd_lit.config.section import Family, Fraction, Positive, Section
from ssd_lit.moe.names import Activation, BackendName, Construction, PosthocRouter, RouterName, ScheduleKind


class ModelConfig(Section):
    """The backbone: its shape, and where its first weights come from."""

    family: Family = "gpt2"
    """bert predicts masked tokens, t5 cut-out spans, all others the next token."""
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
    """relu2 is the square of ReLU. Where FFNs are gated (llama, mistral, qwen2, qwen3), relu makes ReGLU and
    silu SwiGLU."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which activations are dropped in training; those families have no dropout, and a
    checkpoint its own."""

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
        if self.pretrained is not None and self.family in HEAD_WIDTH:
            return self  # its config.json may say how wide a head is
        if self.d_model % self.heads:
            raise ValueError(f"heads {self.heads} does not divide d_model {self.d_model}")
        width = self.d_model // self.heads
        if width % 2 and self.family in ROTARY:
            raise ValueError(f"heads {self.heads}: makes heads of width {width}; {self.family} needs an even one")
        return self


class KSchedule(Section):
    """How many experts a token runs through, over the steps of a training."""

    kind: ScheduleKind = "constant"
    """constant is `end` throughout; linear, cosine and step go there from `start`."""
    start: Positive = 1
    """k at the first step."""
    end: Positive | None = None
    """k at the last step, up or down; top_k if null."""
    stairs: Positive = 4
    """step only: number of equal stretches."""
    all_every: Annotated[int, Field(ge=2)] | None = None
    """Every so many steps, one of a sparse phase runs all experts, so that every neuron is trained; never if null. It
    counts as a sparse step, with the FLOPs of all experts."""


class MoEConfig(Section):
    """Experts made from the neurons of each FFN."""

    experts: Positive = 16
    """E: experts of one FFN; must divide d_ff."""
    top_k: Positive = 4
    """K: experts computed for a token in sparse mode."""
    k_schedule: KSchedule = KSchedule()
    """K through sparse phases, over all steps of the training; top_k throughout if left out."""
    construction: Construction = "kmeans"
    """How neurons are grouped: balanced k-means over the normalised input rows or over activations, clusters of the
    co-activation graph, at random, or as they stand. Fresh weights know the last two only."""
    calibration_blocks: Positive = 32
    """Training blocks on which activations are taken, for the constructions that need them."""
    router: RouterName = "center"
    """What chooses experts in sparse phases: their centres, a frozen random projection, or a gate that is trained."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.01
    """Weight of the load-balancing loss of router gate."""
    z_weight: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the z-loss of router gate."""
    posthoc_router: PosthocRouter | None = None
    """After the last phase, train what chooses instead: a small MLP on the experts' activation mass (mass_mlp)
    or on their output norm (norm_mlp), or, on the mass, the centres themselves (centers)."""
    router_hidden: Annotated[int, Field(gt=0, le=1_000_000)] = 64
    """Width of the MLP of a posthoc_router."""
    router_steps: Positive = 200
    """Steps for which a posthoc_router is trained."""
    router_lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of a posthoc_router at the start; it falls to zero."""
    permute_optimizer: bool = True
    """Whether Adam's moments move with their neurons at MoEfication; false is for showing what that is worth."""
    backend: BackendName = "auto"
    """How the sparse FFN is computed; all agree, they differ in speed. auto takes the fastest for the device, the
    precision and the number of tokens; fused, decode_gpu and, with the extra quack, quack are kernels, for GPUs."""

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
    """The last step's learning rate as a fraction of `lr`."""
    decay_fraction: Fraction = 0.2
    """wsd only: fraction of all steps spent in the decay."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the whole gradient."""


class TrainingConfig(Section):
    """Budget and machinery of a run."""

    @property
    def processes(self) -> int:
        """The number of processes that train together, over all machines."""
        return self.nodes * self.devices

    @property
    def local_batch_size(self) -> int:
        """Blocks of one step that a device computes."""
        return self.batch_size // self.processes

    steps: Positive
    """N: optimiser steps of the run, over all phases."""
    batch_size: Positive
    """Blocks in one step, over all devices."""
    micro_batch_size: Positive | None = None
    """Blocks that a device computes at once; the gradients of all pieces of its part of the batch are added up. null
    takes the whole part; on a GPU the largest piece that by estimate fits its memory."""
    activation_checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass instead of keeping them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of products and activations in training; weights and moments are float32 always."""
    compile: bool = False
    """torch.compile the layers and the loss."""
    deterministic: bool = False
    """Use only algorithms that give the same bits whenever they are run. Those that are fastest on a GPU, or compiled
    for several CPU threads, add up in the order in which their parts happen to be done."""
    devices: Annotated[int, Field(gt=0, le=1024)] = 1
    """Processes of one machine that train a run together, one a GPU; without GPUs they share the CPU threads."""
    nodes: Annotated[int, Field(gt=0, le=1024)] = 1
    """Machines that train a run together, with so many devices each; torchrun or srun starts the processes."""
    shard: bool = False
    """Divide weights, gradients and moments among the devices (FSDP2), for a model that one does not hold."""
    threads: Annotated[int, Field(gt=0, le=1024)] = 1
    """CPU threads of each stage of a run, over all devices of a machine. Sums round differently on another number, so
    it is a setting: a machine with more cores trains the same bits. Runs work side by side where there are cores."""
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
    """Minutes after which a rolling checkpoint is written at the latest; null goes by steps alone."""
    keep_phases: bool = False
    """Keep the state at the end of every phase, so that training can go on from any of them (`--from`)."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or gradient that is not finite. Such an update is never made; stop ends the run there,
    skip goes on with the next batch and counts it."""
    non_finite_limit: Positive = 10
    """skip only: end the run after so many such updates in a row."""
    snapshot_every: Positive | None = None
    """Steps between snapshots of the weights, from which pairs of moments are compared; null keeps none."""


PLACEMENT = ("devices", "nodes", "micro_batch_size", "activation_checkpointing")
"""Keys of the section training that say how the work is spread: a run goes on with others, but for rounding and for the
noise of masks and dropout, which every process draws for its own part. Not `shard`: its checkpoints are others."""
KEEPING = ("checkpoint_every", "checkpoint_minutes", "keep_phases", "workers", "non_finite", "non_finite_limit")
"""Keys of the section training that decide no number of what is trained already: how often it is saved, who reads its
batches, and what is done about a number that is not finite."""


PHASE_FRACTIONS = {
    "check_every": 0.04, "warmup_min_steps": 0.1, "warmup_max_steps": 0.2, "sparse_steps": 0.0625,
    "dense_min_steps": 0.01, "dense_max_steps": 0.01, "final_dense_steps": 0.2,
}  # fmt: skip
"""The lengths of phases that are not given, as fractions of all steps: half of them in eight short sparse phases, the
last dense one as long as a decay of the learning rate (docs/tutorial.md says what that comes from). Where more steps
are to be sparse, the first and the last dense phase are as short as that takes."""
SPARSE_PHASES = 8
_BOUNDS = (("warmup_min_steps", "warmup_max_steps"), ("dense_min_steps", "dense_max_steps"))


class SwitchingConfig(Section):
    """When SSD changes phase. These settings are ours; the paper's could not be had."""

    tau: Fraction = 0.6
    """A dense phase ends once the activation pattern similarity reaches this."""
    check_every: Positive
    """Steps between two similarity checks, in dense phases of methods ssd and dense; 4 % of training.steps if left
    out."""
    sparse_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """r: fraction of all steps that are sparse."""
    warmup_min_steps: Positive
    """Floor of the first dense phase; 10 % of training.steps if left out."""
    warmup_max_steps: Positive
    """Ceiling of the first dense phase, stable or not; 20 % of training.steps if left out."""
    sparse_steps: Positive
    """Length of one sparse phase; a sixteenth of training.steps if left out."""
    dense_min_steps: Positive
    """Floor of a dense phase between two sparse ones; 1 % of training.steps if left out."""
    dense_max_steps: Positive
    """Ceiling of such a dense phase; 1 % of training.steps if left out."""
    final_dense_steps: Positive
    """Dense steps kept for the end; 20 % of training.steps if left out."""
    switch_points: Annotated[list[Positive], Field(min_length=1)] | None = None
    """Instead of all these but check_every: the global steps at which the mode changes, dense to sparse and back."""
    final_sparse_every: Annotated[int, Field(ge=2)] | None = None
    """Every so many steps, one of the last dense phase is sparse, with the experts of the last sparse phase, so that
    sparse mode does not fall behind; none if null. It counts as a dense step, with the FLOPs of a sparse one."""


def with_phase_lengths(given: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """The section switching with the lengths that are not given, for a training of so many steps.

    A floor that is not given is at most its ceiling, and the other way round.
    """
    fractions, sparse = dict(PHASE_FRACTIONS), given.get("sparse_fraction")
    if isinstance(sparse, float) and sparse > SPARSE_PHASES * fractions["sparse_steps"]:
        ends = (1 - sparse - (SPARSE_PHASES - 1) * fractions["dense_max_steps"]) / 2
        fractions["sparse_steps"] = sparse / SPARSE_PHASES
        fractions |= {key: min(fractions[key], ends) for key in ("warmup_max_steps", "final_dense_steps")}
        fractions["warmup_min_steps"] = min(fractions["warmup_min_steps"], ends / 2)
    lengths = {name: max(1, round(fraction * steps)) for name, fraction in fractions.items()}
    for low, high in _BOUNDS:
        if isinstance(given.get(high), int):
            lengths[low] = min(lengths[low], given[high])
        elif isinstance(given.get(low), int):
            lengths[high] = max(lengths[high], given[low])
    return {**lengths, **given}
