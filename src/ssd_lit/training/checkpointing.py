"""Asynchronous checkpoints: a step waits for the copy to host memory, not for the disk."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from ssd_lit.training.checkpoint import PREFIX, Delivery, read_checkpoint, save, write_checkpoint
from ssd_lit.training.module import Pretraining
from ssd_lit.training.sharding import Shards, whole_state

COPIES = 2
"""Checkpoints being written at once: a stage that is one MoEfication saves right after another stage."""


class CheckpointWriter(TorchCheckpointIO):
    """Lightning's reader and writer of checkpoints: copies them to the host at once, and writes them in a thread.

    Checkpoints are written in the order of the calls, each atomically. The next call raises the error of a failed
    write. Reading verifies the checksums, which Lightning does not.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: deque[Future[None]] = deque()
        self._host = _HostMemory()

    @property
    def is_busy(self) -> bool:
        return any(not write.done() for write in self._writing)

    def prepare(self, state: Iterable[Tensor], moments: Iterable[Tensor]) -> None:
        """Reserve host memory, in a thread, for checkpoints of a model's state and of two moments a parameter."""
        self._host.reserve([*state, *moments, *moments])

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write to `path`; `storage_options` is a `Delivery`. Waits while `COPIES` others are being written."""
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
        """Return when all checkpoints are on the disk. Raises OSError if a write failed."""
        while self._writing:
            self._writing.popleft().result()

    def teardown(self) -> None:
        self._thread.shutdown()
        self.wait()


class _HostMemory:
    """Host memory for copies of checkpoints: pinned for tensors of a GPU, and reused."""

    def __init__(self) -> None:
        self._free: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        self._lock = threading.Lock()

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Pin memory for `COPIES` copies, for one where memory is short; takes a second a gigabyte."""
        on_gpu = [tensor for tensor in tensors if tensor.is_cuda]
        size = sum(tensor.nbytes for tensor in on_gpu)
        copies = COPIES if psutil.virtual_memory().available > 4 * size else 1
        buffers = [(tensor.shape, tensor.dtype) for tensor in on_gpu] * copies

        def pin() -> None:
            for shape, dtype in buffers:
                self._give(torch.empty(shape, dtype=dtype, pin_memory=True))

        threading.Thread(target=pin, name="pinning", daemon=True).start()

    def copy_of(self, checkpoint: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        """The checkpoint with all its tensors on the host, and those tensors; tied weights stay one tensor."""
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
        """Make the memory of a copy free for later ones."""
        for tensor in memory:
            if tensor.is_pinned():
                self._give(tensor)

    def _take(self, value: Tensor) -> Tensor:
        with self._lock:
            free = self._free.get((value.shape, value.dtype))
            buffer = free.pop() if free else None
        if buffer is None:
            buffer = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return buffer.copy_(value, non_blocking=True)

    def _give(self, memory: Tensor) -> None:
        with self._lock:
            self._free.setdefault((memory.shape, memory.dtype), []).append(memory)


class Checkpoints:
    """The checkpoints of a run: the rolling one, those of stages, and those of phases with `keep_phases`."""

    def __init__(self, run: Run):
        self.writer = CheckpointWriter()
        self._run = run
        self.rolling = rolling_checkpoint(run.folder)

    def roll(self, trainer: Trainer) -> None:
        """Save the state that training resumes from after an interruption; keep the one before."""
        trainer.save_checkpoint(self.rolling, storage_options=Delivery(previous=previous_checkpoint(self.rolling)))

    def keep_stage(self, trainer: Trainer, stage: str, record: PhaseRecord) -> None:
        """Save the state at the end of a stage, then write the stage's record."""
        delivery = Delivery(done=lambda: close_stage(self._run.folder, stage, record))
        trainer.save_checkpoint(checkpoint_path(self._run.folder, stage), storage_options=delivery)

    def keep_phase(self, trainer: Trainer, record: PhaseRecord) -> None:
        """Save the state at the end of a phase."""
        trainer.save_checkpoint(phase_dir(self._run.folder, record.index, record.mode) / "weights.ckpt")


class RollingCheckpoint(Callback):
    """Saves all state every `checkpoint_every` steps or `checkpoint_minutes`, and on a signal to stop.

    If a validation follows the step, it saves after that: the validation's points are then recorded, and a change of
    phase is done. Must be the last callback, to save the state that the others leave. While a checkpoint is being
    written, the next one waits for a later step.

    A single process stops after any step. Several processes stop together: they agree on a stop, or on a checkpoint
    that is due by the clock, at the steps at which they wait for each other anyway, those that are logged or validated.
    """

    def __init__(
        self, checkpoints: Checkpoints, training: TrainingConfig, check: Callable[[Trainer, Pretraining], None]
    ):
        """`check` raises an error for a state that must not be saved."""
        self._checkpoints = checkpoints
        self._check = check
        self._writer = checkpoints.writer
        self._training = training
        self._saved_at = time.monotonic()
        self._overdue = False

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        # Replaces Lightning's own handler, which stops in the middle of a validation, starts a collective while another
        # may be running, and takes SIGUSR1 for a request to requeue a Slurm job.
        signals.defer()
        self._saved_at = time.monotonic()
        if trainer.is_global_zero and not isinstance(trainer.strategy, Shards):
            self._writer.prepare(module.state_dict().values(), [p for p in module.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if not (trainer.should_stop or trainer.global_step % self._training.validate_every == 0):
            self._close_step(trainer, module, agree=trainer.global_step % self._training.log_every == 0)

    def on_validation_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        if not trainer.should_stop:  # the stage's own checkpoint was saved
            self._close_step(trainer, module, agree=True)

    def on_train_end(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        signals.raise_on_signal()

    def _close_step(self, trainer: Trainer, module: Pretraining, *, agree: bool) -> None:
        training, several = self._training, trainer.world_size > 1
        self._overdue |= trainer.global_step % training.checkpoint_every == 0
        minutes = training.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        stop, due = signals.pending() is not None, self._overdue or late
        if several:
            if not agree:
                return
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
            due = trainer.strategy.broadcast(due and not self._writer.is_busy)
        if stop or (due and (several or not self._writer.is_busy)):
            self._check(trainer, module)
            self._checkpoints.roll(trainer)
            self._saved_at, self._overdue = time.monotonic(), False
        if stop:
            name = signals.pending() or "a signal"
            raise signals.Preempted(f"{name} after step {trainer.global_step}, which is saved")


class Snapshots(Callback):
    """Saves the weights alone every `every` steps; steps that are trained again overwrite theirs."""

    def __init__(self, run_dir: Path, every: int):
        self._run_dir = run_dir
        self._every = every

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % self._every == 0:
            weights = {PREFIX + name: value for name, value in whole_state(module.model).items()}
            if trainer.is_global_zero:
                write_checkpoint(snapshot_path(self._run_dir, trainer.global_step), {"state_dict": weights})
