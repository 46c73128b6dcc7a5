"""A tokenizer that would drop characters of the text is refused before anything is encoded."""

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.tokenizer import END_OF_TEXT, Coverage, load_tokenizer, train_tokenizer

LETTERS = [*"abcdefghijklmnopqrstuvwxyz0123456789 ", END_OF_TEXT, "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(vocabulary: list[str], **settings: object) -> Tokenizer:
    return Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, [], **settings))


def saved(folder: Path, tokenizer: Tokenizer) -> TokenizerConfig:
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return TokenizerConfig(folder=str(folder))


def test_a_character_that_would_be_dropped_is_named(prepare, tmp_path: Path) -> None:
    documents = prepare([f"some € {n}" for n in range(50)], validation_fraction=0.2, test_fraction=0.2)
    with pytest.raises(ConfigError, match=r"theirs has nothing for the character '€' \(U\+20AC\) of the text"):
        train_tokenizer(saved(tmp_path / "theirs", bpe(LETTERS)), documents, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_rare_character_of_a_text_that_is_held_out_counts(prepare, tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text("caf\u00e9")
    texts = [f"some {n}" for n in range(50)]
    held_out = {"novel": str(tmp_path / "novel.txt")}
    documents = prepare(texts, validation_fraction=0.2, test_fraction=0.2, held_out=held_out)
    with pytest.raises(ConfigError, match=r"nothing for the character 'é' \(U\+00E9\)"):
        train_tokenizer(saved(tmp_path / "theirs", bpe(LETTERS)), documents, tmp_path / "ours")


def test_a_tokenizer_with_all_characters_of_the_text_will_do(prepare, tmp_path: Path) -> None:
    documents = prepare([f"some {n}" for n in range(50)], validation_fraction=0.2, test_fraction=0.2)
    train_tokenizer(saved(tmp_path / "theirs", bpe(LETTERS)), documents, tmp_path / "ours")
    assert load_tokenizer(tmp_path / "ours").decode(load_tokenizer(tmp_path / "ours").encode("some 7").ids)


def byte_level(alphabet: list[str]) -> Tokenizer:
    tokenizer = bpe(alphabet)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    return tokenizer


KEEPS_ALL = {
    "an unk token": bpe(LETTERS, unk_token="<unk>"),
    "bytes behind the characters": bpe([*LETTERS, *BYTES], byte_fallback=True),
    "bytes for characters": byte_level(pre_tokenizers.ByteLevel.alphabet()),
    "a model that raises": Tokenizer(models.WordLevel({"a": 0})),
}


@pytest.mark.parametrize("tokenizer", KEEPS_ALL.values(), ids=KEEPS_ALL)
def test_what_drops_nothing_needs_no_text(tokenizer: Tokenizer) -> None:
    assert not Coverage(tokenizer).may_lose()


def test_what_a_character_becomes_counts() -> None:
    lowering = bpe(LETTERS)
    lowering.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    assert Coverage(lowering).first_lost([["Café"], ["ok"], ["no…"]]) == "…"


def test_half_of_the_bytes_and_a_character_that_was_added() -> None:
    tokenizer = byte_level([letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter != "Â"])
    tokenizer.add_tokens([AddedToken("£")])
    assert Coverage(tokenizer).first_lost([["€ and £"], ["§"]]) == "§"


def test_an_unknown_word_without_an_unk_token_is_told(prepare, tmp_path: Path) -> None:
    documents = prepare([f"some {n}" for n in range(50)], validation_fraction=0.2, test_fraction=0.2)
    config = saved(tmp_path / "theirs", Tokenizer(models.WordLevel({"some": 0, END_OF_TEXT: 1})))
    train_tokenizer(config, documents, tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"data\.tokenizer: cannot encode the text: .*UNK"):
        encode_documents(documents, tmp_path / "ours", tmp_path / "tokens", sequence_length=4)
