"""Reading checkpoints and building what goes into them, with and without Lightning."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ssd_lit.config import RunConfig
from ssd_lit.models.language_model import LanguageModel

PREFIX = "model."  # The model is `Pretraining.model`, so its weights carry this prefix in a checkpoint.

SWITCH_STATE = "PhaseSwitch"  # The phase switch keeps its state under this key of a checkpoint's callbacks.


def build_model(config: RunConfig, *, vocab_size: int, end_of_text: int) -> LanguageModel:
    """The run's model with fresh weights, a function of its config and seed."""
    torch.manual_seed(config.seed)
    return LanguageModel(
        config.model,
        config.moe,
        vocab_size=vocab_size,
        context=config.data.sequence_length,
        end_of_text=end_of_text,
    )


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, tensors and plain values only; ValueError if it is missing or broken."""
    if not path.exists():
        raise ValueError(f"{path}: not found; run the phase that writes it (delete its phase.json if that is there)")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: not a readable checkpoint ({error}); delete it and run again") from error
    return content


def load_weights(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Load the weights of a checkpoint into the model, every one of them."""
    model.load_state_dict({name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()})


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights under the names that a checkpoint gives them."""
    return {PREFIX + name: value for name, value in model.state_dict().items()}
