"""The change of phase between two steps of a fit: decided, recorded, and carried out on the live model."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm

from ssd_lit.models.flops import Costs
from ssd_lit.moe.permutation import whole
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.records import PhaseRecord, Totals
from ssd_lit.run import Run
from ssd_lit.stages import stage_of
from ssd_lit.support.provenance import timed
from ssd_lit.training.checkpoint import SWITCH_STATE
from ssd_lit.training.checkpointing import Checkpoints
from ssd_lit.training.module import Pretraining
from ssd_lit.training.moefication import Checks, find_experts, group_neurons
from ssd_lit.training.schedule import Phase, next_phase, phase_flops
from ssd_lit.training.sharding import Shards


class PhaseCallback(Callback):
    """A callback with hooks for phases, which `PhaseSwitch` calls."""

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        """Called before the first step of the phase, after its mode is set."""

    def on_phase_end(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        """Called after the phase's last step and its validation."""


class PhaseSwitch(Callback):
    """Takes a model through the phases of its run, in the same way in every process.

    After each step it decides whether the phase ends, and sets `ended_by` for the callbacks after it. After them and a
    validation it writes phase.json and starts the next phase: a MoEfication on the live model, a dense or sparse phase
    with the next step. The trainer stops after the last phase of the stage `until`.

    Its state, with the clusterings, is in the checkpoint; earlier phases are read from their records.
    """

    state_key = SWITCH_STATE

    def __init__(
        self,
        run: Run,
        history: Sequence[PhaseRecord],
        start: Totals,
        until: str,
        costs: Costs,
        checkpoints: Checkpoints,
        provenance: dict[str, object],
    ):
        self.run = run
        self.history = list(history)
        self.tracker = PatternTracker(run.config.moe.experts, seed=run.config.seed)
        self.ended_by: str | None = None
        """Why the phase ends with the step just done; None while it goes on."""
        self._start = start
        """Totals of the run whose model this one starts from."""
        self._until = until
        self._costs = costs
        self.checkpoints = checkpoints
        self._provenance = provenance
        self._inputs = run.made_from()
        self._similarity: Checks = []
        self._seconds = 0.0
        self._since: float | None = None
        self._began: float | None = None
        """UNIX seconds; None in a phase that an earlier process began."""
        following = next_phase(run.config, history)
        assert following is not None, "a run at its end has nothing to train"
        self.phase: Phase = following

    @property
    def before(self) -> Totals:
        """The totals at the start of the phase."""
        return self.history[-1].total if self.history else self._start

    def elapsed(self) -> float:
        """Seconds of training in the phase so far, without validation, with those before an interruption."""
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if self.phase.mode in ("dense", "sparse"):
            self._begin(trainer, module)
        else:
            self._go_on(trainer, module)

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        similarity = None
        if self.phase.mode == "dense" and step % self.run.config.switching.check_every == 0:
            if _computes(trainer):
                weights = [ffn.gating_weight for ffn in module.model.ffns]
                # Of others nothing can be said: `NonFinite` ends the run, later in this step.
                if whole(get_total_norm(weights, norm_type=torch.inf)).isfinite():
                    similarity = self.tracker.update(map(whole, weights))
            # One process decides for all, and its clusterings are in the checkpoint.
            similarity = trainer.strategy.broadcast(similarity)
            if similarity is not None:
                self._similarity.append([step, similarity])
                module.record({"activation/similarity": similarity})
        self.ended_by = self.phase.ended_by(step - self.phase.first_step, similarity)
        # Makes Lightning validate; whether training does stop is decided after that.
        trainer.should_stop = self.ended_by is not None

    def on_validation_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._seconds, self._since = self.elapsed(), None

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if self.ended_by is None:
            self._since = time.perf_counter()
            return
        for callback in _phase_callbacks(trainer):
            callback.on_phase_end(trainer, module, self.phase)
        self._close(trainer, self._spent(trainer.global_step), self.ended_by, self._similarity)
        self._go_on(trainer, module)

    def _spent(self, step: int) -> Totals:
        """What the phase has spent up to a step."""
        config, steps = self.run.config, step - self.phase.first_step
        return Totals(
            steps=steps,
            sparse_steps=steps if self.phase.mode == "sparse" else 0,
            tokens=steps * config.training.batch_size * config.data.sequence_length,
            flops=phase_flops(config, self.phase, self._costs, step),
            seconds=self._seconds,
        )

    def _close(self, trainer: Trainer, spent: Totals, ended_by: str, similarity: Checks) -> None:
        """Record the phase that is done, save the state if a stage ends with it, and set the next phase."""
        config = self.run.config
        record = self.phase.record(config, self.history, self.before, spent, ended_by, similarity)
        record = replace(record, inputs=self._inputs, provenance=timed(self._provenance, self._began))
        if trainer.is_global_zero:
            record.write(self.run.folder)
        self.history.append(record)
        self.ended_by, self._similarity, self._seconds = None, [], 0.0
        stage = stage_of(config.method, record.index, record.mode)
        following = next_phase(config, self.history)
        stage_ends = following is None or stage_of(config.method, following.index, following.mode) != stage
        if config.training.keep_phases:
            self.checkpoints.keep_phase(trainer, record)
        if stage_ends:
            self.checkpoints.keep_stage(trainer, stage, record)
        if following is not None:
            self.phase = following
        trainer.should_stop = following is None or following.mode == "router" or (stage_ends and stage == self._until)

    def _go_on(self, trainer: Trainer, module: Pretraining) -> None:
        """Carry out any MoEfications, then begin the next training phase."""
        while not trainer.should_stop and self.phase.mode == "moefy":
            self._moefy(trainer, module)
        if not trainer.should_stop:
            self._begin(trainer, module)

    def _moefy(self, trainer: Trainer, module: Pretraining) -> None:
        began, self._began = time.perf_counter(), time.time()
        labels, similarity = self._find_experts(trainer, module)
        group_neurons(self.run.config, module.model, self.tracker, labels, trainer.optimizers[0])
        self._close(trainer, Totals(seconds=time.perf_counter() - began), "moefied", similarity)

    def _find_experts(self, trainer: Trainer, module: Pretraining) -> tuple[list[Tensor], Checks]:
        """`find_experts` of the first process in all."""
        experts: tuple[list[Tensor], Checks] | None = None
        if _computes(trainer):
            run = self.run
            experts = find_experts(run.config, module.model, self.tracker, self.history, run.tokens, run.vocab)
        experts = trainer.strategy.broadcast(experts)
        assert experts is not None
        return experts

    def _begin(self, trainer: Trainer, module: Pretraining) -> None:
        """Set the phase's mode and call the callbacks."""
        module.begin_phase(self.phase)
        for callback in _phase_callbacks(trainer):
            callback.on_phase_start(trainer, module, self.phase)
        self._began = None if self._seconds else time.time()
        self._since = time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        return {
            "inputs": self._inputs,
            "phase": len(self.history),
            "tracker": self.tracker.state_dict(),
            "similarity": self._similarity,
            "seconds": self.elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        self._similarity = state["similarity"]
        self._seconds = state["seconds"]


def _computes(trainer: Trainer) -> bool:
    """Whether this process computes clusterings: where weights are divided, all must take part in gathering them."""
    return trainer.is_global_zero or isinstance(trainer.strategy, Shards)


def _phase_callbacks(trainer: Trainer) -> list[PhaseCallback]:
    return [callback for callback in trainer.callbacks if isinstance(callback, PhaseCallback)]  # type: ignore[attr-defined]
