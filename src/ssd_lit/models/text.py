"""Text in and out of a generator of tokens."""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor


class TokenGenerator(Protocol):
    """What `ssd_lit.models.generation.Generator` does, as far as text needs it."""

    model: Any
    starts: int
    """How often `start` was called."""

    def start(self, prompt: Tensor, new_tokens: int) -> None:
        """Read prompts [B, S] and find the token after each."""

    def advance(self, steps: int) -> None:
        """Add tokens to each text."""

    @property
    def tokens(self) -> Tensor:
        """The texts so far, [B, S']."""


def stream(generator: TokenGenerator, tokenizer: Any, prompt: str, new_tokens: int) -> Iterator[str]:
    """Yield the text that follows a prompt in pieces, as it comes: at most `new_tokens` tokens, or up to end-of-text.

    `tokenizer` is one of Transformers or of tokenizers; it adds the special tokens that its model begins with. An empty
    prompt begins like a document, after end-of-text. Special tokens are left out of the text. Raises ValueError for a
    model that does not continue text, and for an empty prompt if it knows no end-of-text token; RuntimeError if the
    generator begins another text before this one is done.
    """
    model, plain = generator.model, plain_tokenizer(tokenizer)
    check_causal(model)
    ends = _end_tokens(model)
    ids = _tokens_of_all(plain, prompt) or ends[:1]
    if not ids:
        raise ValueError("an empty prompt, and the model names no end-of-text token to begin with")
    if new_tokens < 1:
        return
    generator.start(torch.tensor([ids], device=model.device), new_tokens)
    start = generator.starts
    decoder = DecodeStream(ids=ids, skip_special_tokens=True)
    for number in range(new_tokens):
        if generator.starts != start:
            raise RuntimeError("this generator has begun another text; one generator for each text gives both in turn")
        if number:
            generator.advance(1)
        token = int(generator.tokens[0, -1])
        if token in ends:
            return
        piece = decoder.step(plain, token)
        if piece is not None:
            yield piece


def check_causal(model: Any) -> None:
    """Raise ValueError for a model of Transformers that does not continue text."""
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(f"a {type(model).__name__} does not continue text; a causal language model does")


def plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer inside one of Transformers, or itself."""
    plain: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return plain


def _tokens_of_all(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a whole text, whatever lengths a call of Transformers' tokenizer has left set."""
    truncation, padding = tokenizer.truncation, tokenizer.padding
    tokenizer.no_truncation()
    tokenizer.no_padding()
    try:
        ids: list[int] = tokenizer.encode(text).ids
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)
        if padding is not None:
            tokenizer.enable_padding(**padding)
    return ids


def _end_tokens(model: Any) -> list[int]:
    told = model.generation_config.eos_token_id
    if told is None:
        told = model.config.eos_token_id
    return [] if told is None else [told] if isinstance(told, int) else list(told)
