"""OPT: a causal decoder whose FFNs' two maps and activation lie in the decoder layer itself."""

from collections.abc import Sequence
from typing import Any

from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM, OPTModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> OPTConfig:
    """An OPT language model with fresh weights and its own FFNs."""
    return OPTConfig(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        ffn_dim=config.d_ff,
        activation_function=config.activation,
        dropout=config.dropout,
        attention_dropout=config.dropout,
        max_position_embeddings=context,
        pad_token_id=None,  # its embedding would stay zero
        bos_token_id=vocab.eos_id,
        eos_token_id=vocab.eos_id,
        use_cache=False,
    )


WEIGHTS = {
    "w_in": Weight("fc1.weight"),
    "w_out": Weight("fc2.weight", transposed=True),
}
BIASES = {
    "b_in": Weight("fc1.bias"),
    "b_out": Weight("fc2.bias"),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    config = backbone.config
    weights = WEIGHTS | BIASES if config.enable_bias else WEIGHTS
    # The ExpertFFN takes the place of fc1; the other two pass on what it gives. The layer itself drops its output.
    modules = ["fc1", "activation_fn", "fc2"]
    return [
        FFNSite(backbone, f"decoder.layers.{i}", weights, modules, activation=config.activation_function)
        for i in range(config.num_hidden_layers)
    ]


OPT = Family("causal", OPTForCausalLM, OPTModel, "lm_head", config_of, sites)
