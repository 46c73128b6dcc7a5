"""GPT-2: a causal decoder whose FFN lives in one module a layer, as two Conv1D (transposed linear) maps."""

from typing import Any

import torch
from torch import nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.moe.ffn import ExpertFFN


def build(config: ModelConfig, *, vocab_size: int, context: int, end_of_text: int) -> nn.Module:
    """A GPT-2 language model with fresh weights and its own FFNs."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=context,
            n_embd=config.d_model,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.d_ff,
            activation_function=config.activation,
            resid_pdrop=config.dropout,
            embd_pdrop=config.dropout,
            attn_pdrop=config.dropout,
            bos_token_id=end_of_text,
            eos_token_id=end_of_text,
            use_cache=False,
        )
    )


@torch.no_grad()
def swap_ffns(backbone: Any, moe: MoEConfig) -> list[ExpertFFN]:
    """Replace the FFN of every layer by an ExpertFFN that holds the same weights; returns them, first layer first."""
    swapped = []
    for block in backbone.transformer.h:
        mlp = block.mlp
        d_model, d_ff = mlp.c_fc.weight.shape
        ffn = ExpertFFN(d_model, d_ff, experts=moe.experts, top_k=moe.top_k, dropout=mlp.dropout.p, backend=moe.backend)
        ffn.to(mlp.c_fc.weight)  # its dtype and device
        ffn.w_in.copy_(mlp.c_fc.weight.T)
        ffn.b_in.copy_(mlp.c_fc.bias)
        ffn.w_out.copy_(mlp.c_proj.weight)
        ffn.b_out.copy_(mlp.c_proj.bias)
        block.mlp = ffn.train(mlp.training)
        swapped.append(ffn)
    return swapped
