"""Qwen2: LLaMA's layers with biases in the projections of queries, keys and values."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> Qwen2Config:
    """A Qwen2 language model with fresh weights and its own FFNs."""
    return Qwen2Config(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.d_ff,
        hidden_act=config.activation,
        max_position_embeddings=context,
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        tie_word_embeddings=True,
        use_cache=False,
    )


QWEN2 = Family("causal", Qwen2ForCausalLM, Qwen2Model, "lm_head", config_of, sites)
