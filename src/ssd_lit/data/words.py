"""Texts to token ids, word by word: a word that was seen before is looked up."""

import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from ssd_lit.config import ConfigError

_SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_ENDS = r"(?![^\x00-\x7f])"
# GPT-2's pattern, which a byte-level tokenizer cuts text by. Which letters are letters outside ASCII depends on the
# library's edition of Unicode: a word that has some goes on to the next white space, and is cut by the library.
_WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)"
    rf"| ?[A-Za-z]++{_ENDS}"
    rf"| ?[0-9]++{_ENDS}"
    rf"| ?[\x00-\x08\x0e-\x1f!-/:-@\[-`{{-\x7f]++{_ENDS}"
    rf"| ?[^{_SPACE}]+"
    rf"|[{_SPACE}]+(?![^{_SPACE}])"
    rf"|[{_SPACE}]+"
)
_MOST_BYTES = 64_000_000
"""Of words that are kept, with what Python takes for them."""
_ENTRY_BYTES = 200


class WordEncoder:
    """Encodes texts, each followed by end-of-text, as little-endian integers of `dtype`.

    The ids are those of `Tokenizer.encode_batch_fast`. Of a byte-level BPE that cuts text as GPT-2's does, the library
    encodes each word once, so that English takes less than half of its time; other tokenizers get whole texts.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int, dtype: "np.dtype[Any]") -> None:
        self._tokenizer = tokenizer
        self._dtype = dtype
        self._by_word = _cuts_as_gpt2(tokenizer)
        self._end = np.array([eos_id], dtype).tobytes()
        self._known: dict[str | None, bytes] = {}
        self._known_bytes = 0

    def encode(self, texts: list[str]) -> bytes:
        """Raises ConfigError if the tokenizer cannot encode a text."""
        if not self._by_word:
            return b"".join(part for ids in self._ids(texts) for part in (ids, self._end))
        words: list[str | None] = []
        for text in texts:
            words += _WORD.findall(text)
            words.append(None)  # end of text
        if self._known_bytes > _MOST_BYTES:
            self._known.clear()
            self._known_bytes = 0
        self._known[None] = self._end
        new = [word for word in set(words) - self._known.keys() if word is not None]
        for word, ids in zip(new, self._ids(new), strict=True):
            self._known[word] = ids
            self._known_bytes += _ENTRY_BYTES + len(word) + len(ids)
        return b"".join(map(self._known.__getitem__, words))

    def _ids(self, texts: list[str]) -> list[bytes]:
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises nothing more specific; most often there is no unk token
            raise ConfigError(f"data.tokenizer: cannot encode the text: {str(error).splitlines()[0]}") from None
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]


def _cuts_as_gpt2(tokenizer: Tokenizer) -> bool:
    """Whether a text's tokens are those of its words, cut by GPT-2's pattern."""
    cut, model = tokenizer.pre_tokenizer, tokenizer.model
    return (
        tokenizer.normalizer is None
        and isinstance(cut, pre_tokenizers.ByteLevel)
        and cut.use_regex
        and not cut.add_prefix_space
        and isinstance(model, models.BPE)
        and not model.dropout
        and tokenizer.encode_special_tokens
        and all(token.special for token in tokenizer.get_added_tokens_decoder().values())
    )
