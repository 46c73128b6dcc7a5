"""Several devices with a whole model each: gradients are added up within the backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from ssd_lit.models.language_model import LanguageModel


class WholeModels(DDPStrategy):
    """Lightning's processes and process group without the wrapper DistributedDataParallel.

    Its hooks start a reduction when a gradient is accumulated. A backward pass that is one CUDA graph accumulates all
    of them at its end, so nothing would overlap; the module adds gradients up itself (`AddedUp`, `add_up_gradients`).
    """

    def configure_ddp(self) -> None:
        """Give all processes the weights of the first, as the wrapper does."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in self.model.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), src=0)


class AddedUp:
    """Stand-ins for a model's weights whose gradients are sums over all processes.

    A stand-in is equal to its weight. The gradients of a layer are added up as soon as its backward pass is done, in
    one operation, while the layers before it go on; compiled code waits for them at the end of the pass only.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        # Compiled code begins a sum where its last gradient is there, and waits for all of them at the end.
        inductor = torch._inductor.config
        inductor.reorder_for_compute_comm_overlap = True
        inductor.reorder_for_compute_comm_overlap_passes = ["raise_comms", "sink_waits"]
        assert dist.group.WORLD is not None
        self._processes = dist.group.WORLD.group_name
        names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups = []
        for layer in reversed(model.layers):
            groups.append([names.pop(parameter) for parameter in layer.parameters() if parameter in names])
        self._groups = [group for group in [*groups, list(names.values())] if group]

    def weights(self) -> dict[str, Tensor]:
        """The stand-ins by name."""
        weights = dict(self._model.named_parameters())
        stand_ins: dict[str, Tensor] = {}
        for group in self._groups:
            stand_ins |= zip(group, _AddUp.apply(self._processes, *[weights[name] for name in group]), strict=True)  # type: ignore[no-untyped-call]
        return stand_ins


class _AddUp(torch.autograd.Function):
    """The identity, whose gradients are added up over all processes."""

    @staticmethod
    def forward(ctx: Any, processes: str, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.processes = processes
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        present = [gradient.contiguous() for gradient in gradients if gradient is not None]
        sums = iter(torch.ops._c10d_functional.all_reduce_coalesced(present, "sum", ctx.processes))
        return None, *(None if gradient is None else collectives.wait_tensor(next(sums)) for gradient in gradients)


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their sums over all processes, in one operation."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    with dist.distributed_c10d._coalescing_manager():
        for gradient in gradients:
            dist.all_reduce(gradient)
