"""One run, arm x seed, with all its settings resolved; and an arm, from which runs come."""

import json
from itertools import pairwise
from typing import Any, Self

from pydantic import model_validator

from ssd_lit.config.data import DataConfig
from ssd_lit.config.section import Method, Name, Section, Seed
from ssd_lit.config.sections import (
    ModelConfig,
    MoEConfig,
    OptimConfig,
    SwitchingConfig,
    TrainingConfig,
    with_phase_lengths,
)
from ssd_lit.moe.names import allowed_experts

RUN_SECTIONS = ("model", "moe", "optim", "training", "switching")
"""The sections that an experiment, an arm and a run have, and that a grid may change."""


class Arm(Section):
    """One method or setting compared, with its changes to the experiment's sections."""

    method: Method
    """How the arm is trained; docs/method.md says what each method does."""
    label: str | None = None
    """Name in figures and tables; the arm's key if left out."""
    parent_arm: str | None = None
    """posthoc: the arm whose final model is MoEfied; sparse: the dense arm whose neurons become experts before the
    training; upcycle: the dense arm whose FFNs are copied."""
    match_flops_of_arm: str | None = None
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
    parent_arm: str | None = None
    match_flops_of_arm: str | None = None
    shares_warmup: str | None = None
    """The run whose first phase is this one's too, step for step: it is trained once."""
    grid: dict[str, Any] = {}
    """The settings that set this arm apart from others of its grid."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig
    switching: SwitchingConfig

    @model_validator(mode="before")
    @classmethod
    def _phases_are_fractions_of_the_steps(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("switching", {}), dict):
            return content
        training = content.get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        # Steps that are wrong are told by their own key alone.
        lengths = with_phase_lengths(content.get("switching", {}), steps if isinstance(steps, int) else 100)
        return {**content, "switching": lengths}

    @model_validator(mode="after")
    def _sections_agree(self) -> Self:
        if self.model.d_ff % self.moe.experts:
            raise ValueError(
                f"model.d_ff {self.model.d_ff} is not divisible by moe.experts {self.moe.experts}; "
                f"allowed: {allowed_experts(self.model.d_ff)}"
            )
        self._check_learning_rate()
        self._check_batches()
        self._check_experts()
        self._check_objective()
        if self.method == "ssd":
            self._check_switching()
        return self

    def _check_learning_rate(self) -> None:
        optim, steps = self.optim, self.training.steps
        if optim.warmup_steps >= steps:
            raise ValueError(f"optim.warmup_steps {optim.warmup_steps}: must be below training.steps {steps}")
        decay = round(optim.decay_fraction * steps) if optim.schedule == "wsd" else 0
        if optim.warmup_steps + decay > steps:
            raise ValueError(
                f"optim.decay_fraction {optim.decay_fraction}: {decay} steps after optim.warmup_steps "
                f"{optim.warmup_steps} are more than training.steps {steps}"
            )

    def _check_batches(self) -> None:
        training = self.training
        if training.batch_size % training.processes:
            of = "training.devices" if training.nodes == 1 else "training.nodes times training.devices,"
            raise ValueError(f"training.batch_size {training.batch_size} is not divisible by {of} {training.processes}")
        micro = training.micro_batch_size
        if micro is not None and training.local_batch_size % micro:
            raise ValueError(
                f"training.micro_batch_size {micro} does not divide the {training.local_batch_size} blocks of a device"
            )
        if training.shard and training.processes == 1:
            raise ValueError("training.shard true: there is one device only; give more of training.devices")

    def _check_experts(self) -> None:
        moe, method = self.moe, self.method
        if moe.router == "gate" and method in ("ssd", "posthoc"):
            raise ValueError(f"moe.router 'gate': not with method {method}; allowed: center, random")
        schedule = moe.k_schedule
        ks = {"moe.top_k": moe.top_k, "moe.k_schedule.end": schedule.end}
        ks |= {} if schedule.kind == "constant" else {"moe.k_schedule.start": schedule.start}
        if moe.router == "gate" and (key := next((key for key, k in ks.items() if k == 1), None)):
            raise ValueError(f"{key} 1: a learned router weighs the chosen by a softmax; allowed: 2 and more")
        if moe.router == "center" and method == "upcycle":
            raise ValueError("moe.router 'center': copies of one FFN share one centre; allowed: gate, random")
        if moe.posthoc_router is not None and method not in ("ssd", "posthoc"):
            raise ValueError(f"moe.posthoc_router: only methods ssd and posthoc train one afterwards, not {method}")
        if self.from_scratch and moe.construction not in ("random", "contiguous"):
            raise ValueError(
                f"moe.construction {moe.construction!r}: fresh weights have no pattern to group by; "
                "allowed: random, contiguous"
            )

    def _check_objective(self) -> None:
        tokenizer, family = self.data.tokenizer, self.model.family
        if family == "t5" and self.data.sequence_length < 2:
            raise ValueError(
                f"model.family t5: needs data.sequence_length of at least 2; given {self.data.sequence_length}"
            )
        if tokenizer.folder is not None:
            return
        if family == "bert" and not tokenizer.mask_token:
            raise ValueError("model.family bert: needs data.tokenizer.mask_token: true")
        spans = self.data.spans
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
        if round(s.sparse_fraction * steps) < 1:
            raise ValueError(f"switching.sparse_fraction {s.sparse_fraction}: leaves no sparse step of {steps}")
        if s.warmup_max_steps + s.final_dense_steps >= steps:
            raise ValueError(
                f"training.steps {steps}: must exceed switching.warmup_max_steps + switching.final_dense_steps "
                f"({s.warmup_max_steps} + {s.final_dense_steps})"
            )

    @property
    def from_scratch(self) -> bool:
        """Whether experts are made of weights that were never trained."""
        return self.method == "sparse" and self.parent_arm is None and self.model.pretrained is None

    @property
    def name(self) -> str:
        """Folder name of the run."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def parent_run(self) -> str | None:
        """Folder name of the run whose final model this one starts from."""
        return None if self.parent_arm is None else f"{self.parent_arm}-seed{self.seed}"

    @property
    def matches(self) -> str | None:
        """Folder name of the run whose FLOPs this one may spend."""
        return None if self.match_flops_of_arm is None else f"{self.match_flops_of_arm}-seed{self.seed}"

    def is_dense_training_of(self, other: "RunConfig") -> bool:
        """Whether this is dense training, for all its steps, of the other run's model on its data."""
        whole = self.method == "dense" and self.match_flops_of_arm is None
        return whole and self.model == other.model and self.data == other.data

    def warmup(self) -> str:
        """All that decides the first phase of an ssd run: two runs with the same text train it alike."""
        s = self.switching
        keys = (s.tau, s.check_every, s.warmup_min_steps, s.warmup_max_steps)
        ends = keys if s.switch_points is None else (s.check_every, s.switch_points[0])
        sections = [part.model_dump() for part in (self.data, self.model, self.optim, self.training)]
        return json.dumps([self.seed, sections, self.moe.experts, self.moe.router, ends], sort_keys=True)
