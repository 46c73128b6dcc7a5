"""Greedy generation gives the tokens that Transformers gives, in both modes."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.folder import set_mode
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.models.generation import Generator, linear, product, row_products
from ssd_lit.models.hooks import capture_inputs
from ssd_lit.moe.ffn import ExpertFFN
from tests.checkpoint_folders import MODELS

E, K, PROMPT, NEW = 8, 3, 5, 12
BATCHES = [
    ("gpt2", 1),
    ("gpt2", 3),
    ("llama", 1),
    ("llama", 3),
    ("opt", 2),
    ("mistral", 2),
    ("qwen2", 2),
    ("qwen3", 2),
    ("gpt_neox", 2),
]


def sparse_model(name: str, dtype: torch.dtype = torch.float64, router: str = "center") -> Any:
    torch.manual_seed(0)
    class_name, config, _ = MODELS[name]
    model = getattr(transformers, class_name)(copy.deepcopy(config)).to(dtype).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    for ffn in swap_ffns(model, family(name), MoEConfig(experts=E, top_k=K), router=router):
        ffn.router.on_permuted(ffn.gating_weight)
        ffn.router.init_trainable(ffn.gating_weight)
    model.generation_config.eos_token_id = None
    return model


def experts_of(model: Any) -> list[ExpertFFN]:
    return [module for module in model.modules() if isinstance(module, ExpertFFN)]


@pytest.mark.parametrize(("name", "batch"), BATCHES)
def test_tokens_are_those_of_transformers_in_both_modes(name: str, batch: int) -> None:
    model = sparse_model(name)
    generator = Generator(model)
    found = {}
    for number, mode in enumerate(("dense", "sparse", "dense")):  # the generator follows a change of mode
        set_mode(model, mode)  # type: ignore[arg-type]
        prompt = torch.randint(50, (batch, PROMPT), generator=torch.Generator().manual_seed(3 * number))
        expected = model.generate(prompt, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert torch.equal(generator(prompt, NEW), expected)
        # The places of an earlier text are overwritten.
        assert torch.equal(generator(expected[:, -PROMPT:], NEW)[:, :PROMPT], expected[:, -PROMPT:])
        assert torch.equal(generator(prompt, NEW), expected)
        found[mode] = generator(prompt[:1].expand(batch, -1), 1)
        assert found[mode].shape == (batch, PROMPT + 1)


@pytest.mark.parametrize(("name", "batch"), [("gpt2", 1), ("llama", 3)])
def test_with_dynamic_k_tokens_and_mean_k_are_those_of_whole_forward_passes(name: str, batch: int) -> None:
    model = sparse_model(name, router="centers").to(torch.float64)
    generator = Generator(model)
    prompt = torch.randint(50, (batch, PROMPT), generator=torch.Generator().manual_seed(0))
    assert generator.mean_k is None
    texts, ks = [], []
    for threshold in (0.3, 0.6, 0.9):  # the generator follows a change of threshold
        set_mode(model, "sparse", threshold=threshold)
        expected, taken = prompt, 0
        for step in range(NEW):
            with torch.no_grad(), capture_inputs(experts_of(model)) as inputs:
                logits = model(input_ids=expected, use_cache=False).logits[:, -1]
            if step:  # the first token comes from reading the prompt
                for ffn, x in inputs.items():
                    scores = ffn.router(x).unflatten(0, expected.shape)[:, -1]  # type: ignore[operator]
                    taken += int((scores >= threshold * scores.amax(-1, keepdim=True)).sum())
            expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
        assert torch.equal(generator(prompt, NEW), expected)
        assert generator.mean_k == pytest.approx(taken / (2 * batch * (NEW - 1)))
        texts.append(expected)
        ks.append(generator.mean_k)
    assert E > ks[0] > ks[1] > ks[2] >= 1
    assert any(not torch.equal(text, texts[0]) for text in texts)
    set_mode(model, "dense")
    generator(prompt, NEW)
    assert generator.mean_k is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox"])
def test_the_compiled_step_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sparse_model(name)
    set_mode(model, "sparse")
    prompt = torch.randint(50, (2, PROMPT), generator=torch.Generator().manual_seed(0))
    expected = Generator(model)(prompt, NEW)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    torch._dynamo.reset()
    assert torch.equal(Generator(model, compiled=True)(prompt, NEW), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("size", [(64, 96), (64, 50), (50, 64)])
@pytest.mark.parametrize("rows", [(1, 1), (2, 1), (1, 3), ()])
def test_products_in_blocks_are_products(size: tuple[int, int], rows: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    w, b_in, b_out = (torch.randn(*shape, generator=g) for shape in (size, size[:1], size[1:]))
    x, h = torch.randn(*rows, size[1], generator=g), torch.randn(*rows, size[0], generator=g)
    for bias in (None, b_in):
        torch.testing.assert_close(linear(x, w, bias), F.linear(x, w, bias), rtol=1e-4, atol=1e-4)
    for bias in (None, b_out):
        torch.testing.assert_close(product(h, w, bias), h @ w + (0 if bias is None else bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_model_in_blocks_gives_its_outputs_and_is_left_as_it_was(name: str) -> None:
    model = sparse_model(name, torch.float32)
    token = torch.tensor([[7]])
    before = dict(vars(model.lm_head))
    with torch.inference_mode():
        expected = model(token).logits
        with row_products(model):
            found = model(token).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert vars(model.lm_head) == before


def test_more_tokens_than_a_window_are_refused() -> None:
    model = sparse_model("mistral")
    model.config.sliding_window = 8
    with pytest.raises(ValueError, match=r"5 \+ 12 tokens: more than the window of 8"):
        Generator(model)(torch.zeros(1, PROMPT, dtype=torch.long), NEW)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 \+ 13 tokens: this model has 32 positions"):
        Generator(sparse_model("gpt2"))(torch.zeros(1, 20, dtype=torch.long), 13)


def test_what_cannot_be_continued_is_refused() -> None:
    token = torch.zeros(1, 1, dtype=torch.long)
    for name in ("bert", "t5"):
        class_name, config, _ = MODELS[name]
        with pytest.raises(ValueError, match="does not continue text"):
            Generator(getattr(transformers, class_name)(config))(token, 3)
    generator = Generator(sparse_model("gpt2"))
    with pytest.raises(ValueError, match="without tokens"):
        generator(token[:, :0], 3)
    generator.start(token, 3)
    generator.advance(1)
    with pytest.raises(ValueError, match="2 more tokens: there is space for 1"):
        generator.advance(2)


def test_a_model_in_training_generates_without_dropout_and_stays_in_training() -> None:
    class_name, config, _ = MODELS["gpt2"]
    torch.manual_seed(0)
    drops = {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5}
    model = getattr(transformers, class_name)(type(config)(**{**config.to_dict(), **drops})).eval()
    prompt, generator = torch.tensor([[1, 2, 3]]), Generator(model)
    expected = generator(prompt, NEW)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):
        assert torch.equal(generator(prompt, NEW), expected)
    assert [module.training for module in model.modules()] == modes


def test_a_wrapper_around_a_layer_is_heeded_and_stays() -> None:
    model = sparse_model("gpt2", torch.float32)
    likeliest = Generator(model)(torch.tensor([[7]]), 1)[0, 1]
    plain = model.lm_head.forward

    def banning(x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = plain(x).index_fill(-1, likeliest, -torch.inf)
        return logits

    model.lm_head.forward = banning
    generator = Generator(model)
    for length in (2, 5):
        assert likeliest not in generator(torch.tensor([[7] * length]), NEW)[0, length:]
    assert model.lm_head.forward is banning


def test_a_generator_follows_a_change_of_precision() -> None:
    model, prompt = sparse_model("gpt2", torch.float32), torch.tensor([[1, 2, 3]])
    generator = Generator(model)
    expected = generator(prompt, NEW)
    half = Generator(copy.deepcopy(model).bfloat16())(prompt, NEW)
    assert torch.equal(Generator(model.bfloat16())(prompt, NEW), half)
    assert torch.equal(generator(prompt, NEW), half)
    model.float()
    assert generator(prompt, NEW).shape == expected.shape
