from pathlib import Path

import torch
from torch import Tensor, nn

from ssd_lit.config import ModelConfig, MoEConfig
from ssd_lit.data.index import VocabInfo
from ssd_lit.models.family import family, swap_ffns
from ssd_lit.models.hooks import capture_inputs, ffn_inputs, ffn_tokens
from ssd_lit.models.language_model import LanguageModel
from tests.checkpoint_folders import change_settings, save_model

SHAPE = {"layers": 2, "d_model": 16, "heads": 2, "d_ff": 32}


def model(family: str) -> LanguageModel:
    config = ModelConfig.model_validate({"family": family, **SHAPE})
    vocab = VocabInfo(vocab_size=50, eos_id=0, mask_id=1, sentinel_ids=(2, 3))
    return LanguageModel(config, MoEConfig(experts=4, top_k=2), vocab, context=12)


def test_every_row_of_an_ffn_has_its_token() -> None:
    """Tokens that are embedded are those told: a decoder's are not the encoder's."""
    t5 = model("t5")
    batch = {"inputs": torch.randint(4, 50, (3, 12)), "targets": torch.randint(4, 50, (3, 7))}
    embedded: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs: embedded.append(inputs[0].flatten()))
        for module in t5.modules()
        if isinstance(module, nn.Embedding) and module.num_embeddings == 50
    ]
    rows = ffn_inputs(t5, batch)
    for hook in hooks:
        hook.remove()
    tokens = ffn_tokens(t5, batch)
    assert [len(x) for x in rows] == [len(ids) for ids in tokens] == [36, 36, 21, 21]
    encoder, decoder = embedded
    assert all(torch.equal(ids, encoder) for ids in tokens[:2])
    assert all(torch.equal(ids, decoder) for ids in tokens[2:])


def test_without_a_decoder_all_layers_read_the_inputs() -> None:
    gpt = model("gpt2")
    batch = {"inputs": torch.randint(4, 50, (3, 12)), "targets": torch.randint(4, 50, (3, 12))}
    assert [len(x) for x in ffn_inputs(gpt, batch)] == [36, 36]
    assert all(torch.equal(ids, batch["inputs"].flatten()) for ids in ffn_tokens(gpt, batch))


def test_an_ffn_that_reads_in_chunks_shows_all_its_inputs(tmp_path: Path) -> None:
    save_model(tmp_path, "bert")
    change_settings(tmp_path, chunk_size_feed_forward=1)
    bert = family("bert").open(tmp_path)
    ffns = swap_ffns(bert, family("bert"), MoEConfig(experts=4, top_k=2), router="center")
    with capture_inputs(ffns) as inputs:
        bert(torch.zeros(3, 5, dtype=torch.long))
    assert [len(inputs[ffn]) for ffn in ffns] == [15] * len(ffns)
