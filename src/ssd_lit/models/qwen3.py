"""Qwen3: LLaMA's layers with norms of queries and keys, and heads of a width of their own."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> Qwen3Config:
    """A Qwen3 language model with fresh weights and its own FFNs; its heads divide the model's width."""
    return Qwen3Config(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        head_dim=config.d_model // config.heads,
        intermediate_size=config.d_ff,
        hidden_act=config.activation,
        max_position_embeddings=context,
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        tie_word_embeddings=True,
        use_cache=False,
    )


QWEN3 = Family("causal", Qwen3ForCausalLM, Qwen3Model, "lm_head", config_of, sites)
