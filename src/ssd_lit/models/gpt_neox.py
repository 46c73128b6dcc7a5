"""GPT-NeoX (Pythia): a causal decoder whose attention and FFN read the same input and are added together."""

from collections.abc import Sequence
from typing import Any

from transformers.models.gpt_neox.configuration_gpt_neox import GPTNeoXConfig
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM, GPTNeoXModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> GPTNeoXConfig:
    """A GPT-NeoX language model with fresh weights and its own FFNs."""
    # A quarter of each head carries positions, as in Pythia; the whole head where a quarter is no even number.
    rotated = 0.25 if config.d_model // config.heads % 8 == 0 else 1.0
    return GPTNeoXConfig(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.d_ff,
        hidden_act=config.activation,
        hidden_dropout=config.dropout,
        attention_dropout=config.dropout,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotated},
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        tie_word_embeddings=True,
        use_cache=False,
    )


WEIGHTS = {
    "w_in": Weight("mlp.dense_h_to_4h.weight"),
    "b_in": Weight("mlp.dense_h_to_4h.bias"),
    "w_out": Weight("mlp.dense_4h_to_h.weight", transposed=True),
    "b_out": Weight("mlp.dense_4h_to_h.bias"),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    # The layer itself drops the FFN's output.
    return [
        FFNSite(backbone, f"layers.{i}", WEIGHTS, ["mlp"], activation=backbone.config.hidden_act)
        for i in range(backbone.config.num_hidden_layers)
    ]


GPT_NEOX = Family("causal", GPTNeoXForCausalLM, GPTNeoXModel, "lm_head", config_of, sites)
