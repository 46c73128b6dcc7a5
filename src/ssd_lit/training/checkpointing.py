"""Checkpoints that are written beside training: a step waits for the copy to the host's memory, not for the disk."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from ssd_lit import stopping
from ssd_lit.config import TrainingConfig
from ssd_lit.files import sha256, whole_file
from ssd_lit.paths import checkpoint_path, phase_dir, previous_checkpoint, rolling_checkpoint, stage_path
from ssd_lit.records import PhaseRecord, StageRecord
from ssd_lit.run import Run
from ssd_lit.training.checkpoint import read_checkpoint, save
from ssd_lit.training.module import Pretraining


class Delivery(NamedTuple):
    """What goes with the writing of a checkpoint."""

    previous: Path | None = None
    """What becomes of the file that is replaced; None lets it go."""
    done: Callable[[], None] | None = None
    """Called when the file is there."""


class CheckpointWriter(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints: copies them to the host at once, and writes them in a thread.

    Checkpoints reach the disk in the order in which they were given, each whole or not at all. What fails on the way is
    raised by the next call. Reading looks at the checksums, which Lightning's own does not.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: Future[None] | None = None
        self._host = _HostMemory()

    @property
    def is_busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to `path`; `storage_options` is a `Delivery`."""
        self.wait()
        content = self._host.copy_of(checkpoint)
        self._writing = self._thread.submit(_write, content, Path(path), storage_options or Delivery())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return read_checkpoint(path)

    def wait(self) -> None:
        """Return when all that was given is on the disk. Raises OSError if it is not."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def teardown(self) -> None:
        self._thread.shutdown()
        self.wait()


def _write(content: dict[str, Any], path: Path, delivery: Delivery) -> None:
    with whole_file(path) as part:
        save(content, part)
        if delivery.previous is not None and path.exists():
            path.replace(delivery.previous)
    if delivery.done is not None:
        delivery.done()


class _HostMemory:
    """Host memory for the copy of a checkpoint; that for tensors of a GPU is pinned, and used again."""

    def __init__(self) -> None:
        self._pinned: dict[str, Tensor] = {}

    def copy_of(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        content: dict[str, Any] = self._copy(checkpoint, "", {})
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return content

    def _copy(self, value: Any, place: str, copied: dict[Any, Tensor]) -> Any:
        """`copied` holds what was copied so far: weights that are tied stay one tensor in the file."""
        if isinstance(value, Tensor):
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
            if key not in copied:
                copied[key] = self._tensor(value.detach(), place) if value.is_cuda else value.detach().clone()
            return copied[key]
        if isinstance(value, dict):
            return type(value)((key, self._copy(one, f"{place}/{key}", copied)) for key, one in value.items())
        if isinstance(value, list | tuple):
            return type(value)(self._copy(one, f"{place}/{i}", copied) for i, one in enumerate(value))
        return value

    def _tensor(self, value: Tensor, place: str) -> Tensor:
        kept = self._pinned.get(place)
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = self._pinned[place] = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return kept.copy_(value, non_blocking=True)


class Checkpoints:
    """The checkpoints of a run: the rolling one, those of stages, those of phases where they are kept."""

    def __init__(self, run: Run):
        self.writer = CheckpointWriter()
        self._run = run
        self.rolling = rolling_checkpoint(run.folder)

    def roll(self, trainer: Trainer) -> None:
        """Save what training goes on from after an interruption; keep the one before."""
        delivery = Delivery(previous=previous_checkpoint(self.rolling))
        trainer.save_checkpoint(self.rolling, storage_options=delivery)

    def keep_stage(self, trainer: Trainer, stage: str, record: PhaseRecord) -> None:
        """Save the state at the end of a stage; its record is written when the file is there."""
        delivery = Delivery(done=lambda: close_stage(self._run.folder, stage, record))
        trainer.save_checkpoint(checkpoint_path(self._run.folder, stage), storage_options=delivery)

    def keep_phase(self, trainer: Trainer, record: PhaseRecord) -> None:
        """Save the state at the end of a phase."""
        path = phase_dir(self._run.folder, record.index, record.mode) / "weights.ckpt"
        trainer.save_checkpoint(path)


def close_stage(run_dir: Path, stage: str, record: PhaseRecord) -> None:
    """Put a training stage, which ended with a phase and whose checkpoint is there, on record."""
    path = checkpoint_path(run_dir, stage)
    told = StageRecord(stage, record.index, record.last_step, sha256(path), path.stat().st_size, record.inputs)
    told.write(stage_path(run_dir, stage))


class RollingCheckpoint(Callback):
    """Saves all state every `checkpoint_every` steps or `checkpoint_minutes`, and when a signal asks to stop.

    Where a validation follows the step, it saves behind it: the points of that validation are then on record, and a
    change of phase is done. Must be the last callback, so that it saves what the others have just done. While a
    checkpoint is still being written, the next one waits for a later step.

    A stop is obeyed after any step, by all processes together. Several processes agree on a stop, or on a checkpoint
    that the clock asks for, at the steps at which they wait for each other anyway: those that are logged or validated.
    """

    def __init__(self, checkpoints: Checkpoints, training: TrainingConfig):
        self._checkpoints = checkpoints
        self._writer = checkpoints.writer
        self._training = training
        self._saved_at = time.monotonic()
        self._overdue = False

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        # Takes the place of Lightning's own handler, which ends in the middle of a validation, has processes talk to
        # each other while they may be talking already, and knows SIGUSR1 only as a wish to requeue a Slurm job.
        stopping.defer()
        self._saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if not (trainer.should_stop or trainer.global_step % self._training.validate_every == 0):
            self._close_step(trainer, agree=trainer.global_step % self._training.log_every == 0)

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if not trainer.should_stop:  # the stage's own checkpoint was saved
            self._close_step(trainer, agree=True)

    def on_train_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        stopping.obey()

    def _close_step(self, trainer: Trainer, *, agree: bool) -> None:
        training, several = self._training, trainer.world_size > 1
        self._overdue |= trainer.global_step % training.checkpoint_every == 0
        stop, due = stopping.asked() is not None, self._overdue or self._is_late()
        if several:
            if not agree:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = trainer.strategy.broadcast(due and not self._writer.is_busy)
        if stop or (due and (several or not self._writer.is_busy)):
            self._checkpoints.roll(trainer)
            self._saved_at, self._overdue = time.monotonic(), False
        if stop:
            raise stopping.Stopped(f"{stopping.asked() or 'a signal'} after step {trainer.global_step}, which is saved")

    def _is_late(self) -> bool:
        minutes = self._training.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
