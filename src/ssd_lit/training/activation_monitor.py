"""How many neurons fire and which experts work, while training goes on."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from ssd_lit.data.objectives import Batch
from ssd_lit.models.probe import ffn_inputs
from ssd_lit.moe.statistics import active_ratio, expert_load, load_entropy
from ssd_lit.training.module import Pretraining

SEQUENCES = 4  # Enough tokens for a steady figure, at about one per cent of a step's cost.


class ActivationMonitor(Callback):
    """Logs, for every layer, the active-neuron ratio and in sparse mode the experts' load and its entropy.

    Taken on the first sequences of the step's batch with the weights after the step, averaged over processes.
    """

    def __init__(self, log_every: int):
        self._log_every = log_every

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step % self._log_every:
            return
        values: dict[str, float] = {}
        with trainer.precision_plugin.forward_context():
            inputs = ffn_inputs(module.model, {name: rows[:SEQUENCES] for name, rows in batch.items()})
        for layer, (ffn, x) in enumerate(zip(module.model.ffns, inputs, strict=True)):
            x = x.float()
            values[f"activation/active_ratio/layer_{layer:02d}"] = active_ratio(ffn, x)
            if ffn.mode == "sparse":
                load = expert_load(ffn, x)
                values[f"experts/load_entropy/layer_{layer:02d}"] = load_entropy(load)
                values[f"experts/load_max/layer_{layer:02d}"] = load.max().item()
                values[f"experts/load_min/layer_{layer:02d}"] = load.min().item()
                values[f"experts/dead/layer_{layer:02d}"] = float((load == 0).sum())
                values["experts/top_k"] = ffn.top_k
        mean = trainer.strategy.reduce(torch.tensor(list(values.values()), device=module.device), reduce_op="mean")
        module.record(dict(zip(values, mean.tolist(), strict=True)))
