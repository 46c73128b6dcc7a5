"""The checkpoint that a phase goes on from when it was interrupted, or asked to stop."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer

from ssd_lit import stopping
from ssd_lit.files import whole_file
from ssd_lit.layout import previous_checkpoint
from ssd_lit.training.checkpoint import read_checkpoint, save
from ssd_lit.training.module import Pretraining


class RollingCheckpoint(Callback):
    """Saves all state to one file, every `every` steps and at the end of the phase, by rename; keeps the one before.

    Where a validation follows the step, it saves behind it: the points of that validation are then on record.
    Stands last among the callbacks, so that it saves what the others have just done.

    A signal that asks to stop is obeyed at the same moments, after any step: all processes save and raise `Stopped`.
    """

    def __init__(self, path: Path, every: int, validate_every: int):
        self._path = path
        self._every = every
        self._validate_every = validate_every

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        # Takes the place of Lightning's own handler, which ends in the middle of a validation, has processes talk to
        # each other while they may be talking already, and knows SIGUSR1 only as a wish to requeue a Slurm job.
        stopping.defer()

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if not (trainer.should_stop or trainer.global_step % self._validate_every == 0):
            self._close_step(trainer)

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._close_step(trainer)

    def on_train_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        stopping.obey()

    def _close_step(self, trainer: Trainer) -> None:
        stop = trainer.strategy.reduce_boolean_decision(stopping.asked() is not None, all=False)
        if stop or trainer.should_stop or trainer.global_step % self._every == 0:
            self._save(trainer)
        if stop:
            raise stopping.Stopped(f"{stopping.asked() or 'a signal'} after step {trainer.global_step}, which is saved")

    def _save(self, trainer: Trainer) -> None:
        with whole_file(self._path) if trainer.is_global_zero else nullcontext(self._path) as part:
            trainer.save_checkpoint(part)  # ends with a barrier: the file is whole for all processes
            if trainer.is_global_zero and self._path.exists():
                self._path.replace(previous_checkpoint(self._path))


class CheckpointFiles(TorchCheckpointIO):
    """Reads and writes as every other part of ours does.

    Lightning's own way looks at no checksum, and makes a copy of the whole file in memory before it writes it.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)


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
