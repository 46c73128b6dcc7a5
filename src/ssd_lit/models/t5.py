"""T5: an encoder and a decoder trained on cut-out spans. No biases; dropout between activation and output."""

from collections.abc import Sequence
from typing import Any

from transformers.models.t5.configuration_t5 import T5Config
from transformers.models.t5.modeling_t5 import T5ForConditionalGeneration, T5Model

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> T5Config:
    """A T5 with fresh weights and its own FFNs, as many layers in the encoder as in the decoder."""
    return T5Config(
        vocab_size=vocab.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_model // config.heads,
        d_ff=config.d_ff,
        num_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj=config.activation,
        dropout_rate=config.dropout,
        eos_token_id=vocab.eos_id,
        pad_token_id=vocab.eos_id,
        decoder_start_token_id=vocab.eos_id,  # type: ignore[call-arg]
        use_cache=False,
    )


WEIGHTS = {
    "w_in": Weight("DenseReluDense.wi.weight"),
    "w_out": Weight("DenseReluDense.wo.weight", transposed=True),
}
GATED_WEIGHTS = {
    "w_gate": Weight("DenseReluDense.wi_0.weight"),
    "w_in": Weight("DenseReluDense.wi_1.weight"),
    "w_out": Weight("DenseReluDense.wo.weight", transposed=True),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    """The encoder's, then the decoder's if there is one; gated (T5 1.1) or not."""
    config, base = backbone.config, backbone.base_model
    layers = [f"encoder.block.{i}.layer.1" for i in range(len(base.encoder.block))]
    if hasattr(base, "decoder"):
        # Layer 1 of a decoder block is the attention to the encoder.
        layers += [f"decoder.block.{i}.layer.2" for i in range(len(base.decoder.block))]
    weights = GATED_WEIGHTS if config.is_gated_act else WEIGHTS
    settings = {"activation": config.dense_act_fn, "hidden_dropout": config.dropout_rate}
    return [FFNSite(backbone, layer, weights, ["DenseReluDense"], **settings) for layer in layers]


T5 = Family("spans", T5ForConditionalGeneration, T5Model, "lm_head", config_of, sites)
