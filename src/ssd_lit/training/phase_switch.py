"""The end of a phase: decided after every step, written down with its reason."""

import time
from typing import Any

from lightning.pytorch import Callback, Trainer

from ssd_lit.config import RunConfig
from ssd_lit.moe.similarity import PatternTracker
from ssd_lit.training.checkpoint import SWITCH_STATE
from ssd_lit.training.module import Pretraining
from ssd_lit.training.schedule import Phase


class PhaseSwitch(Callback):
    """Watches the activation pattern in dense mode and stops the trainer when the phase's rule says so.

    Its state travels in the checkpoint: within a phase all of it, into the next phase the clusterings only.
    """

    state_key = SWITCH_STATE

    def __init__(self, phase: Phase, config: RunConfig):
        self.phase = phase
        self.tracker = PatternTracker(config.moe.experts, seed=config.seed)
        self.similarity: list[list[float]] = []
        """[global step, similarity] of every check in this phase."""
        self.ended_by: str | None = None
        self.seconds = 0.0
        """Wall-clock time of the phase's training, validation left out."""
        self._check_every = config.switching.check_every
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        similarity = None
        if self.phase.mode == "dense" and step % self._check_every == 0:
            if trainer.is_global_zero:
                similarity = self.tracker.update([ffn.key_rows for ffn in module.model.ffns])
            # One process decides, and the checkpoint holds its clusterings: none may go on where another stops.
            similarity = trainer.strategy.broadcast(similarity)
            if similarity is not None:
                self.similarity.append([step, similarity])
                module.record({"activation/similarity": similarity})
        self.ended_by = self.phase.ended_by(step - self.phase.first_step, similarity)
        # Lightning validates once more before it stops.
        trainer.should_stop = self.ended_by is not None

    def on_validation_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._pause()

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._since = time.perf_counter()

    def _pause(self) -> None:
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
        self._since = None

    def elapsed(self) -> float:
        """Training seconds of this phase so far, those before an interruption included."""
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tracker": self.tracker.state_dict(),
            "phase": self.phase.index,
            "similarity": self.similarity,
            "ended_by": self.ended_by,
            "seconds": self.elapsed(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state["tracker"])
        if state["phase"] == self.phase.index:
            self.similarity = state["similarity"]
            self.seconds = state["seconds"]
