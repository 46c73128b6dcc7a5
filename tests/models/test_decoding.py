"""The step of generation in kernels against Transformers' own, through Triton's interpreter."""

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton", reason="comes with torch for CUDA, and with the extra dev")

import torch
import transformers
from torch import Tensor

from ssd_lit.config import MoEConfig
from ssd_lit.huggingface.folder import set_mode
from ssd_lit.models.decoding import gpt2 as decoding
from ssd_lit.models.decoding.gpt2 import GPT2Step, can_step
from ssd_lit.models.family import family, swap_ffns

E, K, PLACES = 6, 2, 300


def model(router: str = "center", activation: str = "relu") -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_positions=PLACES, n_embd=192, n_layer=2, n_head=4, n_inner=60 * E,
        activation_function=activation, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    gpt2 = transformers.GPT2LMHeadModel(config).eval().requires_grad_(False)
    for parameter in gpt2.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    for ffn in swap_ffns(gpt2, family("gpt2"), MoEConfig(experts=E, top_k=K), router=router):
        ffn.router.on_permuted(ffn.gating_weight)
        ffn.router.init_trainable(ffn.gating_weight)
        ffn.requires_grad_(False)
    return gpt2


def logits_of_both(gpt2: Any, read: int, steps: int) -> tuple[list[Tensor], list[Tensor]]:
    """Logits after each of `steps` tokens behind `read`, by Transformers in one pass and by the step."""
    tokens = torch.randint(97, (1, read + steps), generator=torch.Generator().manual_seed(1))
    expected = gpt2(tokens).logits[:, read:]
    start = gpt2(tokens[:, :read], use_cache=True).past_key_values
    cache = []
    for layer in start.layers:
        pair = [torch.full((*part.shape[:2], PLACES, part.shape[3]), torch.nan) for part in (layer.keys, layer.values)]
        for place, part in zip(pair, (layer.keys, layer.values), strict=True):
            place[:, :, :read] = part
        cache.append((pair[0], pair[1]))
    last, position = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long)
    assert can_step(gpt2)
    step = GPT2Step(gpt2, last, position, cache)
    step.refresh()
    found = []
    for number in range(read, read + steps):
        last.copy_(tokens[:, number : number + 1])
        position.fill_(number)
        found.append(step().clone())
        assert step.likeliest.item() == found[-1].argmax()
    return list(expected.unbind(1)), found


def tallies_of(gpt2: Any) -> Tensor:
    return torch.stack([layer.mlp.tally for layer in gpt2.transformer.h])


@pytest.mark.parametrize(
    ("mode", "router", "activation"),
    [
        ("dense", "center", "gelu_new"),
        ("sparse", "center", "relu"),
        ("sparse", "gate", "relu"),
        ("sparse", "centers", "silu"),
    ],
)
def test_logits_are_those_of_transformers(mode: Any, router: str, activation: str) -> None:
    gpt2 = model(router, activation)
    set_mode(gpt2, mode)
    # The second token behind 255 begins another piece of the cache.
    for expected, found in zip(*logits_of_both(gpt2, read=255, steps=2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_wide_model_is_taken_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROJECT", "MIX"):
        monkeypatch.setitem(getattr(decoding, name), "ROWS", 64)
    gpt2 = model()
    set_mode(gpt2, "sparse")
    for expected, found in zip(*logits_of_both(gpt2, read=5, steps=2), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_threshold_chooses_as_many_experts_as_reach_it() -> None:
    gpt2 = model("centers")
    set_mode(gpt2, "sparse", threshold=0.6)
    expected, found = logits_of_both(gpt2, read=5, steps=2)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    # Counted: the two passes of Transformers over 7 and 5 tokens, and two steps.
    before = tallies_of(gpt2)
    assert before[:, 1].tolist() == [7 + 5 + 2] * 2
    tokens = torch.randint(97, (1, 7), generator=torch.Generator().manual_seed(1))
    gpt2(tokens)
    whole = tallies_of(gpt2) - before
    gpt2(tokens[:, :5])
    read = tallies_of(gpt2) - before - whole
    assert torch.equal(before, whole + read + (whole - read))


def test_models_that_the_kernels_do_not_fit_keep_the_step_of_transformers() -> None:
    gpt2 = model()
    set_mode(gpt2, "sparse")
    assert can_step(gpt2)
    ffn = gpt2.transformer.h[0].mlp
    ffn.experts = decoding.MOST_EXPERTS + 1  # more than a program can compare
    assert not can_step(gpt2)
    set_mode(gpt2, "dense")
    assert can_step(gpt2)
    narrow = transformers.GPT2Config(vocab_size=97, n_embd=96, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0)
    assert not can_step(transformers.GPT2LMHeadModel(narrow))


@pytest.mark.parametrize("change", [lambda to, value: to.copy_(value), lambda to, value: to.data.copy_(value)])
def test_the_step_takes_up_changed_weights(change: Callable[[Tensor, Tensor], Any]) -> None:
    gpt2 = model()
    set_mode(gpt2, "sparse")
    step = GPT2Step(
        gpt2, torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long),
        [(torch.zeros(1, 4, PLACES, 48), torch.zeros(1, 4, PLACES, 48)) for _ in range(2)],
    )  # fmt: skip
    for number in range(2):
        step.refresh()
        expected = gpt2(torch.zeros(1, 1, dtype=torch.long)).logits[:, 0]
        torch.testing.assert_close(step(), expected, rtol=1e-4, atol=1e-4)
        if number == 0:
            for block in gpt2.transformer.h:
                change(block.ln_2.bias, block.ln_2.bias + 3 * torch.randn_like(block.ln_2.bias))
            assert not torch.allclose(gpt2(torch.zeros(1, 1, dtype=torch.long)).logits[:, 0], expected, atol=0.1)
