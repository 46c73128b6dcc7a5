from pathlib import Path
from typing import Any

import pytest

from ssd_lit.config.pretrained import checkpoint_shape, model_settings, weight_files
from ssd_lit.support.files import write_json
from tests.checkpoint_folders import save_model

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
