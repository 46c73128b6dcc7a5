"""Qwen2: LLaMA's layers with biases in the projections of queries, keys and values."""

from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import shape_of, sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> Qwen2Config:
    """A Qwen2 language model with fresh weights and its own FFNs."""
    return Qwen2Config(**shape_of(config, vocab, context))


QWEN2 = Family("causal", Qwen2ForCausalLM, Qwen2Model, "lm_head", config_of, sites)
