"""Mistral: LLaMA's layers with attention that may look back over a window only, and heads of a width of their own."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> MistralConfig:
    """A Mistral language model with fresh weights and its own FFNs; attention without a window."""
    return MistralConfig(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.heads,
        intermediate_size=config.d_ff,
        hidden_act=config.activation,
        max_position_embeddings=context,
        sliding_window=None,
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        tie_word_embeddings=True,
        use_cache=False,
    )


MISTRAL = Family("causal", MistralForCausalLM, MistralModel, "lm_head", config_of, sites)
