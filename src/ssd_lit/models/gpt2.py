"""GPT-2: a causal decoder; the FFN of a layer is one module of two Conv1D (transposed linear) maps."""

from collections.abc import Sequence
from typing import Any

from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> GPT2Config:
    """A GPT-2 language model with fresh weights and its own FFNs."""
    return GPT2Config(
        vocab_size=vocab.vocab_size,
        n_positions=context,
        n_embd=config.d_model,
        n_layer=config.layers,
        n_head=config.heads,
        n_inner=config.d_ff,
        activation_function=config.activation,
        resid_pdrop=config.dropout,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        use_cache=False,
    )


WEIGHTS = {
    "w_in": Weight("mlp.c_fc.weight", transposed=True),
    "b_in": Weight("mlp.c_fc.bias"),
    "w_out": Weight("mlp.c_proj.weight"),
    "b_out": Weight("mlp.c_proj.bias"),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    config = backbone.config
    return [
        FFNSite(backbone, f"h.{i}", WEIGHTS, ["mlp"], activation=config.activation_function, dropout=config.resid_pdrop)
        for i in range(config.n_layer)
    ]


GPT2 = Family("causal", GPT2LMHeadModel, GPT2Model, "lm_head", config_of, sites)
