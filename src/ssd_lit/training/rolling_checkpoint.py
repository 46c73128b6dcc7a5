"""The checkpoint that a phase goes on from when it was interrupted."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from ssd_lit.files import whole_file
from ssd_lit.layout import previous_checkpoint
from ssd_lit.training.checkpoint import read_checkpoint
from ssd_lit.training.module import Pretraining


class RollingCheckpoint(Callback):
    """Saves all state to one file, every `every` steps and at the end of the phase, by rename; keeps the one before.

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
        with whole_file(self._path) if trainer.is_global_zero else nullcontext(self._path) as part:
            trainer.save_checkpoint(part)  # ends with a barrier: the file is whole for all processes
            if trainer.is_global_zero and self._path.exists():
                self._path.replace(previous_checkpoint(self._path))


def newest_state(rolling: Path) -> dict[str, Any] | None:
    """What the callbacks knew at the checkpoint that a phase goes on from, which then lies at `rolling`.

    None if the phase has to begin anew. A damaged file is named and removed; the one before takes its place.
    """
    for part in rolling.parent.glob(f".{rolling.name}.*.part"):
        part.unlink()  # a kill left it
    previous = previous_checkpoint(rolling)
    for path in (rolling, previous):
        if not path.exists():
            continue
        try:
            state: dict[str, Any] = read_checkpoint(path)["callbacks"]
        except ValueError as error:
            path.unlink()
            told = f"going on from {previous}" if previous.exists() else "the phase begins anew"
            print(f"{str(error).partition(';')[0]}; {told}", flush=True)
        else:
            path.replace(rolling)
            return state
    return None
