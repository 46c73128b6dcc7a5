"""The model at regular steps, for looking back at how it came to be."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from ssd_lit.paths import snapshot_path
from ssd_lit.training.checkpoint import weights_of, write_checkpoint
from ssd_lit.training.module import Pretraining


class Snapshots(Callback):
    """Saves the weights, and nothing else, every `every` steps; steps that are trained again overwrite theirs."""

    def __init__(self, run_dir: Path, every: int):
        self._run_dir = run_dir
        self._every = every

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        if trainer.is_global_zero and trainer.global_step % self._every == 0:
            path = snapshot_path(self._run_dir, trainer.global_step)
            write_checkpoint(path, {"state_dict": weights_of(module.model)})
