"""BERT: an encoder that predicts masked tokens; the FFN of a layer is split over two modules."""

from collections.abc import Sequence
from typing import Any

from transformers.models.bert.configuration_bert import BertConfig
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertModel

from ssd_lit.config import ModelConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import Family, FFNSite, Weight


def config_of(config: ModelConfig, vocab: VocabInfo, context: int) -> BertConfig:
    """A BERT for masked tokens with fresh weights and its own FFNs."""
    return BertConfig(
        vocab_size=vocab.vocab_size,
        hidden_size=config.d_model,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.d_ff,
        hidden_act=config.activation,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=context,
        eos_token_id=vocab.eos_id,
        pad_token_id=vocab.eos_id,
    )


WEIGHTS = {
    "w_in": Weight("intermediate.dense.weight"),
    "b_in": Weight("intermediate.dense.bias"),
    "w_out": Weight("output.dense.weight", transposed=True),
    "b_out": Weight("output.dense.bias"),
}


def sites(backbone: Any) -> Sequence[FFNSite]:
    # The rest of `output` stays: dropout, sum and norm.
    modules = ["intermediate", "output.dense"]
    return [
        FFNSite(backbone, f"encoder.layer.{i}", WEIGHTS, modules, activation=backbone.config.hidden_act)
        for i in range(backbone.config.num_hidden_layers)
    ]


BERT = Family("masked", BertForMaskedLM, BertModel, "cls", config_of, sites, {"pooler": "add_pooling_layer"})
