"""Every method as a schedule of phases; the next phase is a function of the settings and the phases done.

dense     dense
ssd       dense until stable, (moefy, sparse, dense)*, the last dense phase being longer, moefy; or at fixed steps
sparse    moefy (at random), sparse
upcycle   moefy (copies of another run's FFNs), sparse
posthoc   moefy, on another run's final model

ssd and posthoc may end with a phase `router`, which trains only the router.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ssd_lit.config import RunConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.flops import Costs, forward_costs
from ssd_lit.moe.routing import scheduled_k
from ssd_lit.paths import phase_name
from ssd_lit.records import PhaseRecord, Totals

PhaseMode = Literal["dense", "sparse", "moefy", "router"]
BUDGET = "budget"
"""Why the last phase of steps ends: there are no more."""


@dataclass(frozen=True)
class Phase:
    """Consecutive steps in one mode and the rule for their end; `moefy` and `router` take no step of the run."""

    index: int
    mode: PhaseMode
    first_step: int
    max_steps: int = 0
    at_max: str = "steps"
    """Reason recorded for an end at `max_steps`."""
    min_steps: int = 0
    tau: float | None = None
    """The phase ends once the activation pattern similarity reaches this and `min_steps` are done."""

    @property
    def name(self) -> str:
        return phase_name(self.index, self.mode)

    @property
    def is_last_dense(self) -> bool:
        """Whether all steps that are left are this dense phase's."""
        return self.mode == "dense" and self.at_max == BUDGET

    def ended_by(self, steps: int, similarity: float | None) -> str | None:
        """Why the phase ends after `steps` of its own, or None; `similarity` of a check at this step, if any."""
        if self.tau is not None and similarity is not None and similarity >= self.tau and steps >= self.min_steps:
            return "stable"
        return self.at_max if steps >= self.max_steps else None

    def record(
        self,
        config: RunConfig,
        history: Sequence[PhaseRecord],
        before: Totals,
        spent: Totals,
        ended_by: str,
        similarity: list[list[float]],
    ) -> PhaseRecord:
        """The record of this phase, done after `history`; `before` holds the totals at its start."""
        record = PhaseRecord(
            index=self.index,
            mode=self.mode,
            first_step=self.first_step,
            last_step=self.first_step + spent.steps,
            steps=spent.steps,
            tokens=spent.tokens,
            flops=spent.flops,
            seconds=spent.seconds,
            ended_by=ended_by,
            similarity=similarity,
            total=before.plus(spent),
        )
        following = next_phase(config, [*history, record])
        return replace(record, next=following.mode if following else None)


def next_phase(config: RunConfig, history: Sequence[PhaseRecord]) -> Phase | None:
    """The phase that follows `history`, None after the last."""
    match config.method:
        case "dense":
            return None if history else _dense(config, history, config.training.steps, BUDGET)
        case "posthoc":
            return _router(config, history) if history else _moefy(history)
        case "sparse" | "upcycle":
            if not history:
                return _moefy(history)
            return _sparse(history, config.training.steps, BUDGET) if len(history) == 1 else None
        case "ssd" if config.switching.switch_points is not None:
            return _next_of_fixed(config, history, config.switching.switch_points)
        case "ssd":
            return _next_of_adaptive(config, history)


def _next_of_adaptive(config: RunConfig, history: Sequence[PhaseRecord]) -> Phase | None:
    s = config.switching
    total = history[-1].total if history else Totals()
    left = config.training.steps - total.steps
    sparse_left = round(s.sparse_fraction * config.training.steps) - total.sparse_steps
    # Steps that may still be spent before the final dense phase.
    before_final = left - s.final_dense_steps
    if not history:
        return _dense(config, history, s.warmup_max_steps, "ceiling", s.warmup_min_steps)
    match history[-1].mode:
        case "sparse" if sparse_left <= 0 or before_final <= s.dense_min_steps:
            return _dense(config, history, left, BUDGET)
        case "sparse":
            # At least one step must be left for the sparse phase after it.
            ceiling = min(s.dense_max_steps, before_final - 1)
            return _dense(config, history, ceiling, "ceiling", s.dense_min_steps)
        case "moefy" if left > 0:
            steps = min(s.sparse_steps, sparse_left, before_final)
            return _sparse(history, steps, "sparse share" if steps == sparse_left else "steps")
        case "dense":
            return _moefy(history)
        case _:
            return _router(config, history)


def _next_of_fixed(config: RunConfig, history: Sequence[PhaseRecord], points: Sequence[int]) -> Phase | None:
    done = _steps_done(history)
    ends = [*points, config.training.steps]
    if history and history[-1].mode == "dense":
        return _moefy(history)
    if done == config.training.steps:
        return _router(config, history)
    index = next(i for i, end in enumerate(ends) if end > done)
    steps, at_max = ends[index] - done, BUDGET if index == len(points) else "switch point"
    # Dense and sparse in turn, dense first.
    return _sparse(history, steps, at_max) if index % 2 else _dense(config, history, steps, at_max)


def _router(config: RunConfig, history: Sequence[PhaseRecord]) -> Phase | None:
    """The training of a post-hoc router after the last MoEfication, if there is one and it is not done."""
    if config.moe.posthoc_router is None or history[-1].mode == "router":
        return None
    return Phase(len(history), "router", history[-1].last_step)


def _dense(
    config: RunConfig, history: Sequence[PhaseRecord], max_steps: int, at_max: str, min_steps: int | None = None
) -> Phase:
    """A dense phase; with `min_steps` it may end early, when the activation pattern is stable."""
    tau = None if min_steps is None else config.switching.tau
    return Phase(len(history), "dense", _steps_done(history), max_steps, at_max, min_steps or 0, tau)


def _sparse(history: Sequence[PhaseRecord], max_steps: int, at_max: str) -> Phase:
    return Phase(len(history), "sparse", _steps_done(history), max_steps, at_max)


def _moefy(history: Sequence[PhaseRecord]) -> Phase:
    return Phase(len(history), "moefy", _steps_done(history))


def _steps_done(history: Sequence[PhaseRecord]) -> int:
    return history[-1].last_step if history else 0


def trained_k(config: RunConfig, phase: Phase, step: int) -> int | None:
    """The experts a token with which a phase takes a global step (0-based); None for a dense step.

    In a sparse phase `top_k_at`, and every so many steps all of them; in the last dense phase of SSD none, or every so
    many steps `top_k_at`.
    """
    if phase.mode == "sparse":
        every = config.moe.k_schedule.all_every
        return config.moe.experts if every is not None and step % every == 0 else top_k_at(config, step)
    every = config.switching.final_sparse_every if config.method == "ssd" and phase.is_last_dense else None
    return top_k_at(config, step) if every is not None and step % every == 0 else None


def top_k_at(config: RunConfig, step: int) -> int:
    """The schedule's k at a global step (0-based) in a sparse phase."""
    schedule = config.moe.k_schedule
    end = schedule.end or config.moe.top_k
    return scheduled_k(
        step, config.training.steps, kind=schedule.kind, start=schedule.start, end=end, stairs=schedule.stairs
    )


def phase_flops(config: RunConfig, phase: Phase, costs: Costs, step: int, since: int | None = None) -> float:
    """Training FLOPs of a phase up to the global step `step`, from its first step or from `since` on."""
    steps = range(phase.first_step if since is None else since, step)
    ks = Counter(trained_k(config, phase, step) for step in steps)
    copies = config.method == "upcycle"
    blocks = sum(
        count * (costs.dense() if k is None else costs.sparse(config.moe, k, upcycled=copies))
        for k, count in ks.items()
    )
    return config.training.batch_size * blocks


def with_steps_for(config: RunConfig, flops: float, vocab: VocabInfo) -> RunConfig:
    """The config with as many training steps as dense training can do with `flops`, rounded down.

    Raises ValueError if they are no more than the warm-up of the learning rate.
    """
    costs = forward_costs(config.model, config.moe, vocab, config.data.sequence_length)
    steps = int(flops / (config.training.batch_size * costs.dense()))
    if steps <= config.optim.warmup_steps:
        raise ValueError(
            f"match_flops_of_arm {config.match_flops_of_arm}: pays for {steps} steps, no more than optim.warmup_steps "
            f"{config.optim.warmup_steps}; choose a smaller model or a shorter warm-up"
        )
    return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps})})
