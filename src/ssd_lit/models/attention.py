"""Attention over whole blocks of tokens, and beside padding.

Blocks of pre-training have no padding and are read without a cache. A causal mask then says what `is_causal` says, and
a mask between all places says nothing; but compiled, Transformers builds both as tensors (it cannot ask whether
positions start anew within a block), and with a tensor for a mask PyTorch's fastest kernels are out of question.
"""

from typing import Any

from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface

WHOLE_BLOCKS = "whole_blocks"


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention without a mask, causal where the module is."""
    assert attention_mask is None, "blocks have no padding"
    found: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, None, **settings)
    return found


# No mask is registered under that name: Transformers then builds none.
AttentionInterface.register(WHOLE_BLOCKS, _attend)


def attend_whole_blocks(backbone: Any) -> None:
    """Let a backbone attend without masks, wherever the kernels give the mask of its own attention by themselves."""
    if not backbone.config.is_encoder_decoder:  # T5's has a bias for every pair of places
        backbone.set_attn_implementation(WHOLE_BLOCKS)


def attend_beside_padding(backbone: Any) -> None:
    """Let a backbone attend with the masks that it is given, for texts that are filled up to one length."""
    backbone.set_attn_implementation("sdpa")
