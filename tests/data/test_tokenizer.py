"""Any text survives the tokenizer; Hugging Face reads what is written."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, train_tokenizer


def save_foreign(folder: Path, vocabulary: list[str], **config: object) -> TokenizerConfig:
    """A word tokenizer as somebody else may have made it, that pads and cuts."""
    folder.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerConfig(folder=str(folder))


def test_any_unicode_survives(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(chr(draw.choice([draw.randrange(32, 127), draw.randrange(0xD800)])) for _ in range(30))
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_end_of_text_inside_a_text_is_ordinary_text(corpus: Path) -> None:
    tokenizer = load_tokenizer(corpus / "tokenizer")
    ids = tokenizer.encode(f"a {END_OF_TEXT} b").ids
    assert end_of_text_id(corpus / "tokenizer") not in ids
    assert tokenizer.decode(ids) == f"a {END_OF_TEXT} b"


def test_vocabulary_has_the_size_asked_for(corpus: Path) -> None:
    assert load_tokenizer(corpus / "tokenizer").get_vocab_size() == 400


def test_training_twice_gives_the_same_file(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer(TokenizerConfig(vocab_size=400), corpus / "documents", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (corpus / "tokenizer" / name).read_bytes()


def test_train_megabytes_limits_the_text_learnt_from(prepare, tmp_path: Path) -> None:
    documents = prepare([f"aa{i}" for i in range(200)], validation_share=0.1, test_share=0.1)
    # A few bytes: the first document alone, in which no pair is frequent enough for many merges.
    train_tokenizer(TokenizerConfig(vocab_size=400, train_megabytes=1e-6), documents, tmp_path / "little")
    train_tokenizer(TokenizerConfig(vocab_size=400), documents, tmp_path / "all")
    little, everything = (load_tokenizer(tmp_path / name).get_vocab_size() for name in ("little", "all"))
    assert 257 <= little < 270 < everything


@pytest.mark.parametrize("automatic", [False, True])
def test_hugging_face_reads_it(corpus: Path, automatic: bool) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loader = AutoTokenizer if automatic else PreTrainedTokenizerFast
    theirs = loader.from_pretrained(corpus / "tokenizer")
    text = "the cat  sat — naïve\n漢字 🐈"
    assert theirs.encode(text) == load_tokenizer(corpus / "tokenizer").encode(text).ids
    assert theirs.decode(theirs.encode(text)) == text
    assert theirs.eos_token_id == end_of_text_id(corpus / "tokenizer")


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_taken_from_a_folder(tmp_path: Path, eos: object) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", "one", "</s>", "two"], eos_token=eos)
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert end_of_text_id(tmp_path / "ours") == 2
    assert load_tokenizer(tmp_path / "ours").encode("one two one").ids == [1, 3, 1]


def test_well_known_end_of_text_needs_no_config(tmp_path: Path) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", END_OF_TEXT])
    (tmp_path / "theirs" / "tokenizer_config.json").unlink()
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert end_of_text_id(tmp_path / "ours") == 1


@pytest.mark.parametrize("settings", [{}, {"eos_token": None}, {"eos_token": "</s>"}])
def test_folder_without_end_of_text_is_refused(tmp_path: Path, settings: dict[str, object]) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", "one"], **settings)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        train_tokenizer(config, tmp_path, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_damaged_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model":')
    with pytest.raises(ConfigError, match=r"tokenizer\.folder: .*not a tokenizer"):
        train_tokenizer(TokenizerConfig(folder=str(tmp_path)), tmp_path, tmp_path / "ours")


def test_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json: not found; run the stage"):
        load_tokenizer(tmp_path)
