"""Several devices with a whole model each: gradients are added up within the backward pass."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from ssd_lit.models.language_model import LanguageModel


class WholeModels(DDPStrategy):
    """Lightning's processes and process group without the wrapper DistributedDataParallel.

    It copies gradients into buckets and back, and fails where a step leaves some weights without one, as routers are in
    dense phases; the module adds gradients up itself (`GradientSums`).
    """

    def configure_ddp(self) -> None:
        """Give all processes the weights of the first, as the wrapper does."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in self.model.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), src=0)


class GradientSums:
    """Sums of a model's gradients over all processes, in place of them, from `begin` to the end of a backward pass.

    The gradients of a layer are added up as soon as its backward pass is done, in one operation, while the layers
    before it go on.
    """

    def __init__(self, model: LanguageModel):
        self._model = model
        self._begun = False
        self._operations: list[Any] = []
        self._added: set[nn.Parameter] = set()
        for layer in model.layers:
            # Called when the gradients of the layer's inputs are there: the last thing that its backward pass gives.
            layer.register_full_backward_hook(self._after_layer)

    def begin(self) -> None:
        """From now on add up the gradients of layers whose backward pass is done."""
        self._begun = True

    def finish(self) -> None:
        """Add up what is left, gradients outside of the layers, and wait for all sums."""
        self._add_up(self._model.parameters())
        for operation in self._operations:
            operation.wait()
        self._operations.clear()
        self._added.clear()
        self._begun = False

    def _after_layer(self, layer: nn.Module, *_: Any) -> None:
        if self._begun:
            self._add_up(layer.parameters())

    def _add_up(self, parameters: Iterable[nn.Parameter]) -> None:
        left = [p for p in parameters if p.grad is not None and p not in self._added]
        if not left:
            return
        with dist.distributed_c10d._coalescing_manager(async_ops=True) as operation:
            for parameter in left:
                dist.all_reduce(parameter.grad)
        self._operations.append(operation)
        self._added.update(left)
