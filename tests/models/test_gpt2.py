import pytest
import torch

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.models import gpt2
from ssd_lit.models.flops import forward_flops, router_flops, training_flops
from ssd_lit.models.language_model import LanguageModel
from ssd_lit.models.probe import ffn_inputs

CONFIG = ModelConfig(layers=2, d_model=16, heads=2, d_ff=32, dropout=0.1)
MOE = MoEConfig(experts=4, top_k=1)


def test_the_swapped_model_computes_what_hugging_face_does() -> None:
    torch.manual_seed(0)
    backbone = gpt2.build(CONFIG, vocab_size=50, context=8, end_of_text=0).double().eval()
    for parameter in backbone.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(50, (3, 8))
    before = backbone(input_ids=tokens).logits
    for ffn in gpt2.swap_ffns(backbone, MOE):
        assert not ffn.training
        assert ffn.dropout.p == 0.1
    torch.testing.assert_close(backbone(input_ids=tokens).logits, before, rtol=0, atol=1e-12)


def test_the_loss_is_the_mean_cross_entropy_of_the_targets() -> None:
    model = LanguageModel(CONFIG, MOE, vocab_size=50, context=8, end_of_text=0).eval()
    inputs, targets = torch.randint(50, (3, 8)), torch.randint(50, (3, 8))
    log_p = model(inputs).log_softmax(-1)
    expected = -sum(log_p[b, s, targets[b, s]] for b in range(3) for s in range(8)) / 24
    torch.testing.assert_close(model.loss(inputs, targets), expected)


def test_a_probe_sees_what_the_ffns_see_and_leaves_the_model_as_it_was() -> None:
    model = LanguageModel(CONFIG, MOE, vocab_size=50, context=8, end_of_text=0).train()
    tokens = torch.randint(50, (3, 8))
    seen = ffn_inputs(model, tokens)
    assert [x.shape for x in seen] == [(24, 16)] * 2
    assert model.training
    block = model.eval().backbone.transformer.h[0]
    hidden = model.backbone.transformer.wte(tokens) + model.backbone.transformer.wpe(torch.arange(8))
    hidden = hidden + block.attn(block.ln_1(hidden))[0]
    torch.testing.assert_close(seen[0], block.ln_2(hidden).flatten(0, 1))


def test_flops_agree_with_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = LanguageModel(CONFIG, MOE, vocab_size=50, context=8, end_of_text=0)
    tokens = torch.randint(50, (3, 8))
    # Masked attention would be counted at half in some kernels; the plain one computes the square.
    model.backbone.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as forward:
        model(tokens)
    per_token = forward_flops(CONFIG, vocab_size=50, context=8)
    assert forward.get_total_flops() == pytest.approx(24 * per_token)
    dense = training_flops(CONFIG, MOE, "dense", vocab_size=50, context=8)
    sparse = training_flops(CONFIG, MOE, "sparse", vocab_size=50, context=8)
    assert dense == 3 * per_token
    ffn = 2 * 4 * 16 * 32
    assert sparse == pytest.approx(dense - 3 * 0.75 * ffn + 2 * router_flops(CONFIG, MOE))
