"""Whether a tokenizer has something for every character of a text. Some drop a character that they do not know."""

from collections.abc import Iterable

from tokenizers import Tokenizer, models

# Characters whose UTF-8 holds every byte that UTF-8 can hold.
_EVERY_BYTE = [
    chr(code)
    for start, stop, step in (
        (0, 0xC0, 1),
        (0xC0, 0x800, 0x40),
        (0x800, 0x1000, 0x800),
        (0x1000, 0x10000, 0x1000),
        (0x10000, 0x40000, 0x30000),
        (0x40000, 0x110000, 0x40000),
    )
    for code in range(start, stop, step)
]


class Coverage:
    """What a tokenizer keeps of single characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def may_lose(self) -> bool:
        """Whether there can be a character that is dropped without a word.

        Only a BPE does that, with neither a token for what it does not know nor all bytes. Other models raise an error.
        """
        return isinstance(self._model, models.BPE) and any(map(self.loses, _EVERY_BYTE))

    def first_lost(self, batches: Iterable[list[str]]) -> str | None:
        """The first character that would be dropped from batches of texts; None if all are kept."""
        seen: set[str] = set()
        for texts in batches:
            new = set().union(*texts) - seen
            lost = next(filter(self.loses, sorted(new)), None)
            if lost is not None:
                return lost
            seen |= new
        return None

    def loses(self, character: str) -> bool:
        """Whether the model has nothing for a part of what it is given of the character."""
        if character in self._added:
            return False
        text = character if self._normalizer is None else self._normalizer.normalize_str(character)
        pieces = [text] if self._pre_tokenizer is None else dict(self._pre_tokenizer.pre_tokenize_str(text))
        return any(not self._model.tokenize(letter) for letter in set().union(*pieces))
