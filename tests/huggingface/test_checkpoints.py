"""Checkpoint folders as other programs leave them: read as what they are, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers.activations import ACT2FN

import ssd_lit
from ssd_lit.config import ConfigError, ModelConfig, MoEConfig, dump, load_experiment, load_resolved
from ssd_lit.config.pretrained import (
    FFN_INPUTS,
    SAME_ACTIVATION,
    check_weights,
    checkpoint_shape,
    has_tied_head,
    stored_tensors,
    weight_files,
)
from ssd_lit.data.index import VocabInfo
from ssd_lit.huggingface.moefy import moefy_folder
from ssd_lit.models.family import family
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.activations import ACTIVATIONS
from ssd_lit.support.files import read_json
from tests.checkpoint_folders import (
    MODELS,
    VOCABULARY,
    D,
    F,
    change_settings,
    change_weights,
    outputs,
    save_model,
    untie,
)
from tests.conftest import tiny_experiment

SPECIALS = VocabInfo(vocab_size=VOCABULARY, eos_id=0, mask_id=1, sentinel_ids=(2, 3, 4))
MOE = MoEConfig(experts=4, top_k=2, backend="loop")


HEADS = [("gpt2", False), ("gpt2", True), ("bert", False), ("bert", True), ("t5", False), ("t5", True),
         ("llama", False)]  # fmt: skip


@pytest.mark.parametrize(("name", "untied"), HEADS)
def test_training_and_what_follows_it_have_the_head_of_the_checkpoint(
    tmp_path: Path, name: str, untied: bool, tokens: torch.Tensor
) -> None:
    """Read from the folder, built for a checkpoint that is loaded next, or opened: one architecture."""
    save_model(tmp_path, name)
    if untied:
        untie(tmp_path, name)
    settings = ModelConfig(pretrained=str(tmp_path))
    read = LanguageModel(settings, MOE, SPECIALS, context=8)
    built = LanguageModel(settings, MOE, SPECIALS, context=8, read_weights=False)
    built.load_state_dict(read.state_dict())
    assert [key for key, _ in read.named_parameters()] == [key for key, _ in built.named_parameters()]
    assert has_tied_head(tmp_path) == (not untied and name != "llama")
    theirs = getattr(transformers, MODELS[name][0]).from_pretrained(tmp_path, dtype=torch.float32).eval()
    for model in (read, built):
        torch.testing.assert_close(outputs(model.eval().backbone, tokens), outputs(theirs, tokens))
    opened = family(name).open(tmp_path)
    torch.testing.assert_close(outputs(opened.float(), tokens), outputs(theirs, tokens))


def test_of_weights_that_are_one_the_head_may_be_the_one_that_is_kept(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path, "gpt2")
    kept = {"transformer.wte.weight": "lm_head.weight"}
    change_weights(tmp_path, lambda weights: {kept.get(key, key): value for key, value in weights.items()})
    torch.testing.assert_close(outputs(family("gpt2").open(tmp_path), tokens), outputs(original, tokens))


@pytest.mark.parametrize("kept", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"])
def test_a_t5_may_have_its_embeddings_under_any_of_their_names(tmp_path: Path, kept: str, tokens: torch.Tensor) -> None:
    """Beside a head of its own, of which its settings say nothing."""
    save_model(tmp_path, "t5")
    untie(tmp_path, "t5")
    change_settings(tmp_path, tie_word_embeddings=None)
    original = family("t5").open(tmp_path)
    change_weights(tmp_path, lambda weights: {kept if k == "shared.weight" else k: v for k, v in weights.items()})
    assert not has_tied_head(tmp_path)
    torch.testing.assert_close(outputs(family("t5").open(tmp_path), tokens), outputs(original, tokens))
    change_weights(tmp_path, lambda weights: {**weights, "shared.weight": weights[kept] + 1})
    with pytest.raises(ValueError, match="differ; they are one tensor in every T5"):
        family("t5").open(tmp_path)


def test_the_head_of_a_gpt_neox_may_have_the_name_that_pythia_gives_it(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path / "dense", "gpt_neox")
    names = {"lm_head.weight": "embed_out.weight"}
    change_weights(tmp_path / "dense", lambda weights: {names.get(key, key): value for key, value in weights.items()})
    assert "lm_head.weight" in stored_tensors(tmp_path / "dense")
    assert not has_tied_head(tmp_path / "dense")
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").eval()
    for opened in (family("gpt_neox").open(tmp_path / "dense"), plain, ssd_lit.load(tmp_path / "out")):
        torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    LanguageModel(ModelConfig(pretrained=str(tmp_path / "dense")), MOE, SPECIALS, context=8)


def test_norms_may_have_the_names_of_the_first_bert(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path / "dense", "bert")
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

    def renamed(key: str) -> str:
        layer, _, last = key.partition("LayerNorm")
        return layer + names.get(f"LayerNorm{last}", f"LayerNorm{last}") if last else key

    change_weights(tmp_path / "dense", lambda weights: {renamed(key): value for key, value in weights.items()})
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    opened = ssd_lit.load(tmp_path / "out")
    torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    opened.save_pretrained(tmp_path / "again")
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path / "again", dtype="auto").eval()
    torch.testing.assert_close(outputs(again, tokens), outputs(original, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama", "opt", "qwen3", "gpt_neox"])
def test_headers_tell_a_shape_that_is_not_that_of_the_settings(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, name)
    check_weights(tmp_path)
    key = FFN_INPUTS[name][0][0].format(1)
    weights = load_file(tmp_path / "model.safetensors")
    full = next(one for one in weights if one.endswith(key))
    pruned = weights[full][:, : F // 2] if name == "gpt2" else weights[full][: F // 2]
    change_weights(tmp_path, lambda weights: {**weights, full: pruned.contiguous()})
    with pytest.raises(ValueError, match=r"the FFN of layer 1 is of shape .*config.json says 32 neurons"):
        moefy_folder(tmp_path, tmp_path / "out", MOE)
    change_weights(tmp_path, lambda weights: {key: value for key, value in weights.items() if key != full})
    with pytest.raises(ValueError, match=f"the weights lack .*{key}"):
        ModelConfig(pretrained=str(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
def test_embeddings_have_as_many_rows_as_the_settings_say(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path, name)
    change_settings(tmp_path, vocab_size=VOCABULARY + 6)
    with pytest.raises(ValueError, match=r"embeds 50 tokens, but config\.json says vocab_size 56"):
        ModelConfig(pretrained=str(tmp_path))
    with pytest.raises(ValueError, match="embeds 50 tokens"):
        family(name).open(tmp_path)
    original.resize_token_embeddings(VOCABULARY + 14)
    original.save_pretrained(tmp_path)
    model = LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8).eval()
    torch.testing.assert_close(outputs(model.backbone, tokens), outputs(original.float(), tokens))


def test_a_t5_may_have_heads_that_do_not_divide_its_width(tmp_path: Path, tokens: torch.Tensor) -> None:
    config = transformers.T5Config(**{**MODELS["t5"][1].to_dict(), "num_heads": 3})
    original = transformers.T5ForConditionalGeneration(config).eval()
    original.save_pretrained(tmp_path)
    model = LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8).eval()
    torch.testing.assert_close(outputs(model.backbone, tokens), outputs(original, tokens))


def test_a_llama_whose_heads_do_not_divide_its_width_is_refused_as_by_transformers(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    change_settings(tmp_path, num_attention_heads=3, num_key_value_heads=3, head_dim=8)
    for use in (checkpoint_shape, family("llama").open):
        with pytest.raises(ValueError, match="num_attention_heads 3 does not divide hidden_size 16"):
            use(tmp_path)


def test_a_width_of_heads_of_its_own_is_read(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**MODELS["llama"][1].to_dict(), "head_dim": 6})
    )
    original.eval().save_pretrained(tmp_path)
    model = LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8).eval()
    torch.testing.assert_close(outputs(model.backbone, tokens), outputs(original, tokens))


def test_shards_hold_what_their_index_says(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2", max_shard_size="10KB")
    stored_tensors(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    index = read_json(path)
    name, other = "transformer.wte.weight", index["weight_map"]["transformer.h.1.mlp.c_fc.weight"]
    for told, message in (
        ({name: other}, f"puts {name} into {other}, but it is in"),
        ({"extra": other}, f"puts extra into {other}, but it is in no shard"),
    ):
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], **told}}))
        with pytest.raises(ValueError, match=message):
            stored_tensors(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\x09" + b"\0" * 7 + b"[1, 2, 3]", b"\xff" * 20])
def test_files_that_are_no_safetensors_are_named(tmp_path: Path, content: bytes) -> None:
    save_model(tmp_path, "gpt2")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (content, whole[:-1], whole[:100]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"model\.safetensors: (not a safetensors file, or damaged|cut off)"):
            ModelConfig(pretrained=str(tmp_path))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("shards", [False, True])
def test_names_may_be_those_of_a_wrapped_model(
    tmp_path: Path, wrapper: str, shards: bool, tokens: torch.Tensor
) -> None:
    dense, out = tmp_path / "dense", tmp_path / "out"
    original = save_model(dense, "gpt2", max_shard_size="10KB" if shards else "50GB")
    for file in weight_files(dense):
        weights = {wrapper + key: value for key, value in load_file(file).items()}
        save_file(weights, file, metadata={"format": "pt"})
    if shards:
        index = read_json(dense / "model.safetensors.index.json")
        index["weight_map"] = {wrapper + key: file for key, file in index["weight_map"].items()}
        (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    LanguageModel(ModelConfig(pretrained=str(dense)), MOE, SPECIALS, context=8)
    moefy_folder(dense, out, MOE)
    plain = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    for opened in (family("gpt2").open(dense), plain, ssd_lit.load(out)):
        torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    opened = family("gpt2").open(dense)
    opened.save_pretrained(tmp_path / "saved")
    assert set(stored_tensors(tmp_path / "saved")) == set(stored_tensors(dense))


NAMES = [("gpt2", "activation_function", "gelu_pytorch_tanh"), ("gpt2", "activation_function", "gelu_fast"),
         ("bert", "hidden_act", "gelu_python"), ("llama", "hidden_act", "swish"),
         ("t5", "feed_forward_proj", "gated-gelu_pytorch_tanh")]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "activation"), NAMES)
def test_activations_go_by_every_name_that_they_have(
    tmp_path: Path, name: str, key: str, activation: str, tokens: torch.Tensor
) -> None:
    config = type(MODELS[name][1]).from_dict({**MODELS[name][1].to_dict(), key: activation})
    original = getattr(transformers, MODELS[name][0])(config).double().eval()
    original.save_pretrained(tmp_path / "dense")
    assert ModelConfig(pretrained=str(tmp_path / "dense")).activation in ("gelu", "gelu_new", "silu")
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    opened = ssd_lit.load(tmp_path / "out")
    torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-9)


def test_every_further_name_of_an_activation_is_of_that_function() -> None:
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    for name, ours in SAME_ACTIVATION.items():
        torch.testing.assert_close(ACT2FN[name](x), ACTIVATIONS[ours](x), rtol=0, atol=1e-9)


def test_places_that_no_model_of_ours_has_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    change_settings(tmp_path, position_embedding_type="relative_key")
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key'"):
        ModelConfig(pretrained=str(tmp_path))


CLASSES = [("llama", "LLaMAForCausalLM"), ("llama", None), ("t5", "T5WithLMHeadModel"),
           ("t5 gated", "T5WithLMHeadModel"), ("gpt2", "MyGPT2"), ("gpt2", None), ("bert", None),
           ("bert", "BertModel")]  # fmt: skip


@pytest.mark.parametrize(("name", "told"), CLASSES)
def test_a_head_stays_whatever_the_class_is_called(
    tmp_path: Path, name: str, told: str | None, tokens: torch.Tensor
) -> None:
    original = save_model(tmp_path / "dense", name)
    change_settings(tmp_path / "dense", architectures=told and [told], auto_map={"AutoModel": "mine.Model"})
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    assert read_json(tmp_path / "out/config.json")["architectures"] == [MODELS[name][0]]
    opened = ssd_lit.load(tmp_path / "out")
    assert type(opened) is type(original)
    torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bert base", "bert", "bert classifier"])
@pytest.mark.parametrize("told", [True, False])
def test_a_bert_may_come_without_its_pooler(tmp_path: Path, name: str, told: bool, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path / "dense", name)
    change_weights(tmp_path / "dense", lambda weights: {k: v for k, v in weights.items() if "pooler" not in k})
    if not told:
        change_settings(tmp_path / "dense", architectures=None)
    if name == "bert classifier":
        why = r"lack 2 of the model's, such as bert\.pooler" if told else r"BertModel .* such as classifier\.bias"
        with pytest.raises(ValueError, match=why):
            moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
        return
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    opened = ssd_lit.load(tmp_path / "out")
    torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    LanguageModel(ModelConfig(pretrained=str(tmp_path / "dense")), MOE, SPECIALS, context=8)


UNREAD = [("llama", "model.layers.0.mlp.up_proj.bias", F), ("llama", "model.layers.1.self_attn.q_proj.bias", D),
          ("bert", "bert.encoder.layer.0.attention.self.distance_embedding.weight", D),
          ("gpt2", "transformer.h.2.ln_1.weight", D), ("gpt2", "score.weight", D),
          ("t5", "adapter.weight", D)]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "size"), UNREAD)
def test_weights_that_nobody_reads_are_refused(tmp_path: Path, name: str, key: str, size: int) -> None:
    save_model(tmp_path, name)
    change_weights(tmp_path, lambda weights: {**weights, key: torch.ones(size, dtype=torch.float64)})
    for use in (
        lambda: moefy_folder(tmp_path, tmp_path / "out", MOE),
        lambda: LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8),
    ):
        with pytest.raises(ValueError, match=f"{tmp_path}: the weights hold 1 that a .* such as {key}"):
            use()


@pytest.mark.parametrize(
    ("name", "keys"),
    [("gpt2", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
     ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
     ("bert", ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.seq_relationship.weight"])],
)  # fmt: skip
def test_what_is_computed_or_of_another_task_need_not_be_read(tmp_path: Path, name: str, keys: list[str]) -> None:
    save_model(tmp_path, name)
    change_weights(tmp_path, lambda weights: {**weights, **{key: torch.ones(3) for key in keys}})
    family(name).open(tmp_path)
    LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8)


@pytest.mark.parametrize(
    ("name", "key"),
    [("t5", "shared.weight"), ("t5 gated", "shared.weight"), ("bert", "cls.predictions.transform.dense.bias"),
     ("gpt2", "transformer.h.1.attn.c_attn.weight"), ("llama", "model.norm.weight"), ("llama", "lm_head.weight")],
)  # fmt: skip
def test_nothing_but_a_whole_head_is_drawn(tmp_path: Path, name: str, key: str) -> None:
    save_model(tmp_path, name)
    if name == "t5 gated":
        untie(tmp_path, "t5")
    change_weights(tmp_path, lambda weights: {k: v for k, v in weights.items() if k != key})
    with pytest.raises(ValueError, match=f"the weights lack .*{key}"):
        family(name.split()[0]).open(tmp_path)
    if key != "lm_head.weight":
        with pytest.raises(ValueError, match=f"the weights lack .*{key}"):
            LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=8)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    change_settings(tmp_path, num_key_value_heads=1)
    with pytest.raises(
        ValueError, match=r"4 weights are not of the shape .* such as model\.layers\.0\.self_attn\.k_proj"
    ):
        family("llama").open(tmp_path)


def test_settings_that_transformers_refuses_are_answered_in_a_line(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    change_settings(tmp_path, rms_norm_eps="small")
    with pytest.raises(ValueError, match=r"config\.json: .*rms_norm_eps"):
        family("llama").open(tmp_path)


@pytest.mark.parametrize("told", ["float16", "bfloat16", "float64", None])
def test_precision_is_that_of_the_weights_not_of_the_settings(
    tmp_path: Path, told: str | None, tokens: torch.Tensor
) -> None:
    original = save_model(tmp_path / "dense", "llama", dtype=torch.float32)
    inverse = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64)}
    change_weights(tmp_path / "dense", lambda weights: weights | inverse)
    change_settings(tmp_path / "dense", dtype=told)
    moefy_folder(tmp_path / "dense", tmp_path / "out", MOE)
    opened = ssd_lit.load(tmp_path / "out")
    assert {parameter.dtype for parameter in opened.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(opened, tokens), outputs(original, tokens))


def test_weights_of_several_precisions_get_the_highest(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path, "gpt2", dtype=torch.bfloat16).float()
    change_weights(tmp_path, lambda weights: {k: v.float() if "ln" in k else v for k, v in weights.items()})
    torch.testing.assert_close(outputs(family("gpt2").open(tmp_path), tokens), outputs(original, tokens))
    change_weights(tmp_path, lambda weights: {k: v.to(torch.int8) if "c_fc" in k else v for k, v in weights.items()})
    with pytest.raises(ValueError, match=r"c_fc\.\w+ is kept as I8; allowed: F64, F32, BF16, F16"):
        family("gpt2").open(tmp_path)


def test_a_checkpoint_is_trained_with_the_tokens_that_it_embeds(tmp_path: Path) -> None:
    """Said before anything starts, and never of an experiment that is done."""
    checkpoint = tmp_path / "checkpoint"
    save_model(checkpoint, "gpt2")

    def experiment(tokenizer: dict[str, Any]) -> Path:
        data = {"name": "grammar", "sources": [{"kind": "files", "paths": ["text.txt"]}],
                "tokenizer": tokenizer, "sequence_length": 16}  # fmt: skip
        model = {"pretrained": str(checkpoint)}
        return tiny_experiment(tmp_path, data=data, model=model, arms={"dense": {"method": "dense"}})

    own = {"folder": str(checkpoint)}
    with pytest.raises(
        ConfigError, match=f"model.pretrained .* give its own as data.tokenizer.folder, such as {checkpoint}"
    ):
        load_experiment(experiment({"vocab_size": 300}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.folder: no tokenizer\.json in folder"):
        load_experiment(experiment(own))
    for tokenizer in (models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"),
                      models.Unigram([(f"w{i}", 0.0) for i in range(VOCABULARY)], 0)):  # fmt: skip
        words = Tokenizer(tokenizer)
        words.save(str(checkpoint / "tokenizer.json"))
        checked = load_experiment(experiment(own))
        words.add_special_tokens(["<one more>"])
        words.save(str(checkpoint / "tokenizer.json"))
        with pytest.raises(ConfigError, match=r"has 51 tokens, but the checkpoint in .* embeds 50"):
            load_experiment(experiment(own))
    (checkpoint / "tokenizer.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: not a tokenizer"):
        load_experiment(experiment(own))
    (checkpoint / "tokenizer.json").unlink()
    (tmp_path / "done.yaml").write_text(dump(checked))
    assert load_resolved(tmp_path / "done.yaml") == checked


def test_an_experiment_whose_checkpoint_lacks_weights_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint", "gpt2")
    change_weights(
        tmp_path / "checkpoint", lambda weights: {key: value for key, value in weights.items() if "h.1" not in key}
    )
    with pytest.raises(ConfigError, match=r"model: .*the weights lack h\.1\.mlp\.c_fc\.weight"):
        load_experiment(tiny_experiment(tmp_path, model={"pretrained": str(tmp_path / "checkpoint")}))
