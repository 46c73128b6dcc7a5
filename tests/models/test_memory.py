"""The estimate of training memory, against what autograd saves on real tensors."""

import pytest
import torch
from torch import Tensor

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.memory import training_memory

VOCAB = VocabInfo(vocab_size=50, eos_id=0, mask_id=1, sentinel_ids=(2, 3))
MOE = MoEConfig(experts=4, top_k=2)


def saved_bytes(model: LanguageModel, blocks: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, weights apart."""
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inputs = torch.randint(4, 50, (blocks, 12))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model({"inputs": inputs, "targets": inputs}, head=False)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_the_estimate_is_what_autograd_saves(family: str) -> None:
    shape = {"family": family, "layers": 3, "d_model": 16, "heads": 2, "d_ff": 32}
    config = ModelConfig.model_validate({**shape, **({} if family == "llama" else {"dropout": 0.0})})
    model = LanguageModel(config, MOE, VOCAB, context=12)
    memory = training_memory(config, MOE, VOCAB, 12, torch.float32)
    assert memory.parameters == sum(p.numel() for p in model.parameters())
    assert saved_bytes(model, 7) - saved_bytes(model, 3) == pytest.approx(4 * memory.layers, rel=0.02)
    # Adam, and weights and gradients: 16 bytes a weight, divided among devices. Each of many still holds a whole layer
    # and what lies outside the layers, in float32.
    assert memory.of_step(0) == pytest.approx(16 * memory.parameters, rel=0.02)
    assert memory.of_step(0, shards=2) - memory.of_step(0, shards=4) == memory.of_step(0) / 4
    two_layers = sum(p.numel() for layer in model.layers[1:] for p in layer.parameters())
    assert memory.of_step(0, shards=10**9) > 4 * (memory.parameters - two_layers)
    assert memory.of_step(4, checkpointing=True) < memory.of_step(4)
