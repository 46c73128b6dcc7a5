"""Words looked up give the ids that the library gives for whole texts."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ssd_lit.config import ConfigError
from ssd_lit.data.documents import read_split
from ssd_lit.data.side_by_side import encoded
from ssd_lit.data.tokenizer import END_OF_TEXT, load_tokenizer
from ssd_lit.data.words import WordEncoder

EOS = 0
LETTERS = " \n\t'\xa0\x1c\x85\u2003\u180e\u200b\u3000aZséßjй中👍09½٣!-\u0301<|>\x00\x7f"
PIECES = ["'s", "'ll", " '", "it's", "  ", " \n", "naïve", "a½", "½a", END_OF_TEXT, "the river", "1234", "..."]


def by_library(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    return [
        number for text in texts for number in (*tokenizer.encode(text, add_special_tokens=False).ids, EOS)
    ]  # fmt: skip


def test_every_character_beside_every_kind_of_neighbour(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    # White space lies below U+3001; what is above is letters and signs to the library alone.
    characters = [*map(chr, range(0x3100)), *(chr(code) for code in range(0x3100, 0x110000, 997) if code >> 11 != 0x1B)]
    texts = ["".join(f"a{c} {c}1{c}.{c}{c}'{c}s \n{c}" for c in characters[n::16]) for n in range(16)]
    got = WordEncoder(tokenizer, EOS, np.dtype("<u2")).encode(texts)
    assert np.frombuffer(got, "<u2").tolist() == by_library(tokenizer, texts)


def test_random_texts(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    encoder = WordEncoder(tokenizer, EOS, np.dtype("<u4"))
    draw = random.Random(0)
    for _ in range(300):
        texts = ["".join(draw.choices([*LETTERS, *PIECES], k=draw.randrange(60))) for _ in range(5)]
        assert np.frombuffer(encoder.encode(texts), "<u4").tolist() == by_library(tokenizer, texts), texts


def test_words_that_were_dropped_are_encoded_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssd_lit.data.words._MOST_BYTES", 1000)
    tokenizer = load_tokenizer(corpus / "tokenizer")
    encoder = WordEncoder(tokenizer, EOS, np.dtype("<u2"))
    for texts in read_split(corpus / "documents", "test"):
        for text in texts:
            assert np.frombuffer(encoder.encode([text]), "<u2").tolist() == by_library(tokenizer, [text])


@pytest.mark.parametrize("normal", [True, False])
def test_other_tokenizers_get_whole_texts(corpus: Path, normal: bool) -> None:
    """A tokenizer that puts a space before a text, or that has words of its own."""
    tokenizer = load_tokenizer(corpus / "tokenizer")
    if normal:
        tokenizer.add_tokens(["the river"])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    texts = ["the river moves", "river", ""]
    got = WordEncoder(tokenizer, EOS, np.dtype("<u2")).encode(texts)
    assert np.frombuffer(got, "<u2").tolist() == by_library(tokenizer, texts)


def test_three_processes_give_what_one_gives(corpus: Path) -> None:
    texts = [text for batch in read_split(corpus / "documents", "train") for text in batch]
    batches = [texts[n : n + 3] for n in range(0, 30, 3)]
    one, three = (list(encoded(corpus / "tokenizer", "<u2", batches, processes)) for processes in (1, 3))
    assert len(one) == 10
    assert one == three


def test_a_text_that_another_process_cannot_encode_is_a_mistake_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"the": 1, END_OF_TEXT: 0}, unk_token="<unk>"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(f'{{"eos_token": "{END_OF_TEXT}"}}')
    with pytest.raises(ConfigError, match="cannot encode the text"):
        list(encoded(tmp_path, "<u2", [["river"], ["the"], ["the"]], 2))
