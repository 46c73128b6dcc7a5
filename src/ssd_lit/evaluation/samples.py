"""Samples of text: how a model of the next token goes on from the beginnings of validation blocks, in each mode."""

from collections.abc import Sequence

import torch

from ssd_lit.data.blocks import TokenBlocks
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.models.generation import Generator
from ssd_lit.models.language_model import LanguageModel, attend_beside_padding
from ssd_lit.moe.names import Mode
from ssd_lit.run import Run

PROMPTS = 3
PROMPT, CONTINUATION = 32, 64
"""Tokens, at most: of short blocks a prompt takes a quarter, and the text after it half."""


def samples(run: Run, model: LanguageModel, split: str, modes: Sequence[Mode]) -> list[dict[str, str]]:
    """A prompt and its likeliest continuation in each mode, sparse mode with the run's top_k: {"prompt", mode, ...}.

    The prompts begin blocks that are spread over the split, and so are the same for all runs on the same data. None
    for a model that does not predict the next token.
    """
    if model.objective_name != "causal":
        return []
    blocks = TokenBlocks(run.tokens, split)
    length, new = min(PROMPT, -(-blocks.sequence_length // 4)), min(CONTINUATION, blocks.sequence_length // 2)
    starts = [len(blocks) * place // PROMPTS for place in range(min(PROMPTS, len(blocks)))]
    prompts = torch.stack([blocks[start]["inputs"][:length] for start in starts]).to(model.ffns[0].w_in.device)
    attend_beside_padding(model.backbone)  # the generator masks the places of its cache that are not filled yet
    for ffn in model.ffns:
        ffn.backend = "auto"  # backends agree, but not all can stand in the generator's CUDA graphs
    generator, tokenizer = Generator(model.backbone), load_tokenizer(run.tokenizer)

    def texts(tokens: torch.Tensor) -> list[str]:
        return tokenizer.decode_batch(tokens.tolist(), skip_special_tokens=False)

    columns = {"prompt": texts(prompts)}
    for mode in modes:
        model.set_mode(mode, run.config.moe.top_k)
        columns[mode] = texts(generator(prompts, new)[:, length:])
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
