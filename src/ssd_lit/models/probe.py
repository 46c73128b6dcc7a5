"""What the FFNs of a model see."""

from typing import Any

import torch
from torch import Tensor, nn

from ssd_lit.models.language_model import LanguageModel


@torch.no_grad()
def ffn_inputs(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """The inputs [T, D] of every FFN, first layer first, in a forward pass over tokens [B, S] without dropout."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))

    training = model.training
    hooks = [ffn.register_forward_pre_hook(keep) for ffn in model.ffns]
    try:
        model.eval()(tokens)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return seen
