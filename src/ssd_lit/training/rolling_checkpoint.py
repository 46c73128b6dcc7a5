"""The checkpoint that a phase goes on from when it was interrupted."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from ssd_lit.training.module import Pretraining


class RollingCheckpoint(Callback):
    """Saves all state to one file, every `every` steps and at the end of the phase, by rename.

    Where a validation follows the step, it saves behind it: the points of that validation are then on record.
    Stands last among the callbacks, so that it saves what the others have just done.
    """

    def __init__(self, path: Path, every: int, validate_every: int):
        self._path = path
        self._every = every
        self._validate_every = validate_every

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        validates = trainer.should_stop or trainer.global_step % self._validate_every == 0
        if not validates and trainer.global_step % self._every == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if trainer.should_stop or trainer.global_step % self._every == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        part = self._path.with_suffix(".part")
        trainer.save_checkpoint(part)  # ends with a barrier: the file is whole for all processes
        if trainer.is_global_zero:
            part.replace(self._path)
