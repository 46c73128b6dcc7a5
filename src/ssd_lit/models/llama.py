"""LLaMA: a causal decoder with gated FFNs, whose gate, up and down projections share one neuron order."""

from collections.abc import Sequence
from typing import Any

from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def shape_of(config: ModelConfig, vocab: VocabInfo, context: int) -> dict[str, Any]:
    """What LLaMA's config class and those modelled on it are told of a fresh model."""
    return {
        "vocab_size": vocab.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "intermediate_size": config.d_ff,
        "hidden_act": config.activation,
        "max_position_embeddings": context,
        "bos_token_id": vocab.eos_id,
        "eos_token_id": vocab.eos_id,
        "tie_word_embeddings": True,
        "use_cache": False,
    }


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> LlamaConfig:
    """A LLaMA language model with fresh weights and its own FFNs: ReGLU with relu, SwiGLU with silu."""
    return LlamaConfig(**shape_of(config, vocab, context))


WEIGHTS = {
    "w_gate": Weight("mlp.gate_proj.weight"),
    "w_in": Weight("mlp.up_proj.weight"),
    "w_out": Weight("mlp.down_proj.weight", transposed=True),
}
BIASES = {
    "b_gate": Weight("mlp.gate_proj.bias"),
    "b_in": Weight("mlp.up_proj.bias"),
    "b_out": Weight("mlp.down_proj.bias"),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    # Mistral and Qwen, whose layers are the same, have no such setting.
    weights = WEIGHTS | BIASES if getattr(backbone.config, "mlp_bias", False) else WEIGHTS
    return [
        FFNSite(backbone, f"layers.{i}", weights, ["mlp"], activation=backbone.config.hidden_act)
        for i in range(backbone.config.num_hidden_layers)
    ]


LLAMA = Family("causal", LlamaForCausalLM, LlamaModel, "lm_head", config_of, sites)
