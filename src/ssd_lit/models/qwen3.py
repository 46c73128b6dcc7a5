"""Qwen3: LLaMA's layers with norms of queries and keys, and heads of a width of their own."""

from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM, Qwen3Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family
from ssd_lit.models.llama import shape_of, sites


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> Qwen3Config:
    """A Qwen3 language model with fresh weights and its own FFNs; its heads divide the model's width."""
    return Qwen3Config(**shape_of(config, vocab, context), head_dim=config.d_model // config.heads)


QWEN3 = Family("causal", Qwen3ForCausalLM, Qwen3Model, "lm_head", config_of, sites)
