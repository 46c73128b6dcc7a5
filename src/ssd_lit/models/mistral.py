"""Mistral: LLaMA's layers with attention that may look back over a window only, and heads of a width of their own."""

from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import shape_of, sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> MistralConfig:
    """A Mistral language model with fresh weights and its own FFNs; attention without a window."""
    return MistralConfig(**shape_of(config, vocab, context), sliding_window=None)


MISTRAL = Family("causal", MistralForCausalLM, MistralModel, "lm_head", config_of, sites)
