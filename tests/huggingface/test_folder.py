"""Folders with experts: opened by Transformers, opened by us, and what is refused."""

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn import functional

import ssd_lit
from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.moefy import moefy_folder
from ssd_lit.models.hooks import capture_inputs
from ssd_lit.moe.ffn import ExpertFFN
from ssd_lit.support.files import read_json, write_json
from tests.checkpoint_folders import BERT, MODELS, F, outputs, save_model
from tests.huggingface.test_moefy import add_tokenizer, write_text

E, K = 8, 3
MOE = MoEConfig(experts=E, top_k=K)


def moefied(folder: Path, name: str = "gpt2", moe: MoEConfig = MOE, **how: Any) -> tuple[Any, Path]:
    """A saved model, and the folder that it became."""
    model = save_model(folder / "dense", name, **how)
    moefy_folder(folder / "dense", folder / "experts", moe)
    return model, folder / "experts"


def experts_of(model: Any) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


@pytest.mark.parametrize("name", MODELS)
def test_every_way_to_open_a_folder_gives_the_outputs_of_the_original(
    tmp_path: Path, name: str, tokens: torch.Tensor
) -> None:
    original, folder = moefied(tmp_path, name)
    expected = outputs(original, tokens)
    plain = getattr(transformers, MODELS[name][2]).from_pretrained(folder, dtype="auto").eval()
    ours = ssd_lit.load(folder)
    assert type(ours) is type(original)
    assert not ours.training
    assert experts_of(ours)
    before, after = load_file(tmp_path / "dense/model.safetensors"), load_file(folder / "model.safetensors")
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    for model in (plain, ours, ssd_lit.load(folder, mode="sparse", top_k=E)):
        torch.testing.assert_close(outputs(model, tokens), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "llama"])
def test_a_model_in_float32_stays_the_same_to_rounding(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    original, folder = moefied(tmp_path, name, dtype=torch.float32)
    expected = outputs(original, tokens)
    found = outputs(ssd_lit.load(folder), tokens)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def by_hand(x: torch.Tensor, weights: dict[str, torch.Tensor], centers: torch.Tensor, act: Any) -> torch.Tensor:
    """Token by token, neuron by neuron, only those of the K experts whose centres point most along the token."""
    out = torch.zeros_like(x)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:-1])):
        token = x[tuple(place)]
        for expert in (centers @ token).argsort(descending=True)[:K]:
            for neuron in range(int(expert) * F // E, (int(expert) + 1) * F // E):
                hidden = weights["w_in"][neuron] @ token
                if "b_in" in weights:
                    hidden = hidden + weights["b_in"][neuron]
                hidden = act(weights["w_gate"][neuron] @ token) * hidden if "w_gate" in weights else act(hidden)
                out[tuple(place)] += hidden * weights["w_out"][neuron]
    return out + weights.get("b_out", 0)


@pytest.mark.parametrize("name", ["gpt2", "bert base", "t5 gated", "llama"])
def test_sparse_mode_is_what_the_files_say_computed_by_hand(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    _, folder = moefied(tmp_path, name)
    files, centers = load_file(folder / "model.safetensors"), load_file(folder / "experts.safetensors")
    plain = getattr(transformers, MODELS[name][2]).from_pretrained(folder, dtype="auto").eval()
    base = plain.base_model
    match name.split()[0]:
        case "gpt2":
            layers, modules, act = [f"transformer.h.{i}.mlp." for i in (0, 1)], [b.mlp for b in base.h], gelu_tanh
            parts = {"w_in": "c_fc.weight", "b_in": "c_fc.bias", "w_out": "c_proj.weight", "b_out": "c_proj.bias"}
            turned = {"w_in"}
        case "bert":
            layers, act = [f"encoder.layer.{i}." for i in (0, 1)], functional.gelu
            modules = [layer.intermediate for layer in base.encoder.layer]
            for layer in base.encoder.layer:
                layer.output.dense = torch.nn.Identity()
            parts = {"w_in": "intermediate.dense.weight", "b_in": "intermediate.dense.bias",
                     "w_out": "output.dense.weight", "b_out": "output.dense.bias"}  # fmt: skip
            turned = {"w_out"}
        case "t5":
            layers = [f"{side}.block.{i}.layer.{at}.DenseReluDense." for side, at in (("encoder", 1), ("decoder", 2))
                      for i in (0, 1)]  # fmt: skip
            modules = [b.layer[-1].DenseReluDense for b in (*base.encoder.block, *base.decoder.block)]
            parts, turned, act = (
                {"w_gate": "wi_0.weight", "w_in": "wi_1.weight", "w_out": "wo.weight"},
                {"w_out"},
                gelu_tanh,
            )
        case _:
            layers, modules = [f"model.layers.{i}.mlp." for i in (0, 1)], [layer.mlp for layer in base.layers]
            parts = {"w_gate": "gate_proj.weight", "w_in": "up_proj.weight", "w_out": "down_proj.weight"}
            turned, act = {"w_out"}, functional.silu
    for number, (layer, module) in enumerate(zip(layers, modules, strict=True)):
        weights = {part: files[layer + key].T if part in turned else files[layer + key] for part, key in parts.items()}
        router = centers[f"{number}.router.centers"]
        module.forward = lambda x, weights=weights, router=router: by_hand(x, weights, router, act)
    sparse = ssd_lit.load(folder, mode="sparse")
    expected = outputs(plain, tokens)
    torch.testing.assert_close(outputs(sparse, tokens), expected, rtol=0, atol=1e-11)
    ssd_lit.set_mode(sparse, "dense")
    assert (outputs(sparse, tokens) - expected).abs().max() > 1e-3


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


@pytest.mark.parametrize("name", ["gpt2", "t5", "llama", "opt", "mistral", "qwen2", "qwen3", "gpt_neox"])
def test_generation_works_in_both_modes_with_the_cache(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    original, folder = moefied(tmp_path, name)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    expected = original.generate(tokens, **how)
    model = ssd_lit.load(folder)
    assert torch.equal(model.generate(tokens, **how), expected)
    ssd_lit.set_mode(model, "sparse", top_k=E)
    assert torch.equal(model.generate(tokens, **how), expected)
    ssd_lit.set_mode(model, "sparse", top_k=1)
    cached = model.generate(tokens, **how)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **how))
    assert not torch.equal(cached, expected)


@pytest.mark.parametrize("router", ["random", "center"])
def test_shards_and_base_names_and_tensors_of_other_heads_stay(
    tmp_path: Path, router: str, tokens: torch.Tensor
) -> None:
    """A checkpoint with a pooler and two heads, cut into shards, named as one with a single head."""
    torch.manual_seed(0)
    original = transformers.BertForPreTraining(BERT).double().eval()
    original.save_pretrained(tmp_path / "dense", max_shard_size="5KB")
    settings = read_json(tmp_path / "dense/config.json")
    write_json(tmp_path / "dense/config.json", {**settings, "architectures": ["BertForMaskedLM"]})
    moefy_folder(tmp_path / "dense", tmp_path / "experts", MoEConfig(experts=E, top_k=K, router=router))
    names = {path.name for path in (tmp_path / "dense").glob("*.safetensors")}
    assert len(names) > 3
    assert {path.name for path in (tmp_path / "experts").glob("*.safetensors")} == names | {"experts.safetensors"}
    model = ssd_lit.load(tmp_path / "experts", mode="sparse", top_k=E)
    assert isinstance(model, transformers.BertForMaskedLM)
    torch.testing.assert_close(outputs(model, tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    again = transformers.BertForPreTraining.from_pretrained(tmp_path / "experts", dtype="auto").eval()
    with torch.no_grad():
        found, expected = again(tokens), original(tokens)
    torch.testing.assert_close(found.seq_relationship_logits, expected.seq_relationship_logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_precision_stays_and_routers_have_more(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    original, folder = moefied(tmp_path, name, dtype=torch.bfloat16)
    before, after = load_file(tmp_path / "dense/model.safetensors"), load_file(folder / "model.safetensors")
    assert {key: value.dtype for key, value in after.items()} == {key: value.dtype for key, value in before.items()}
    for key in after:
        assert torch.equal(after[key].flatten().sort().values, before[key].flatten().sort().values)
    model = ssd_lit.load(folder, mode="sparse", top_k=E)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(ffn.router.centers.dtype == torch.float32 for ffn in experts_of(model))
    expected = outputs(original.float(), tokens)
    assert (outputs(model, tokens).float() - expected).norm() < 0.03 * expected.norm()


def test_a_t5_in_float16_is_opened_in_float32(tmp_path: Path, tokens: torch.Tensor) -> None:
    original, folder = moefied(tmp_path, "t5", dtype=torch.float16)
    model = ssd_lit.load(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(outputs(model, tokens), outputs(original.float(), tokens))


def test_a_mode_that_a_folder_does_not_have_is_refused_before_it_is_read(tmp_path: Path) -> None:
    _, folder = moefied(tmp_path)
    (folder / "model.safetensors").write_bytes(b"")
    for arguments, message in (
        ({"mode": "sparse", "top_k": 9}, "top_k 9: allowed are 1 to 8"),
        ({"top_k": 0}, "top_k 0: allowed are 1 to 8"),
        ({"mode": "quick"}, "mode 'quick': allowed are dense, sparse"),
        ({"backend": "magic"}, "backend 'magic': allowed are auto, masked"),
        ({"mode": "sparse", "threshold": 0.1}, "threshold 0.1: .* can be negative; .*centers"),
        ({"threshold": 0.1, "top_k": 2}, "top_k 2 and threshold 0.1: give one of them"),
    ):
        with pytest.raises(ValueError, match=message):
            ssd_lit.load(folder, **arguments)


def routed(folder: Path, **how: Any) -> Path:
    """A folder whose routers were trained on a text."""
    save_model(folder / "dense", "gpt2")
    add_tokenizer(folder / "dense")
    write_text(folder / "text.txt", [25] * 10)
    moe = MoEConfig(experts=E, top_k=K, posthoc_router="centers", router_steps=5)
    moefy_folder(folder / "dense", folder / "experts", moe, text=folder / "text.txt", **how)
    return folder / "experts"


def test_dynamic_k_is_chosen_at_opening_and_reported(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = routed(tmp_path)
    assert "threshold" not in read_json(folder / "experts.json")
    model = ssd_lit.load(folder, mode="sparse", threshold=0.9)
    assert ssd_lit.mean_k(model) is None
    with capture_inputs(experts_of(model)) as inputs:
        found = outputs(model, tokens)
    scores = torch.cat([ffn.router(x).detach() for ffn, x in inputs.items()])  # type: ignore[operator]
    taken = int((scores >= 0.9 * scores.amax(dim=1, keepdim=True)).sum())
    assert ssd_lit.mean_k(model) == taken / len(scores)
    for ffn in experts_of(model):
        ffn.backend = "masked"
    torch.testing.assert_close(outputs(model, tokens), found, rtol=0, atol=1e-12)
    ssd_lit.set_mode(model, "sparse", threshold=0.0)
    dense = outputs(ssd_lit.load(folder), tokens)
    torch.testing.assert_close(outputs(model, tokens), dense, rtol=0, atol=1e-12)
    assert ssd_lit.mean_k(model) == E
    assert (found - dense).abs().max() > 1e-3
    with pytest.raises(ValueError, match="has no FFNs with experts"):
        ssd_lit.mean_k(transformers.AutoModelForCausalLM.from_pretrained(folder))


def test_a_folder_may_name_a_threshold(tmp_path: Path, tokens: torch.Tensor) -> None:
    folder = routed(tmp_path, threshold=0.9)
    assert "those whose score is at least 0.9 of the best one's" in (folder / "README.md").read_text()
    model, wanted = ssd_lit.load(folder, mode="sparse"), ssd_lit.load(folder, mode="sparse", threshold=0.9)
    assert torch.equal(outputs(model, tokens), outputs(wanted, tokens))
    fixed = ssd_lit.load(folder, mode="sparse", top_k=K)
    assert all(ffn.threshold is None for ffn in experts_of(fixed))
    model.save_pretrained(tmp_path / "again")
    again = ssd_lit.load(tmp_path / "again")
    ssd_lit.set_mode(again, "sparse")
    assert torch.equal(outputs(again, tokens), outputs(wanted, tokens))
    with pytest.raises(ValueError, match=r"threshold 0.9: .*can be negative"):
        moefy_folder(tmp_path / "dense", tmp_path / "refused", MOE, threshold=0.9)
    assert not (tmp_path / "refused").exists()


def test_folders_that_are_no_moefied_model_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json in folder .*no such folder"):
        ssd_lit.load(tmp_path / "nowhere")
    _, folder = moefied(tmp_path)
    shutil.copytree(folder, tmp_path / "mixed")
    shutil.copyfile(tmp_path / "dense/model.safetensors", tmp_path / "mixed/model.safetensors")
    with pytest.raises(ValueError, match="made for other weights, or another order of neurons"):
        ssd_lit.load(tmp_path / "mixed")
    told = read_json(folder / "experts.json")
    for change, message in (
        ({"format": 2}, "not of format 1"),
        ({"router": "norm_mlp"}, "its routers are not of the kind"),
        ({"colour": "red"}, "not a record of experts"),
    ):
        write_json(folder / "experts.json", {**told, **change})
        with pytest.raises(ValueError, match=message):
            ssd_lit.load(folder)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no FFNs with experts"):
        ssd_lit.set_mode(transformers.AutoModelForCausalLM.from_pretrained(folder), "sparse")


def test_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    save_model(tmp_path, "bert base")
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack 1 of the model's, such as encoder.layer.1.attention.self.query.weight"):
        moefy_folder(tmp_path, tmp_path / "experts", MOE)
    assert not (tmp_path / "experts").exists()


@pytest.mark.parametrize("name", ["Evil", "BertLayer", "BertPreTrainedModel", "AutoModel", "PreTrainedModel", None, 3])
def test_a_class_that_is_none_of_the_family_gives_the_base_model(
    tmp_path: Path, name: Any, tokens: torch.Tensor
) -> None:
    original = save_model(tmp_path / "dense", "bert base")
    settings = read_json(tmp_path / "dense/config.json")
    write_json(tmp_path / "dense/config.json", {**settings, "architectures": [name]})
    moefy_folder(tmp_path / "dense", tmp_path / "experts", MOE)
    model = ssd_lit.load(tmp_path / "experts")
    assert type(model) is transformers.BertModel
    torch.testing.assert_close(outputs(model, tokens), outputs(original, tokens), rtol=0, atol=1e-12)


class Touching:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_nothing_of_a_folder_is_run(tmp_path: Path) -> None:
    """Neither a class that its config names, nor a generate function, nor a kernel, nor anything pickled."""
    trace = tmp_path / "trace"
    dense = tmp_path / "dense"
    save_model(dense, "gpt2")
    evil = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Model: ...\ndef generate(*a, **k): ...\n"
    (dense / "custom_generate").mkdir()
    for place in ("evil.py", "modeling_gpt2.py", "custom_generate/generate.py"):
        (dense / place).write_text(evil)
    (dense / "pytorch_model.bin").write_bytes(pickle.dumps(Touching(trace)))
    settings = read_json(dense / "config.json")
    auto = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "evil.Model")
    hints = {"auto_map": auto, "attn_implementation": "nobody/evil", "transformers_weights": "pytorch_model.bin"}
    write_json(dense / "config.json", {**settings, **hints})
    moefy_folder(dense, tmp_path / "experts", MOE)
    model = ssd_lit.load(tmp_path / "experts", mode="sparse")
    model.generate(torch.zeros(1, 2, dtype=torch.long), max_new_tokens=2, pad_token_id=0)
    assert not trace.exists()
    pickle.loads((dense / "pytorch_model.bin").read_bytes())
    assert trace.exists()
    written = {path.name for path in (tmp_path / "experts").iterdir()}
    assert written == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "experts.safetensors",
        "experts.json",
        "README.md",
    }
    assert not hints.keys() & read_json(tmp_path / "experts/config.json").keys()


def test_a_folder_that_could_not_be_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "dense", "gpt2")

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("ssd_lit.huggingface.moefy.write_experts", fail)
    with pytest.raises(OSError, match="no space left"):
        moefy_folder(tmp_path / "dense", tmp_path / "experts", MOE)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_the_index_of_shards_names_safetensors_of_the_folder_only(tmp_path: Path) -> None:
    save_model(tmp_path, "gpt2", max_shard_size="5KB")
    path = tmp_path / "model.safetensors.index.json"
    index = read_json(path)
    for shard in ("pytorch_model.bin", "../model.safetensors", "gone.safetensors"):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        path.write_text(json.dumps({**index, "weight_map": {**index["weight_map"], "wte.weight": shard}}))
        with pytest.raises(ValueError, match="names shards that are missing or no safetensors"):
            moefy_folder(tmp_path, tmp_path / "experts", MOE)


def test_a_folder_without_experts_opens_in_dense_mode_only(tmp_path: Path, tokens: torch.Tensor) -> None:
    original = save_model(tmp_path, "gpt2")
    torch.testing.assert_close(outputs(ssd_lit.load(tmp_path), tokens), outputs(original, tokens), rtol=0, atol=1e-12)
    for arguments in ({"mode": "sparse"}, {"top_k": 2}):
        with pytest.raises(ValueError, match=r"no experts.json in folder .*dense only; `ssd-lit moefy --model`"):
            ssd_lit.load(tmp_path, **arguments)


@pytest.mark.parametrize(
    "name", ["gpt2", "bert", "t5", "t5 gated", "llama biased", "opt", "mistral", "qwen3", "gpt_neox"]
)
def test_what_load_gave_can_be_saved_and_loaded_again(tmp_path: Path, name: str, tokens: torch.Tensor) -> None:
    """As it is by then; and so can copies of it, without taking the weights of the one that they were made from."""
    _, folder = moefied(tmp_path, name)
    loaded = ssd_lit.load(folder, mode="sparse")
    before = outputs(loaded, tokens)
    model = copy.deepcopy(loaded)
    for ffn in experts_of(model):
        ffn.w_out.data.mul_(1.5)
    expected = outputs(model, tokens)
    assert not torch.equal(expected, before)
    torch.save(model, tmp_path / "whole.pt")
    for one, shards in ((model, "50GB"), (torch.load(tmp_path / "whole.pt", weights_only=False), "10KB")):
        one.save_pretrained(tmp_path / "again", max_shard_size=shards)
        again = ssd_lit.load(tmp_path / "again", mode="sparse")
        for mine, theirs in zip(experts_of(again), experts_of(model), strict=True):
            assert torch.equal(mine.w_out, theirs.w_out)
        # Not the same bits: products of weights that lie elsewhere in memory may be added in another order.
        torch.testing.assert_close(outputs(again, tokens), expected, rtol=0, atol=1e-12)
        plain = getattr(transformers, MODELS[name][2]).from_pretrained(tmp_path / "again", dtype="auto").eval()
        ssd_lit.set_mode(model, "dense")
        torch.testing.assert_close(outputs(plain, tokens), outputs(model, tokens), rtol=0, atol=1e-12)
        with pytest.raises(TypeError, match="variant"):
            one.save_pretrained(tmp_path / "other", variant="fp16")
        assert not (tmp_path / "other").exists()
