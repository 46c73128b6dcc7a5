"""A step of generation in kernels of our own, for one text on a GPU."""

import torch
from torch import nn
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

from ssd_lit.moe.ffn import ExpertFFN

WIDTHS, HEAD_WIDTHS = 64, 16
"""What the model's width, and the width of a head, must be multiples of."""


def can_step(model: nn.Module) -> bool:
    """Whether `gpt2.GPT2Step` can be made of a model, in its present mode."""
    if type(model) is not GPT2LMHeadModel:
        return False
    config, width = model.config, model.config.n_embd
    plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx and not config.add_cross_attention
    fits = plain and width % WIDTHS == 0 and width // config.n_head % HEAD_WIDTHS == 0
    return fits and all(isinstance(layer.mlp, ExpertFFN) and _is_known(layer.mlp) for layer in model.transformer.h)


def _is_known(ffn: ExpertFFN) -> bool:
    chooses = ffn.backend in ("auto", "decode_gpu") and not ffn.oracle and ffn.router.expert_vectors() is not None
    in_float = ffn.w_in.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return in_float and ffn.b_gate is None and not ffn.upcycled and (ffn.mode == "dense" or chooses)
