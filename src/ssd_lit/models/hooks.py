"""What the FFNs of a model see."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssd_lit.data.objectives import Batch
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.ffn import ExpertFFN


@contextmanager
def capture_inputs(ffns: Sequence[ExpertFFN]) -> Iterator[dict[nn.Module, Tensor]]:
    """Give the inputs [T, D] of every FFN in its latest forward pass."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(ffn: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[ffn] = inputs[0].flatten(0, -2)

    hooks = [ffn.register_forward_pre_hook(keep) for ffn in ffns]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def ffn_inputs(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The inputs [T, D] of every FFN in the model's order, in a forward pass over a batch without dropout.

    T is the number of the batch's input tokens, or of its targets in the decoder of an encoder-decoder.
    """
    training = model.training
    try:
        with capture_inputs(model.ffns) as seen:
            model.eval().run_layers(batch)
    finally:
        model.train(training)
    return [seen[ffn] for ffn in model.ffns]


def ffn_tokens(model: LanguageModel, batch: Batch) -> list[Tensor]:
    """The ids [T] of the tokens that the rows of `ffn_inputs` stand for, for every FFN in the model's order."""
    inputs = batch["inputs"].flatten()
    if model.objective_name != "spans":
        return [inputs] * len(model.ffns)
    encoder = model.backbone.config.num_layers
    decoded = model.decoder_inputs(batch).flatten()
    return [inputs] * encoder + [decoded] * (len(model.ffns) - encoder)
