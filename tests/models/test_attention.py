"""Attention without masks."""

import pytest
import torch

from ssd_lit.config import MoEConfig
from ssd_lit.models.language_model import WHOLE_BLOCKS, LanguageModel
from tests.models.test_families import CONTEXT, SPECIALS, batch, config


def model(name: str) -> LanguageModel:
    torch.manual_seed(0)
    moe = MoEConfig(experts=4, top_k=2, backend="grouped")
    return LanguageModel(config(name, dropout=0.0), moe, SPECIALS, context=CONTEXT)


@pytest.mark.parametrize("name", ["gpt2", "bert", "llama"])
def test_blocks_are_attended_to_as_with_a_mask(name: str) -> None:
    """In float64: the eager attention of Transformers adds a mask to every score."""
    built = model(name).double()
    assert built.backbone.config._attn_implementation == WHOLE_BLOCKS
    without = built(batch(name))
    built.backbone.set_attn_implementation("eager")
    torch.testing.assert_close(without, built(batch(name)))


def test_a_saved_model_keeps_its_own_attention() -> None:
    assert WHOLE_BLOCKS not in model("gpt2").backbone.config.to_json_string(use_diff=False)
