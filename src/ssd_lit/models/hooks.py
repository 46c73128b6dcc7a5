"""The inputs of the FFNs of a model, and their weights where a layer is divided among devices."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ssd_lit.data.objectives import Batch
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.ffn import ExpertFFN


@contextmanager
def capture_inputs(ffns: Sequence[ExpertFFN]) -> Iterator[dict[nn.Module, Tensor]]:
    """Yields a dict with the inputs [T, D] of every FFN in its latest forward pass."""
    captured: dict[nn.Module, Tensor] = {}

    def capture(ffn: nn.Module, inputs: tuple[Any, ...]) -> None:
        captured[ffn] = inputs[0].flatten(0, -2)

    hooks = [ffn.register_forward_pre_hook(capture) for ffn in ffns]
    try:
        yield captured
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def ffn_inputs(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The inputs [T, D] of every FFN, in the model's order, from a forward pass over a batch without dropout.

    T is the number of input tokens of the batch, or of its targets in the decoder of an encoder-decoder.
    """
    training = model.training
    try:
        # Layers that are compiled one by one do not see hooks that come later.
        with capture_inputs(model.ffns) as captured, torch.compiler.set_stance("force_eager"):
            model.eval()(batch, head=False)
    finally:
        model.train(training)
    return [captured[ffn] for ffn in model.ffns]


def ffn_tokens(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The token ids [T] of the rows of `ffn_inputs`, for every FFN in the model's order."""
    inputs = batch["inputs"].flatten()
    if model.objective_name != "spans":
        return [inputs] * len(model.ffns)
    encoder = model.backbone.config.num_layers
    decoder_inputs = model.decoder_inputs(batch).flatten()
    return [inputs] * encoder + [decoder_inputs] * (len(model.ffns) - encoder)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[None]:
    """Give a layer all its weights, outside of its forward pass too; all processes must do so together."""
    if not isinstance(layer, FSDPModule):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()
