"""Active neurons and expert load, monitored during training."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from ssd_lit.data.objectives import Batch
from ssd_lit.models.hooks import ffn_inputs, gathered
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.moe.statistics import active_neurons, entropy, expert_load, load_entropy
from ssd_lit.training.module import Pretraining
from ssd_lit.training.phase_switch import PhaseCallback
from ssd_lit.training.schedule import Phase

log = logging.getLogger(__name__)

WINDOW = 10
"""Measurements of the experts' load that are averaged."""
COLLAPSED = 0.1
"""Routing has collapsed if it uses less than this fraction of the experts beyond the top_k that it must use."""


class RoutingWatch:
    """Warns of dead experts and of collapsed routing, once for each layer and phase.

    An expert is dead if no token chose it in a whole window. The number of experts in use is the exponential of the
    load's entropy: E for an even load, K if all tokens choose the same K.
    """

    def __init__(self, title: str):
        self._title = title
        self._loads: list[Tensor] = []
        self._warned: dict[str, set[int]] = {"dead": set(), "collapsed": set()}

    def update(self, load: Tensor, top_k: int) -> None:
        """Add one measurement of the load [L, E], on the CPU: the fraction of tokens that chose each expert."""
        self._loads.append(load)
        if len(self._loads) == WINDOW:
            self.close(top_k)

    def close(self, top_k: int) -> None:
        """Check the loads since the last window, which may be fewer than a window at the end of a phase."""
        if not self._loads:
            return
        load = torch.stack(self._loads).double().mean(dim=0)  # [L, E]
        self._loads = []
        experts = load.shape[1]
        dead = (load == 0).sum(dim=1).tolist()
        used = entropy(load).exp().tolist()
        self._warn("dead", dead, [bool(n) for n in dead], f"of {experts} experts no token chose")
        floor = top_k + COLLAPSED * (experts - top_k)
        low = [top_k < experts and n < floor for n in used]
        self._warn("collapsed", used, low, f"routing has collapsed: of {experts} experts it uses")

    def _warn(self, kind: str, values: Sequence[float], alarm: Sequence[bool], text: str) -> None:
        layers = [layer for layer, bad in enumerate(alarm) if bad and layer not in self._warned[kind]]
        if layers:
            self._warned[kind].update(layers)
            numbers = ", ".join(f"{values[layer]:.3g} in layer {layer}" for layer in layers)
            log.warning("%s: %s %s", self._title, text, numbers)


SEQUENCES, TOKENS = 4, 1024
"""The most sequences and tokens of a batch that are measured; at least one sequence."""


class ActivationMonitor(PhaseCallback):
    """Logs every layer's active-neuron ratio and, in sparse mode, its experts' load and the load's entropy.

    Measured on the first sequences of the step's batch, with the weights after the step, over all processes. About a
    thousand tokens are enough: only an expert chosen by fewer than one token in a thousand may look dead. Sequences
    stay whole, so that attention has the context that it has in training. Must run before the callbacks that wait for
    the device at the same steps, so that its work is queued right after the step's. Warns as `RoutingWatch` does.
    """

    def __init__(self, run: str, log_every: int):
        self._run = run
        self._log_every = log_every
        self._watch = RoutingWatch(run)

    def on_phase_start(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        self._watch = RoutingWatch(f"{self._run} {phase.name}")

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, outputs: Any, batch: Batch, *_: Any) -> None:  # type: ignore[override]
        if trainer.global_step % self._log_every:
            return
        ffns = module.model.ffns
        # In the precision of the training itself.
        with trainer.precision_plugin.forward_context():
            count = min(SEQUENCES, max(1, TOKENS // batch["inputs"].shape[1]))
            inputs = ffn_inputs(module.model, {name: rows[:count] for name, rows in batch.items()})
            own = torch.stack([_fractions(ffn, x) for ffn, x in _gathered(module.model, inputs)])  # [L, 1 + E]
        # One transfer: any other read of a value would make the host wait for the device once more.
        fractions = trainer.strategy.reduce(own, reduce_op="mean").cpu()
        values: dict[str, float] = {}
        for layer, (ffn, (active, *_), load) in enumerate(zip(ffns, fractions.tolist(), fractions[:, 1:], strict=True)):
            values[f"activation/active_ratio/layer_{layer:02d}"] = active
            if ffn.mode == "sparse":
                values[f"experts/load_entropy/layer_{layer:02d}"] = load_entropy(load)
                values[f"experts/load_max/layer_{layer:02d}"] = load.max().item()
                values[f"experts/load_min/layer_{layer:02d}"] = load.min().item()
                values[f"experts/dead/layer_{layer:02d}"] = float((load == 0).sum())
                values["experts/top_k"] = ffn.top_k
        module.record(values)
        if ffns[0].mode == "sparse" and trainer.is_global_zero:
            self._watch.update(fractions[:, 1:], ffns[0].top_k)

    def on_phase_end(self, trainer: Trainer, module: Pretraining, phase: Phase) -> None:
        self._watch.close(module.model.ffns[0].top_k)


def _gathered(model: LanguageModel, inputs: list[Tensor]) -> Iterator[tuple[ExpertFFN, Tensor]]:
    """Every FFN with its inputs, for a moment with all its weights where they are divided among devices."""
    for layer, ffn, x in zip(model.layers, model.ffns, inputs, strict=True):
        with gathered(layer):
            yield ffn, x


def _fractions(ffn: ExpertFFN, x: Tensor) -> Tensor:
    """For x [T, D], on its device: the active-neuron ratio [1], followed in sparse mode by the load [E]."""
    active = active_neurons(ffn, x).mean(dtype=torch.float32)[None]  # converts as it sums: no copy of [T, F]
    return torch.cat([active, expert_load(ffn, x)]) if ffn.mode == "sparse" else active
