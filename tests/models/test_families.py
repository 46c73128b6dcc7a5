"""Every family's backbone with its FFNs swapped, beside the same backbone as Transformers made it."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.data.objectives import IGNORED, Batch, build_objective
from ssd_lit.models.family import Family, FFNParts, family, swap_ffns
from ssd_lit.models.flops import forward_costs
from ssd_lit.models.hooks import ffn_inputs
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.moe.permutation import permute_neurons
from tests.checkpoint_folders import MODELS, save_model

SPECIALS = VocabInfo(vocab_size=50, eos_id=0, mask_id=1, sentinel_ids=(2, 3, 4))
MOE = MoEConfig(experts=4, top_k=1, backend="loop")
CONTEXT = 8
FAMILIES = ("gpt2", "bert", "t5", "llama", "opt", "mistral", "qwen2", "qwen3", "gpt_neox")
FFN_MODULE = {"bert": "intermediate", "t5": "DenseReluDense", "opt": "fc1"}
"""The first of the modules that an ExpertFFN replaces, where it is not `mlp`."""
NO_DROPOUT = GATED = ("llama", "mistral", "qwen2", "qwen3")


def config(name: str, **changes: Any) -> ModelConfig:
    shape = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32, "dropout": 0.0 if name in NO_DROPOUT else 0.1}
    return ModelConfig(**{"family": name, **shape, **changes})


def backbone(kind: Family, settings: ModelConfig, **hf: Any) -> Any:
    """In double precision, with no weight at zero or one where it starts."""
    torch.manual_seed(0)
    hf_config = kind.config(settings, SPECIALS, CONTEXT)
    for key, value in hf.items():
        setattr(hf_config, key, value)
    built = kind.model_class(hf_config).double()
    for parameter in built.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return built


def batch(name: str, blocks: int = 3) -> Batch:
    objective = build_objective(family(name).objective, SPECIALS)
    tokens = torch.randint(5, 50, (blocks, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
    noise = torch.rand(blocks, CONTEXT, objective.noise_per_token, generator=torch.Generator().manual_seed(2))
    return objective({"inputs": tokens[:, :-1], "targets": tokens[:, 1:]}, noise)


def logits(model: Any, name: str, of: Batch) -> torch.Tensor:
    extra = {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(of["targets"])} if name == "t5" else {}
    found: torch.Tensor = model(input_ids=of["inputs"], **extra).logits
    return found


CASES = [
    *((name, {}) for name in FAMILIES),
    ("gpt2", {"activation_function": "gelu_new"}),
    ("bert", {"hidden_act": "gelu"}),
    ("t5", {"is_gated_act": True, "dense_act_fn": "gelu_new"}),
    ("llama", {"hidden_act": "silu"}),
    ("llama", {"mlp_bias": True}),
    ("opt", {"enable_bias": False, "word_embed_proj_dim": 12}),
    ("opt", {"do_layer_norm_before": False}),
    ("mistral", {"head_dim": 6, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 4}),
    ("qwen2", {"hidden_act": "silu", "num_key_value_heads": 1}),
    ("qwen3", {"head_dim": 10, "num_key_value_heads": 1}),
    ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu"}),
]


@pytest.mark.parametrize(("name", "hf"), CASES)
@pytest.mark.parametrize("training", [False, True])
def test_the_swapped_model_computes_what_hugging_face_does(name: str, hf: dict[str, Any], training: bool) -> None:
    """Under the same seed in training too: dropout falls where it fell."""
    theirs = backbone(family(name), config(name), **hf).train(training)
    ours = copy.deepcopy(theirs)
    ffns = swap_ffns(ours, family(name), MOE, router="center")
    assert len(ffns) == (4 if name == "t5" else 2)
    assert all(ffn.training is training for ffn in ffns)
    found = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        found.append(logits(model, name, batch(name)))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_the_mean_cross_entropy_of_the_targets_that_count(name: str) -> None:
    model = LanguageModel(config(name), MOE, SPECIALS, context=CONTEXT).eval()
    of = batch(name)
    log_p = model(of).log_softmax(-1)
    rows, places = (of["targets"] != IGNORED).nonzero(as_tuple=True)
    expected = -sum(log_p[b, s, of["targets"][b, s]] for b, s in zip(rows, places, strict=True)) / len(rows)
    torch.testing.assert_close(model.loss(of), expected)
    assert (len(rows) < of["targets"].numel()) == (name == "bert")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_probe_sees_what_the_ffns_see_and_leaves_the_model_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = LanguageModel(config(name), MOE, SPECIALS, context=CONTEXT).train()
    torch.manual_seed(0)
    theirs = family(name).build(config(name), SPECIALS, CONTEXT).eval()
    seen = []
    for path, module in theirs.named_modules():
        if path.rpartition(".")[2] == FFN_MODULE.get(name, "mlp"):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    of = batch(name)
    logits(theirs, name, of)
    found = ffn_inputs(model, of)
    assert model.training
    decoded = [of["targets"].numel()] * 2 if name == "t5" else []
    assert [len(x) for x in found] == [of["inputs"].numel()] * 2 + decoded
    for mine, expected in zip(found, seen, strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_flops_agree_with_those_that_torch_counts(name: str) -> None:
    # Its products are torch's own, one by one: those within an operator of ours would not be seen.
    visible = MOE.model_copy(update={"backend": "decode_cpu"})
    model = LanguageModel(config(name), visible, SPECIALS, context=CONTEXT).eval()
    # Masked attention would be counted at half in some kernels; the plain one computes the square.
    model.backbone.set_attn_implementation("eager")
    costs = forward_costs(config(name), MOE, SPECIALS, CONTEXT)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batch(name))
        return counter.get_total_flops()

    assert counted() == pytest.approx(3 * (costs.rest + costs.ffn))
    assert costs.dense() == pytest.approx(3 * (costs.rest + costs.ffn))
    for k in (1, 3):
        model.set_mode("sparse", k)
        assert counted() == pytest.approx(3 * (costs.rest + k / 4 * costs.ffn + costs.scores))
        # The backward pass costs twice the forward pass, but for the router, which has none.
        assert costs.sparse(MOE, k) == pytest.approx(3 * (costs.rest + k / 4 * costs.ffn) + costs.scores)


@pytest.mark.parametrize(("name", "hf"), CASES)
def test_weights_go_back_under_the_names_they_came_from(name: str, hf: dict[str, Any]) -> None:
    kind = family(name)
    theirs = backbone(kind, config(name), **hf).eval()
    before, expected = theirs.state_dict(), logits(theirs, name, batch(name))
    ours = copy.deepcopy(theirs)
    ffns = swap_ffns(ours, kind, MOE, router="center")
    as_was = [site.state(FFNParts.of(ffn)) for site, ffn in zip(kind.sites(ours), ffns, strict=True)]
    written = {key: value for state in as_was for key, value in state.items()}
    assert all(torch.equal(value, before[key]) for key, value in written.items())
    # All of a layer's FFN: what is left in the swapped backbone is not.
    assert before.keys() - written.keys() == {key for key in ours.state_dict() if key in before}

    for ffn in ffns:
        permute_neurons(ffn, torch.randperm(32))
    moved = {key: value for site, ffn in zip(kind.sites(ours), ffns, strict=True)
             for key, value in site.state(FFNParts.of(ffn)).items()}  # fmt: skip
    assert any(not torch.equal(value, before[key]) for key, value in moved.items())
    theirs.load_state_dict(moved, strict=False)
    torch.testing.assert_close(logits(theirs, name, batch(name)), expected, rtol=0, atol=1e-12)


def test_a_config_names_its_family_and_its_activation() -> None:
    for name in FAMILIES:
        model = LanguageModel(config(name, activation="silu"), MOE, SPECIALS, context=CONTEXT)
        assert [ffn.activation for ffn in model.ffns] == ["silu"] * (4 if name == "t5" else 2)
        assert [ffn.w_gate is not None for ffn in model.ffns] == [name in GATED] * len(model.ffns)


@pytest.mark.parametrize(("name", "saved"), [(name, f"{name} base") for name in FAMILIES if name != "t5"])
def test_training_may_begin_at_a_model_without_a_head(tmp_path: Path, name: str, saved: str) -> None:
    """What the folder has is read, in full precision; a head of its own is drawn, the same for the same seed."""
    expected = save_model(tmp_path, saved, dtype=torch.bfloat16).state_dict()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        settings = ModelConfig(pretrained=str(tmp_path))
        assert (settings.family, settings.layers, settings.d_model) == (name, 2, 16)
        models.append(LanguageModel(settings, MOE, SPECIALS, context=CONTEXT))
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    assert models[0].training
    assert {parameter.dtype for parameter in models[0].parameters()} == {torch.float32}
    ours = models[0].backbone.base_model.state_dict()
    shared = expected.keys() & ours.keys()
    assert len(shared) > 10
    assert all(torch.equal(ours[key], expected[key].float()) for key in shared)


def test_blocks_longer_than_a_window_are_attended_as_by_hugging_face(tmp_path: Path) -> None:
    wide = transformers.MistralConfig(**{**MODELS["mistral"][1].to_dict(), "sliding_window": 4})
    torch.manual_seed(0)
    theirs = transformers.MistralForCausalLM(wide).eval()
    theirs.save_pretrained(tmp_path)
    ours = LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=CONTEXT).eval()
    tokens = torch.randint(50, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(ours({"inputs": tokens, "targets": tokens}), expected)
        wide.sliding_window = None
        assert not torch.allclose(theirs(tokens).logits, expected)


@pytest.mark.parametrize(
    ("name", "heads", "message"),
    [("llama", 3, "heads 3 does not divide d_model 16"), ("qwen3", 16, "heads of width 1; qwen3 needs an even one")],
)
def test_heads_that_no_model_has_are_refused(name: str, heads: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(name, heads=heads)


def test_heads_of_an_odd_width_are_computed_as_by_hugging_face() -> None:
    for name in ("gpt2", "opt", "bert", "t5"):
        settings = config(name, d_model=15, heads=3, dropout=0.0)
        torch.manual_seed(0)
        theirs = family(name).build(settings, SPECIALS, CONTEXT)
        torch.manual_seed(0)
        ours = LanguageModel(settings, MOE, SPECIALS, context=CONTEXT)
        torch.testing.assert_close(ours(batch(name)), logits(theirs, name, batch(name)))


def test_training_does_not_begin_at_half_a_model(tmp_path: Path) -> None:
    save_model(tmp_path, "t5 encoder")
    with pytest.raises(ValueError, match=r"the weights lack .* of the model's, such as decoder\."):
        LanguageModel(ModelConfig(pretrained=str(tmp_path)), MOE, SPECIALS, context=CONTEXT)
