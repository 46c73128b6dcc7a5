"""Checkpoints that are written beside training: a step waits for the copy to the host's memory, not for the disk."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ssd_lit.config import TrainingConfig
from ssd_lit.paths import checkpoint_path, phase_dir, previous_checkpoint, rolling_checkpoint, snapshot_path
from ssd_lit.records import PhaseRecord, close_stage
from ssd_lit.run import Run
from ssd_lit.support import signals
from ssd_lit.support.files import whole_file
from ssd_lit.training.checkpoint import read_checkpoint, save, weights_of, write_checkpoint
from ssd_lit.training.module import Pretraining

COPIES = 2
"""Checkpoints on their way to the disk at once: a stage that is one MoEfication saves right after another."""


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
        self._writing: deque[Future[None]] = deque()
        self._host = _HostMemory()

    @property
    def is_busy(self) -> bool:
        return any(not one.done() for one in self._writing)

    def prepare(self, state: Iterable[Tensor], moments: Iterable[Tensor]) -> None:
        """Get host memory, beside the training, for checkpoints of a model's state and of two moments a parameter."""
        self._host.reserve([*state, *moments, *moments])

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to `path`; `storage_options` is a `Delivery`. Waits while two others are still to be written."""
        while len(self._writing) >= COPIES or (self._writing and self._writing[0].done()):
            self._writing.popleft().result()
        content, memory = self._host.copy_of(checkpoint)
        delivery = storage_options or Delivery()
        self._writing.append(self._thread.submit(self._write, content, memory, Path(path), delivery))

    def _write(self, content: dict[str, Any], memory: list[Tensor], path: Path, delivery: Delivery) -> None:
        try:
            with whole_file(path) as part:
                save(content, part)
                if delivery.previous is not None and path.exists():
                    path.replace(delivery.previous)
        finally:
            self._host.take_back(memory)
        if delivery.done is not None:
            delivery.done()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.wait()
        return read_checkpoint(path)

    def wait(self) -> None:
        """Return when all that was given is on the disk. Raises OSError if it is not."""
        while self._writing:
            self._writing.popleft().result()

    def teardown(self) -> None:
        self._thread.shutdown()
        self.wait()


class _HostMemory:
    """Memory of the host for copies of checkpoints: pinned for what comes from a GPU, and used again and again."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._lock = threading.Lock()

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Pin memory for `COPIES` copies, for one where there is little; it takes a second a gigabyte."""
        on_gpu = [one for one in tensors if one.is_cuda]
        size = sum(one.nbytes for one in on_gpu)
        copies = COPIES if psutil.virtual_memory().available > 4 * size else 1
        wanted = [(one.shape, one.dtype) for one in on_gpu] * copies

        def pin() -> None:
            for shape, dtype in wanted:
                self._give(torch.empty(shape, dtype=dtype, pin_memory=True))

        threading.Thread(target=pin, name="pinning", daemon=True).start()

    def copy_of(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """The checkpoint with all its tensors on the host, and those tensors; weights that are tied stay one."""
        copied: dict[Any, Tensor] = {}

        def copy(value: Tensor) -> Tensor:
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else id(value)
            if key not in copied:
                copied[key] = self._take(value.detach()) if value.is_cuda else value.detach().clone()
            return copied[key]

        content: dict[str, Any] = apply_to_collection(checkpoint, Tensor, copy)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return content, list(copied.values())

    def take_back(self, memory: Iterable[Tensor]) -> None:
        """A copy is not needed any more."""
        for one in memory:
            if one.is_pinned():
                self._give(one)

    def _take(self, value: Tensor) -> Tensor:
        with self._lock:
            free = self._free.get((value.shape, value.dtype))
            kept = free.pop() if free else None
        if kept is None:
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return kept.copy_(value, non_blocking=True)

    def _give(self, memory: Tensor) -> None:
        with self._lock:
            self._free.setdefault((memory.shape, memory.dtype), []).append(memory)


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
        signals.defer()
        self._saved_at = time.monotonic()
        if trainer.is_global_zero:
            self._writer.prepare(module.state_dict().values(), [p for p in module.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if not (trainer.should_stop or trainer.global_step % self._training.validate_every == 0):
            self._close_step(trainer, agree=trainer.global_step % self._training.log_every == 0)

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if not trainer.should_stop:  # the stage's own checkpoint was saved
            self._close_step(trainer, agree=True)

    def on_train_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        signals.raise_on_signal()

    def _close_step(self, trainer: Trainer, *, agree: bool) -> None:
        training, several = self._training, trainer.world_size > 1
        self._overdue |= trainer.global_step % training.checkpoint_every == 0
        stop, due = signals.pending() is not None, self._overdue or self._is_late()
        if several:
            if not agree:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = trainer.strategy.broadcast(due and not self._writer.is_busy)
        if stop or (due and (several or not self._writer.is_busy)):
            self._checkpoints.roll(trainer)
            self._saved_at, self._overdue = time.monotonic(), False
        if stop:
            raise signals.Preempted(
                f"{signals.pending() or 'a signal'} after step {trainer.global_step}, which is saved"
            )

    def _is_late(self) -> bool:
        minutes = self._training.checkpoint_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes


class Snapshots(Callback):
    """Saves the weights, and nothing else, every `every` steps; steps that are trained again overwrite theirs."""

    def __init__(self, run_dir: Path, every: int):
        self._run_dir = run_dir
        self._every = every

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if trainer.is_global_zero and trainer.global_step % self._every == 0:
            path = snapshot_path(self._run_dir, trainer.global_step)
            write_checkpoint(path, {"state_dict": weights_of(module.model)})
