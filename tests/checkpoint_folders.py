"""Checkpoint folders as Transformers writes them, a few thousand weights each."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from ssd_lit.support.files import read_json, write_json

VOCABULARY, D, F = 50, 16, 32

BERT = BertConfig(
    vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=F,
    max_position_embeddings=32, hidden_act="gelu", num_labels=3,
)  # fmt: skip
GPT2 = GPT2Config(
    vocab_size=VOCABULARY, n_embd=D, n_layer=2, n_head=2, n_positions=32, n_inner=F, bos_token_id=0, eos_token_id=0
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=F,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
GQA = {**LLAMA.to_dict(), "num_key_value_heads": 1}
MISTRAL = MistralConfig(**{**GQA, "head_dim": 6, "sliding_window": None})
QWEN2 = Qwen2Config(**{**GQA, "tie_word_embeddings": True})
QWEN3 = Qwen3Config(**{**GQA, "num_attention_heads": 3, "head_dim": 10})
OPT = OPTConfig(
    vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, ffn_dim=F, word_embed_proj_dim=12,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
GPT_NEOX = GPTNeoXConfig(
    vocab_size=VOCABULARY, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, intermediate_size=F,
    max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
)  # fmt: skip
T5_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": D, "d_kv": 8, "d_ff": F, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "eos_token_id": 0, "num_labels": 3,
}  # fmt: skip
T5 = T5Config(**T5_SHAPE)
T5_GATED = T5Config(**T5_SHAPE, feed_forward_proj="gated-gelu", tie_word_embeddings=False)

MODELS: dict[str, tuple[str, Any, str]] = {
    "gpt2": ("GPT2LMHeadModel", GPT2, "AutoModelForCausalLM"),
    "gpt2 base": ("GPT2Model", GPT2Config(**{**GPT2.to_dict(), "n_inner": None}), "AutoModel"),
    "bert": ("BertForMaskedLM", BERT, "AutoModelForMaskedLM"),
    "bert base": ("BertModel", BERT, "AutoModel"),
    "bert classifier": ("BertForSequenceClassification", BERT, "AutoModelForSequenceClassification"),
    "t5": ("T5ForConditionalGeneration", T5, "AutoModelForSeq2SeqLM"),
    "t5 gated": ("T5ForConditionalGeneration", T5_GATED, "AutoModelForSeq2SeqLM"),
    "t5 base": ("T5Model", T5, "AutoModel"),
    "t5 encoder": ("T5EncoderModel", T5, "AutoModelForTextEncoding"),
    "t5 tagger": ("T5ForTokenClassification", T5, "AutoModelForTokenClassification"),
    "llama": ("LlamaForCausalLM", LLAMA, "AutoModelForCausalLM"),
    "llama biased": ("LlamaForCausalLM", LlamaConfig(**{**LLAMA.to_dict(), "mlp_bias": True}), "AutoModelForCausalLM"),
    "llama base": ("LlamaModel", LLAMA, "AutoModel"),
    "opt": ("OPTForCausalLM", OPT, "AutoModelForCausalLM"),
    "opt base": ("OPTModel", OPT, "AutoModel"),
    "mistral": ("MistralForCausalLM", MISTRAL, "AutoModelForCausalLM"),
    "mistral base": ("MistralModel", MISTRAL, "AutoModel"),
    "qwen2": ("Qwen2ForCausalLM", QWEN2, "AutoModelForCausalLM"),
    "qwen2 base": ("Qwen2Model", QWEN2, "AutoModel"),
    "qwen3": ("Qwen3ForCausalLM", QWEN3, "AutoModelForCausalLM"),
    "qwen3 base": ("Qwen3Model", QWEN3, "AutoModel"),
    "gpt_neox": ("GPTNeoXForCausalLM", GPT_NEOX, "AutoModelForCausalLM"),
    "gpt_neox base": ("GPTNeoXModel", GPT_NEOX, "AutoModel"),
    "llama reader": ("LlamaForQuestionAnswering", LLAMA, "AutoModelForQuestionAnswering"),
}
"""Class, config, and the Auto class that opens such a folder."""


def save_model(folder: Path, name: str, dtype: torch.dtype = torch.float64, **how: Any) -> Any:
    """Write a random model, biases and norms included, and return it."""
    class_name, config, _ = MODELS[name]
    torch.manual_seed(0)
    # Of another precision than it is made in: the config of a folder says which one it has.
    model = getattr(transformers, class_name)(copy.deepcopy(config)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, **how)
    return model


def change_settings(folder: Path, **changes: Any) -> None:
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **changes})


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def untie(folder: Path, name: str) -> None:
    """Give the head of a folder weights of its own; of T5's settings, as those of T5 1.1 say it."""
    rows = {"gpt2": "lm_head.weight", "t5": "lm_head.weight", "bert": "cls.predictions.decoder.weight"}[name]
    shape = read_json(folder / "config.json")["vocab_size"], D
    head = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    change_weights(folder, lambda weights: {**weights, rows: head.to(next(iter(weights.values())).dtype)})
    if name == "t5":
        settings = read_json(folder / "config.json")
        del settings["scale_decoder_outputs"]
        write_json(folder / "config.json", {**settings, "tie_word_embeddings": False})


def outputs(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The main output, [B, ...]; an encoder-decoder reads the tokens on both sides."""
    both = model.config.is_encoder_decoder and hasattr(model.base_model, "decoder")
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, **({"decoder_input_ids": tokens} if both else {}))[0]
    return found
