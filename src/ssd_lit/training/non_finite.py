"""Losses, gradients and weights that are not finite: seen before anything is saved, and traced to where they begin."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from ssd_lit.training.checkpoint import read_checkpoint
from ssd_lit.training.module import Pretraining
from ssd_lit.training.optim import LeftOut, NonFiniteGuard
from ssd_lit.training.phase_switch import PhaseSwitch

log = logging.getLogger(__name__)

WATCHED = "NonFinite"  # What was left out so far travels under this key of a checkpoint's callbacks.


class NonFinite(Callback):
    """Ends a run whose numbers are not finite with one line, and tells of updates that were left out.

    Looks at the steps at which the host waits for the device anyway: where something is logged, validated or saved.
    Stands behind what only queues work, and before all that waits or saves.
    """

    state_key = WATCHED

    def __init__(self, switch: PhaseSwitch):
        self._switch = switch
        self._guard: NonFiniteGuard | None = None
        training = switch.run.config.training
        self._every = [training.log_every, training.checkpoint_every, training.validate_every]
        self._every += [training.snapshot_every] if training.snapshot_every else []
        self._found = LeftOut()

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._guard = module.guard
        module.guard.restore(self._found)

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if self._switch.ended_by is None and all(step % every for every in self._every):
            return
        before, self._found = self._found, module.guard.read()
        if self._found.row >= module.guard.limit:
            raise ValueError(self._told(_first_non_finite(module, self._found.step)))
        # Of the gradient nothing is left to see when the very update made them so.
        if not torch.nn.utils.get_total_norm(module.model.parameters(), norm_type=torch.inf).isfinite():
            name = next(name for name, value in module.model.named_parameters() if not value.isfinite().all())
            raise ValueError(f"{self._title()}: weights are not finite by step {step}, first {name}; {self._remedy()}")
        if self._switch.run.config.training.non_finite == "skip":
            module.record({"train/updates_left_out": float(self._found.total)})
            if self._found.total > before.total and trainer.is_global_zero:
                log.warning(
                    "%s: %d updates left out by step %d, because their gradients were not finite; the last at step %d",
                    self._title(), self._found.total, step, self._found.step + 1,
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        found = self._found if self._guard is None else self._guard.read()
        return vars(found).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._found = LeftOut(**state)

    def _title(self) -> str:
        return f"{self._switch.run.config.name} {self._switch.phase.name}"

    def _told(self, where: str) -> str:
        found = self._found
        row = f", the last of {found.row} in a row" if found.row > 1 else ""
        return f"{self._title()}: step {found.step + 1} is not finite{row}, first {where}; {self._remedy()}"

    def _remedy(self) -> str:
        self._switch.checkpoints.writer.wait()
        last, rolling = "no checkpoint yet", self._switch.checkpoints.rolling
        if rolling.exists():
            last = f"last good checkpoint: {rolling} (step {read_checkpoint(rolling)['global_step']})"
        skip = " or set training.non_finite: skip" if self._switch.run.config.training.non_finite == "stop" else ""
        return f"{last}; started again as it is, it would come here again: lower optim.lr{skip}"


def _first_non_finite(module: Pretraining, step: int) -> str:
    """What is the first not to be finite when a step is run again, by the weights that it was run with.

    In forward order, through the modules and then the loss, then backward through the gradients. Every process runs
    its own part of the batch; the earliest finding of all is told.
    """
    model, names, bad = module.model, list[str](), list[Tensor]()

    def watch(name: str) -> Any:
        def look(_: nn.Module, inputs: Any, output: Any) -> None:
            names.append(f"in the output of {name}")
            bad.append(_any_bad(list(_tensors(output)), module.device))

        return look

    hooks = [one.register_forward_hook(watch(name)) for name, one in model.named_modules() if name]
    try:
        with module.trainer.precision_plugin.forward_context():
            loss = module.run_again(step)
    finally:
        for hook in hooks:
            hook.remove()
    names.append("in the loss")
    bad.append(_any_bad([loss], module.device))
    # Not .backward(): of several processes only one may have come so far.
    parameters = [(name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad]
    gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
    for (name, _), gradient in zip(parameters, gradients, strict=True):
        names.append(f"in the gradient of {name}")
        bad.append(_any_bad([] if gradient is None else [gradient], module.device))
    names.append("nowhere when it was run again, without compilation: where is not known")
    first = torch.stack([*bad, torch.ones_like(bad[0])]).int().argmax()
    return names[int(module.trainer.strategy.reduce(first, reduce_op="min"))]


def _any_bad(tensors: list[Tensor], device: torch.device) -> Tensor:
    found = [~one.isfinite().all() for one in tensors if one.is_floating_point()]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for one in output.values() if isinstance(output, dict) else output:
            yield from _tensors(one)
