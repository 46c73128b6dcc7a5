"""Losses, gradients and weights that are not finite: detected before anything is saved, and traced to their origin."""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from ssd_lit.moe.permutation import whole
from ssd_lit.training.checkpoint import read_checkpoint
from ssd_lit.training.module import Pretraining
from ssd_lit.training.optim import LeftOut, NonFiniteGuard
from ssd_lit.training.phase_switch import PhaseSwitch
from ssd_lit.training.sharding import Shards

log = logging.getLogger(__name__)


class NonFinite(Callback):
    """Ends a run whose numbers are not finite with a one-line error, and reports updates that were left out.

    Checks the steps at which the host waits for the device anyway: those that are logged, validated, saved or compared
    with others. Must run after callbacks that only queue work and before any that sync or save; who saves at another
    step calls `check`.
    """

    state_key = "NonFinite"
    """Key of the counts among a checkpoint's callbacks."""

    def __init__(self, switch: PhaseSwitch):
        self._switch = switch
        self._guard: NonFiniteGuard | None = None
        training = switch.run.config.training
        self._every = [training.log_every, training.checkpoint_every, training.validate_every]
        self._every += [switch.run.config.switching.check_every]
        self._checked = -1
        self._every += [training.snapshot_every] if training.snapshot_every else []
        self._counts = LeftOut()

    def on_train_start(self, trainer: Trainer, module: Pretraining) -> None:  # type: ignore[override]
        self._guard = module.guard
        module.guard.restore(self._counts)

    def on_train_batch_end(self, trainer: Trainer, module: Pretraining, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if self._switch.ended_by is not None or any(step % every == 0 for every in self._every):
            self.check(trainer, module)

    def check(self, trainer: Trainer, module: Pretraining) -> None:
        """Raise ValueError, in all processes, if the numbers of the step just done are not finite; once a step."""
        step = trainer.global_step
        if step == self._checked:
            return
        self._checked = step
        before, self._counts = self._counts, module.guard.read()
        if self._counts.row >= module.guard.limit:
            raise ValueError(self._message(_first_non_finite(module, self._counts.step)))
        # A finite gradient may still make the weights overflow in the update.
        if not whole(torch.nn.utils.get_total_norm(module.model.parameters(), norm_type=torch.inf)).isfinite():
            name = next(name for name, value in module.model.named_parameters() if not whole(value).isfinite().all())
            raise ValueError(f"{self._title()}: weights are not finite by step {step}, first {name}; {self._remedy()}")
        if self._switch.run.config.training.non_finite == "skip":
            module.record({"train/updates_left_out": float(self._counts.total)})
            if self._counts.total > before.total and trainer.is_global_zero:
                log.warning(
                    "%s: %d updates left out by step %d, because their gradients were not finite; the last at step %d",
                    self._title(), self._counts.total, step, self._counts.step + 1,
                )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return vars(self._counts if self._guard is None else self._guard.read()).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = LeftOut(**state)

    def _title(self) -> str:
        return f"{self._switch.run.config.name} {self._switch.phase.name}"

    def _message(self, where: str) -> str:
        counts = self._counts
        row = f", the last of {counts.row} in a row" if counts.row > 1 else ""
        return f"{self._title()}: step {counts.step + 1} is not finite{row}, first {where}; {self._remedy()}"

    def _remedy(self) -> str:
        self._switch.checkpoints.writer.wait()
        last, rolling = "no checkpoint yet", self._switch.checkpoints.rolling
        if rolling.exists():
            last = f"last good checkpoint: {rolling} (step {read_checkpoint(rolling, mapped=True)['global_step']})"
        skip = " or set training.non_finite: skip" if self._switch.run.config.training.non_finite == "stop" else ""
        return f"{last}; a restart with the same settings would fail again: lower optim.lr{skip}"


def _first_non_finite(module: Pretraining, step: int) -> str:
    """Where the numbers of a step first stop being finite when it is run again with the same weights.

    The order is the modules' outputs, the loss, then the gradients backwards. Every process runs its own part of the
    batch; returns the earliest place of all.
    """
    model, names, bad = module.model, list[str](), list[Tensor]()

    def watch(name: str) -> Any:
        def check(_: nn.Module, inputs: Any, output: Any) -> None:
            names.append(f"in the output of {name}")
            bad.append(_any_bad(list(_tensors(output)), module.device))

        return check

    hooks = [submodule.register_forward_hook(watch(name)) for name, submodule in model.named_modules() if name]
    parameters = [(name, p) for name, p in reversed(list(model.named_parameters())) if p.requires_grad]
    try:
        with module.trainer.precision_plugin.forward_context():
            for loss in module.losses_again(step):
                names.append("in the loss")
                bad.append(_any_bad([loss], module.device))
                if isinstance(module.trainer.strategy, Shards):
                    continue  # the gradients are of gathered weights, which are gone
                gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
                for (name, _), gradient in zip(parameters, gradients, strict=True):
                    names.append(f"in the gradient of {name}")
                    bad.append(_any_bad([] if gradient is None else [gradient], module.device))
    finally:
        for hook in hooks:
            hook.remove()
    names.append("nowhere in the forward pass when run again without compilation: in a gradient, or not known")
    first = torch.stack([*bad, torch.ones_like(bad[0])]).int().argmax()
    return names[int(module.trainer.strategy.reduce(first, reduce_op="min"))]


def _any_bad(tensors: list[Tensor], device: torch.device) -> Tensor:
    flags = [~tensor.isfinite().all() for tensor in tensors if tensor.is_floating_point()]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool, device=device)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)
