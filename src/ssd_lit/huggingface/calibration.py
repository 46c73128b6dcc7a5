"""What the FFNs of any Transformers model see when it reads a text file."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from ssd_lit.data.readers import check_format, read_documents
from ssd_lit.data.tokenizer import load_tokenizer
from ssd_lit.models.hooks import capture_inputs
from ssd_lit.moe.ffn import ExpertFFN

LONGEST = 512
"""Tokens read at once, where the model can take as many."""


def check_text(text: Path, folder: Path) -> None:
    """Raise ValueError unless the file can be read and the folder has the tokenizer for it."""
    check_format(text)
    if not text.is_file():
        raise ValueError(f"{text}: no such file")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"no tokenizer.json in folder {str(folder)!r}: without it no text can be read")


@torch.no_grad()
def text_inputs(backbone: Any, ffns: Sequence[ExpertFFN], folder: Path, text: Path, tokens: int) -> list[Tensor]:
    """The inputs [T, D] of every FFN on about the first `tokens` tokens of a text, T at least that where there are.

    Every document is read on its own, in pieces as long as the model takes, with the special tokens that the folder's
    tokenizer adds. The decoder of an encoder-decoder reads the same as the encoder, one place later. Raises
    ValueError for a text without tokens, or a tokenizer of another model.
    """
    base, config = backbone.base_model, backbone.config
    length = min(LONGEST, getattr(config, "max_position_embeddings", LONGEST))
    seen: list[list[Tensor]] = [[] for _ in ffns]
    read = 0
    for ids in _pieces(load_tokenizer(folder), text, length):
        if max(ids) >= config.vocab_size:
            raise ValueError(f"{folder}: the tokenizer has token {max(ids)}, the model only {config.vocab_size}")
        inputs = torch.tensor([ids], device=backbone.device)
        extra = {}
        if hasattr(base, "encoder") and hasattr(base, "decoder"):
            extra["decoder_input_ids"] = F.pad(inputs[:, :-1], (1, 0), value=config.pad_token_id or 0)
        with capture_inputs(ffns) as found:
            base(input_ids=inputs, use_cache=False, **extra)
        for rows, ffn in zip(seen, ffns, strict=True):
            rows.append(found[ffn])
        read += len(ids)
        if read >= tokens:
            break
    if not read:
        raise ValueError(f"{text}: no text in it")
    return [torch.cat(rows) for rows in seen]


def _pieces(tokenizer: Tokenizer, text: Path, length: int) -> Iterator[list[int]]:
    tokenizer.enable_truncation(length)
    for document in read_documents(text, "text"):
        encoding = tokenizer.encode(document)
        yield from (one.ids for one in [encoding, *encoding.overflowing] if one.ids)
