from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

from ssd_lit.config import ConfigError, DataConfig
from ssd_lit.config.pretrained import check_complete, checkpoint_shape, model_settings, weight_files
from ssd_lit.config.vocabulary import check_checkpoint
from ssd_lit.support.files import write_json
from tests.checkpoint_folders import MODELS, VOCABULARY, change_weights, save_model

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_inner": 48, "activation_function": "relu"},
    "bert": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 48,
             "hidden_act": "relu"},
    "t5": {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 48, "feed_forward_proj": "relu"},
    "llama": {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 48,
              "hidden_act": "relu"},
}  # fmt: skip


def folder(path: Path, family: str, **changes: Any) -> Path:
    write_json(path / "config.json", {"model_type": family, **SETTINGS.get(family, {}), **changes})
    (path / "model.safetensors").touch()
    return path


@pytest.mark.parametrize("family", SETTINGS)
def test_every_family_tells_its_shape_under_our_names(tmp_path: Path, family: str) -> None:
    assert checkpoint_shape(folder(tmp_path, family)) == {
        "family": family, "layers": 2, "d_model": 16, "heads": 2, "d_ff": 48, "activation": "relu",
    }  # fmt: skip
    last = list(SETTINGS[family])[1]
    with pytest.raises(ValueError, match=f"config.json does not say {last}"):
        checkpoint_shape(folder(tmp_path, family, **{last: None}))


def test_what_a_family_leaves_unsaid_or_says_in_its_own_way(tmp_path: Path) -> None:
    assert checkpoint_shape(folder(tmp_path, "gpt2", n_inner=None))["d_ff"] == 64
    for told, activation in (("gated-gelu", "gelu_new"), ("gated-silu", "silu")):
        assert checkpoint_shape(folder(tmp_path, "t5", feed_forward_proj=told))["activation"] == activation


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mamba", {}, "model_type 'mamba'; allowed: gpt2, bert, t5, llama"),
        ("bert", {"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized"),
    ],
)
def test_models_that_cannot_be_used_are_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint_shape(folder(tmp_path, family, **changes))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_json(folder(tmp_path, "gpt2") / "adapter_config.json", {})
    with pytest.raises(ValueError, match="holds an adapter"):
        checkpoint_shape(tmp_path)


def test_settings_come_without_what_could_lead_to_code(tmp_path: Path) -> None:
    code = {"auto_map": {"AutoModel": "evil.Model"}, "attn_implementation": "a/b", "_attn_implementation": "a/b"}
    assert model_settings(folder(tmp_path, "gpt2", **code)) == {"model_type": "gpt2", **SETTINGS["gpt2"]}


def test_weights_are_one_file_or_the_shards_of_an_index(tmp_path: Path) -> None:
    save_model(tmp_path / "one", "gpt2")
    assert [path.name for path in weight_files(tmp_path / "one")] == ["model.safetensors"]
    save_model(tmp_path / "many", "gpt2", max_shard_size="10KB")
    found = weight_files(tmp_path / "many")
    assert len(found) > 1
    assert set(found) == set((tmp_path / "many").glob("*.safetensors"))
    found[0].unlink()
    with pytest.raises(ValueError, match=f"missing or no safetensors: {found[0].name}"):
        weight_files(tmp_path / "many")


def data(tokenizer: Path, length: int = 16) -> DataConfig:
    source = {"kind": "files", "paths": ["text.txt"]}
    section = {"name": "a", "sources": [source], "tokenizer": {"folder": str(tokenizer)}, "sequence_length": length}
    return DataConfig.model_validate(section)


def save_words(folder: Path, words: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))


def test_a_tokenizer_that_is_not_the_checkpoints_own_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt2")
    words = [f"w{number}" for number in range(VOCABULARY)]
    save_words(tmp_path / "other", [*words[:2], words[3], words[2], *words[4:]])
    # Without one of its own there is nothing to compare with.
    check_checkpoint(tmp_path / "model", data(tmp_path / "other"))
    save_words(tmp_path / "model", words)
    with pytest.raises(ConfigError, match=r"its token 2 is 'w3', but that of the checkpoint in .* is 'w2'"):
        check_checkpoint(tmp_path / "model", data(tmp_path / "other"))
    save_words(tmp_path / "fewer", words[:-3])
    check_checkpoint(tmp_path / "model", data(tmp_path / "fewer"))


@pytest.mark.parametrize("family", ["gpt2", "bert", "llama"])
def test_blocks_longer_than_a_checkpoint_reads_are_refused(tmp_path: Path, family: str) -> None:
    save_model(tmp_path, family)
    save_words(tmp_path, [f"w{number}" for number in range(VOCABULARY)])
    check_checkpoint(tmp_path, data(tmp_path, length=32))
    with pytest.raises(ConfigError, match=r"data\.sequence_length 33: .* reads 32 tokens at most"):
        check_checkpoint(tmp_path, data(tmp_path, length=33))


@pytest.mark.parametrize("name", [name for name in MODELS if not name.startswith(("t5 encoder", "t5 tagger"))])
def test_a_whole_checkpoint_is_complete(tmp_path: Path, name: str) -> None:
    save_model(tmp_path, name)
    check_complete(tmp_path)


@pytest.mark.parametrize(
    ("name", "lost"),
    [("gpt2", "h.1.attn.c_attn.weight"), ("bert", "encoder.layer.0.output.LayerNorm.weight"), ("llama", "norm.weight"),
     ("t5", "decoder.block.1.layer.1.EncDecAttention.q.weight"), ("gpt2 base", "wpe.weight")],
)  # fmt: skip
def test_a_checkpoint_without_a_tensor_is_refused(tmp_path: Path, name: str, lost: str) -> None:
    save_model(tmp_path, name)
    change_weights(tmp_path, lambda weights: {key: value for key, value in weights.items() if not key.endswith(lost)})
    with pytest.raises(ValueError, match=f"the weights lack {lost}"):
        check_complete(tmp_path)
