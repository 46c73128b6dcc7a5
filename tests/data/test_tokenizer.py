"""Any text survives the tokenizer; Hugging Face reads what is written."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.encode import encode_documents
from ssd_lit.data.tokenizer import (
    END_OF_TEXT,
    MASK,
    check_given,
    end_of_text_id,
    load_tokenizer,
    mask_id,
    sentinel_ids,
    train_tokenizer,
)

SPECIALS_IN_TEXT = "a [MASK] of[MASK]<extra_id_0> <extra_id_1><|endoftext|>"


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


@pytest.fixture
def with_specials(prepare, tmp_path: Path) -> Path:
    """A tokenizer with a mask token and two sentinels, learnt from text that is full of their names."""
    documents = prepare([f"{i} {SPECIALS_IN_TEXT}" for i in range(100)], validation_fraction=0.1, test_fraction=0.1)
    config = TokenizerConfig(vocab_size=300, mask_token=True, sentinels=2)
    train_tokenizer(config, documents, tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


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


def test_names_of_special_tokens_inside_a_text_are_ordinary_text(with_specials: Path) -> None:
    tokenizer = load_tokenizer(with_specials)
    ids = tokenizer.encode(SPECIALS_IN_TEXT).ids
    assert not {end_of_text_id(with_specials), mask_id(with_specials), *sentinel_ids(with_specials)} & set(ids)
    assert tokenizer.decode(ids) == SPECIALS_IN_TEXT


def test_special_tokens_count_as_entries(with_specials: Path) -> None:
    tokenizer = load_tokenizer(with_specials)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.id_to_token(mask_id(with_specials)) == MASK
    assert [tokenizer.id_to_token(i) for i in sentinel_ids(with_specials)] == ["<extra_id_0>", "<extra_id_1>"]


def test_none_that_was_not_asked_for(corpus: Path) -> None:
    assert mask_id(corpus / "tokenizer") is None
    assert sentinel_ids(corpus / "tokenizer") == []
    added = load_tokenizer(corpus / "tokenizer").get_added_tokens_decoder()
    assert [token.content for token in added.values()] == [END_OF_TEXT]


def test_vocabulary_too_small_for_its_special_tokens_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"vocab_size 268: must be at least 269, .* mask_token true and 11 sent"):
        TokenizerConfig(vocab_size=268, mask_token=True, sentinels=11)
    smallest = TokenizerConfig(vocab_size=269, mask_token=True, sentinels=11)
    train_tokenizer(smallest, corpus / "documents", tmp_path)
    assert load_tokenizer(tmp_path).get_vocab_size() == 269


@pytest.mark.parametrize("settings", [{"mask_token": True}, {"sentinels": 3}])
def test_folder_gets_no_special_tokens_added(tmp_path: Path, settings: dict[str, object]) -> None:
    folder = save_foreign(tmp_path / "theirs", ["<unk>", END_OF_TEXT]).folder
    with pytest.raises(ValidationError, match="mask_token and sentinels: not with folder"):
        TokenizerConfig(folder=folder, **settings)


def test_vocabulary_has_the_size_asked_for(corpus: Path) -> None:
    assert load_tokenizer(corpus / "tokenizer").get_vocab_size() == 400


def test_training_twice_gives_the_same_file(corpus: Path, tmp_path: Path) -> None:
    train_tokenizer(TokenizerConfig(vocab_size=400), corpus / "documents", tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (corpus / "tokenizer" / name).read_bytes()


def test_train_megabytes_limits_the_text_learnt_from(prepare, tmp_path: Path) -> None:
    documents = prepare([f"aa{i}" for i in range(200)], validation_fraction=0.1, test_fraction=0.1)
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
    assert theirs.mask_token is None


@pytest.mark.parametrize("automatic", [False, True])
def test_hugging_face_reads_the_special_tokens(with_specials: Path, automatic: bool) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    theirs = (AutoTokenizer if automatic else PreTrainedTokenizerFast).from_pretrained(with_specials)
    assert len(theirs) == 300
    assert theirs.mask_token_id == mask_id(with_specials)
    assert theirs.encode("<extra_id_0><extra_id_1>") == sentinel_ids(with_specials)
    assert {"[MASK]", "<extra_id_0>", "<extra_id_1>"} <= set(theirs.all_special_tokens)


@pytest.mark.parametrize("eos", ["</s>", {"content": "</s>", "lstrip": False}])
def test_taken_from_a_folder(tmp_path: Path, eos: object) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", "one", "</s>", "two"], eos_token=eos)
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert end_of_text_id(tmp_path / "ours") == 2
    assert load_tokenizer(tmp_path / "ours").encode("one two one").ids == [1, 3, 1]


@pytest.mark.parametrize("mask", ["<mask>", {"content": "<mask>", "lstrip": True}])
def test_folder_keeps_its_mask_token_and_sentinels(tmp_path: Path, mask: object) -> None:
    vocabulary = ["<unk>", "</s>", "<mask>", "<extra_id_10>", "<extra_id_9>", "[MASK]", "<extra_id_0>", "<extra_id_x>"]
    config = save_foreign(tmp_path / "theirs", vocabulary, eos_token="</s>", mask_token=mask)
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert mask_id(tmp_path / "ours") == 2
    assert sentinel_ids(tmp_path / "ours") == [6, 4, 3]
    written = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert written["mask_token"] == "<mask>"
    assert written["additional_special_tokens"] == ["<extra_id_0>", "<extra_id_9>", "<extra_id_10>"]


@pytest.mark.parametrize(("vocabulary", "expected"), [(["[MASK]"], 2), ([], None)])
def test_well_known_mask_token_needs_no_config(tmp_path: Path, vocabulary: list[str], expected: int | None) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", END_OF_TEXT, *vocabulary])
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert mask_id(tmp_path / "ours") == expected


def test_mask_token_that_the_vocabulary_lacks_is_none(tmp_path: Path) -> None:
    config = save_foreign(tmp_path / "theirs", ["<unk>", END_OF_TEXT], mask_token="<mask>")
    train_tokenizer(config, tmp_path / "no-documents", tmp_path / "ours")
    assert mask_id(tmp_path / "ours") is None


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


ROLES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
MARKED = [*ROLES.values(), "<extra_id_0>", "<extra_id_1>"]
PIECES = ["<", "/", ">", "▁", "_", *"abcdefghijklmnopqrstuvwxyz01", "</", "</s", "s>"]


def sentencepiece(folder: Path, model: str, marked: bool) -> Path:
    """A tokenizer like T5's or LLaMA's, whose vocabulary holds the special tokens, marked as such or not."""
    vocabulary = [*MARKED, *PIECES]
    ids = {piece: number for number, piece in enumerate(vocabulary)}
    made: models.Model
    match model:
        case "unigram":
            made = models.Unigram([(piece, 0.0 if piece in MARKED else -4.0) for piece in vocabulary], unk_id=2)
        case "bpe":
            merges = [("<", "/"), ("</", "s"), ("</s", ">"), ("s", ">")]
            made = models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True)
        case "wordpiece":
            made = models.WordPiece(ids | {f"##{p}": len(ids) + n for n, p in enumerate(PIECES)}, unk_token="<unk>")
        case _:
            made = models.WordLevel(ids, unk_token="<unk>")
    tokenizer = Tokenizer(made)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens([AddedToken(token, special=marked) for token in MARKED])
    tokenizer.add_tokens(["hello"])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(ROLES))
    return folder


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("model", ["unigram", "bpe", "wordpiece", "word level"])
def test_special_tokens_of_a_folder_inside_a_text_are_ordinary_text(tmp_path: Path, model: str, marked: bool) -> None:
    train_tokenizer(
        TokenizerConfig(folder=str(sentencepiece(tmp_path / "theirs", model, marked))), tmp_path, tmp_path / "ours"
    )
    tokenizer = load_tokenizer(tmp_path / "ours")
    text = "a</s> </s><pad>b<unk> <extra_id_0><extra_id_1>s</s"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert not {tokenizer.token_to_id(token) for token in MARKED if token != "<unk>"} & set(ids)
    if model in ("unigram", "bpe"):
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_a_word_that_was_added_without_a_role_stays_a_token(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "theirs", "unigram", marked=True))
    assert "hello" in tokenizer.encode("a hello b").tokens


def test_ordinary_text_is_encoded_as_without_special_tokens(tmp_path: Path) -> None:
    folder = sentencepiece(tmp_path / "theirs", "unigram", marked=True)
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("a < b > c", "s> <s </a>", "hello extra_id_0"):
        assert load_tokenizer(folder).encode(text).ids == plain.encode(text).ids


def test_documents_end_once_whatever_they_say(prepare, tmp_path: Path) -> None:
    texts = [f"a</s> b</s> {n}" for n in range(50)]
    documents = prepare(texts, validation_fraction=0.2, test_fraction=0.2)
    config = TokenizerConfig(folder=str(sentencepiece(tmp_path / "theirs", "unigram", marked=True)))
    train_tokenizer(config, documents, tmp_path / "tokenizer")
    index = encode_documents(documents, tmp_path / "tokenizer", tmp_path / "tokens", sequence_length=8)
    ids = np.concatenate([np.fromfile(tmp_path / f"tokens/{split}.bin", index["dtype"]) for split in index["splits"]])
    assert np.count_nonzero(ids == index["eos_id"]) == 50


NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def roles_of(folder: Path) -> dict[str, object]:
    """All that Hugging Face says of a tokenizer's special tokens, and how many entries it has."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    return {**{name: getattr(theirs, name) for name in NAMES}, "more": theirs.extra_special_tokens, "size": len(theirs)}


@pytest.mark.parametrize("kind", ["t5", "llama", "bert", "older"])
def test_a_copy_has_the_roles_of_its_source(tmp_path: Path, kind: str) -> None:
    from transformers import BertTokenizer, LlamaTokenizer, T5Tokenizer

    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    match kind:
        case "t5":
            names = ["<pad>", "</s>", "<unk>", "▁", "a", "<extra_id_1>", "<extra_id_0>"]
            T5Tokenizer(vocab=[(name, -1.0) for name in names], extra_ids=2).save_pretrained(theirs)
        case "llama":
            names = ["<unk>", "<s>", "</s>", "▁", "a", "<image>", "<tool>"]
            made = LlamaTokenizer(vocab={name: n for n, name in enumerate(names)}, merges=[], pad_token="<unk>")
            made.add_special_tokens({"extra_special_tokens": ["<tool>", "<image>"]})
            made.save_pretrained(theirs)
        case "bert":
            names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "[EOS]"]
            BertTokenizer(vocab={name: n for n, name in enumerate(names)}, eos_token="[EOS]").save_pretrained(theirs)
        case _:
            save_foreign(theirs, ["<unk>", "<s>", "</s>", "<pad>"], tokenizer_class="PreTrainedTokenizerFast")
            token = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
            roles = {"eos_token": {"content": "</s>", **token}, "bos_token": "<s>", "pad_token": "<pad>"}
            (theirs / "special_tokens_map.json").write_text(json.dumps(roles))
    train_tokenizer(TokenizerConfig(folder=str(theirs)), tmp_path, ours)
    assert roles_of(ours) == roles_of(theirs)


def test_a_folder_is_tried_before_any_text_is_read(tmp_path: Path) -> None:
    save_foreign(tmp_path / "a", ["<unk>", "x"])
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.folder: .* has no end-of-text token"):
        check_given(tmp_path / "a", {"gpt2"}, 1)
    save_foreign(tmp_path / "b", ["<unk>", END_OF_TEXT, "<extra_id_0>", "<extra_id_1>"])
    plain = tmp_path / "b"
    check_given(plain, {"gpt2", "t5"}, 2)
    with pytest.raises(ConfigError, match=r"data\.tokenizer\.folder: .* has no mask token"):
        check_given(plain, {"gpt2", "bert"}, 2)
    with pytest.raises(ConfigError, match=r"has 2 tokens <extra_id_N>; model\.family t5 needs 3"):
        check_given(plain, {"t5"}, 3)
    with pytest.raises(ConfigError, match=r"no tokenizer\.json in"):
        check_given(tmp_path / "gone", {"gpt2"}, 1)
