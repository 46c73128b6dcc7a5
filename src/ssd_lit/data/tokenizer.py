"""The tokenizer: a byte-level BPE trained on the training split, or one from a folder."""

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.documents import read_split
from ssd_lit.support.files import (
    check_digests,
    read_json,
    read_json_checked,
    sha256,
    whole_file,
    write_json,
    write_json_checked,
    write_text,
)

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"
OWN_ROLES = {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
DIGESTS = "digests.json"
"""Written last: the SHA-256 of each file of the tokenizer."""

# Training text is cut there: learning merges takes time quadratic in the length of a word.
_LONG_WORD = re.compile(r"(\S{1000}|\s{1000})")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def train_tokenizer(config: TokenizerConfig, documents_dir: Path, out_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which Hugging Face's `from_pretrained` reads too, and digests.

    The special tokens come first: end of text, then the mask token and the sentinels of the config. The vocabulary is
    smaller than config.vocab_size if the text has too few different words. A tokenizer of config.folder keeps its own
    special tokens. Raises ConfigError if it cannot be read, has no end-of-text token or would drop characters of the
    documents.
    """
    if config.folder is not None:
        _copy(Path(config.folder), documents_dir, out_dir)
        _write_digests(out_dir)
        return
    sentinels = [f"<extra_id_{number}>" for number in range(config.sentinels)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, *([MASK] if config.mask_token else []), *sentinels],
        # All 256 bytes, whether seen or not, so that any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_megabytes(documents_dir, config.train_megabytes), trainer)
    write_text(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    roles = {**OWN_ROLES, "mask_token": MASK} if config.mask_token else OWN_ROLES
    _write_config(out_dir, roles, sentinels)
    _write_digests(out_dir)


def check_given(folder: Path, families: Collection[str], spans: int) -> None:
    """Raise ConfigError if the tokenizer of a folder cannot be taken, or lacks what those families need.

    `spans` are those that span corruption cuts out of a block.
    """
    tokenizer, roles = _given(folder)
    if "bert" in families and "mask_token" not in roles:
        raise ConfigError(f"data.tokenizer.folder: {folder} has no mask token, which model.family bert needs")
    sentinels = len(_sentinels(tokenizer.get_vocab(with_added_tokens=True)))
    if "t5" in families and sentinels < spans:
        raise ConfigError(
            f"data.tokenizer.folder: {folder} has {sentinels} tokens <extra_id_N>; model.family t5 needs {spans} for "
            "blocks of data.sequence_length"
        )


def is_other_tokenizer(config: TokenizerConfig, directory: Path) -> bool:
    """Whether config.folder holds another tokenizer now than the one that was copied to `directory`.

    A missing folder does not count: it is not needed any more.
    """
    path, digests = Path(config.folder or "") / "tokenizer.json", directory / DIGESTS
    if config.folder is None or not path.is_file() or not digests.is_file():
        return False
    copied: str = read_json_checked(digests)["tokenizer.json"]
    return sha256(path) != copied


def check_tokenizer(directory: Path) -> None:
    """Raise ValueError if a file that `train_tokenizer` wrote to the folder is missing or damaged."""
    check_digests(directory, read_json_checked(directory / DIGESTS))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Returns the tokenizer of a folder, without padding or truncation; it encodes special tokens in texts as text.

    Raises ValueError if it is missing or damaged.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; run the stage that writes it first")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ValueError(f"{path}: not a tokenizer ({str(error).splitlines()[0]})") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _read_special_tokens_as_text(tokenizer, directory)
    return tokenizer


def end_of_text_id(directory: Path) -> int:
    """The id of the end-of-text token, in a folder that `train_tokenizer` wrote."""
    eos_id = _id_of_role(directory, "eos_token")
    if eos_id is None:
        raise ValueError(f"{directory}: the tokenizer has no end-of-text token")
    return eos_id


def mask_id(directory: Path) -> int | None:
    """The id of the mask token, in a folder that `train_tokenizer` wrote; None if there is none."""
    return _id_of_role(directory, "mask_token")


def sentinel_ids(directory: Path) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., in a folder that `train_tokenizer` wrote; empty if there are none."""
    vocabulary = load_tokenizer(directory).get_vocab(with_added_tokens=True)
    return [vocabulary[token] for token in _sentinels(vocabulary)]


def _read_special_tokens_as_text(tokenizer: Tokenizer, folder: Path) -> None:
    """Let no text be encoded as a special token, whether by the added tokens or by the model.

    Added tokens without a role stay words of the text.
    """
    added = tokenizer.get_added_tokens_decoder().values()
    marked = {token.content for token in added if token.special}
    special = {*marked, *_roles(folder).values(), *_more_special_tokens(folder)}
    special |= set(_sentinels(tokenizer.get_vocab(with_added_tokens=True)))
    # This setting covers only tokens marked as special: mark the others too.
    tokenizer.encode_special_tokens = True
    tokenizer.add_special_tokens([token.content for token in added if token.content in special - marked])
    _cut_after_first_letter(tokenizer, sorted(token for token in special if _is_made_by_model(tokenizer, token)))


def _is_made_by_model(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the model itself, without the added tokens, gives the token of that text, as SentencePiece's do."""
    try:
        return [token.value for token in tokenizer.model.tokenize(text)] == [text]
    except Exception:  # the library raises nothing more specific; a part is unknown, and there is no unk token
        return False


def _cut_after_first_letter(tokenizer: Tokenizer, names: list[str]) -> None:
    """Split the model's input so that none of the names stays whole; names of one letter are left."""
    rests: dict[str, list[str]] = {}
    for name in names:
        if len(name) > 1:
            rests.setdefault(name[0], []).append(re.escape(name[1:]))
    if not rests:
        return
    pattern = "|".join(f"{re.escape(letter)}(?={'|'.join(rest)})" for letter, rest in rests.items())
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    before = tokenizer.pre_tokenizer
    tokenizer.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([before, split])


def _first_megabytes(documents_dir: Path, megabytes: float) -> Iterator[list[str]]:
    """Whole documents from the start of the training split, which is shuffled already."""
    left = megabytes * 1e6
    for group in read_split(documents_dir, "train"):
        pieces: list[str] = []
        for text in group:
            if left <= 0:
                break
            pieces += [piece for piece in _LONG_WORD.split(text) if piece]
            left -= len(text.encode("utf-8"))
        yield pieces
        if left <= 0:
            return


def _given(folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The tokenizer of a folder, and its special tokens by role.

    Raises ConfigError if there is none, or if it has no end-of-text token.
    """
    if not (folder / "tokenizer.json").is_file():
        raise ConfigError(f"data.tokenizer.folder: no tokenizer.json in {str(folder)!r}")
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise ConfigError(f"data.tokenizer.folder: {error}") from None
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    named = _roles(folder)
    # Without settings the tokenizer may be GPT-2's or one of this package.
    defaults = {"mask_token": MASK} if "eos_token" in named else {**OWN_ROLES, "mask_token": MASK}
    roles = {role: token for role, token in {**defaults, **named}.items() if token in vocabulary}
    if "eos_token" not in roles:
        raise ConfigError(
            f"data.tokenizer.folder: {folder} has no end-of-text token; "
            f"name one as eos_token in its tokenizer_config.json, or have {END_OF_TEXT} in the vocabulary"
        )
    return tokenizer, roles


def _copy(folder: Path, documents_dir: Path, out_dir: Path) -> None:
    tokenizer, roles = _given(folder)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    _check_coverage(tokenizer, folder, documents_dir)
    with whole_file(out_dir / "tokenizer.json") as part:
        shutil.copyfile(folder / "tokenizer.json", part)
    more = [*_more_special_tokens(folder), *_sentinels(vocabulary)]
    _write_config(out_dir, roles, [token for token in dict.fromkeys(more) if token in vocabulary])


def _check_coverage(tokenizer: Tokenizer, folder: Path, documents_dir: Path) -> None:
    """Raise ConfigError if the tokenizer drops a character. Reads the texts only if it may drop some."""
    coverage = Coverage(tokenizer)
    if not coverage.may_lose():
        return
    splits = [path.stem for path in sorted(documents_dir.glob("*.parquet"))]
    lost = coverage.first_lost(texts for split in splits for texts in read_split(documents_dir, split))
    if lost is not None:
        raise ConfigError(
            f"data.tokenizer.folder: {folder} has nothing for the character {lost!r} (U+{ord(lost):04X}) of the text, "
            "and would drop it; give a tokenizer that has it, or bytes, or an unk token"
        )


def _sentinels(vocabulary: Iterable[str]) -> list[str]:
    """The tokens <extra_id_N> in order of N; T5's own ids fall with N."""
    numbers = {token: int(match[1]) for token in vocabulary if (match := _SENTINEL.fullmatch(token))}
    return sorted(numbers, key=lambda token: numbers[token])


def _id_of_role(directory: Path, role: str) -> int | None:
    token = _roles(directory).get(role)
    return None if token is None else load_tokenizer(directory).token_to_id(token)


def _roles(folder: Path) -> dict[str, str]:
    """The tokens that a folder's settings name, by role: eos_token, pad_token and so on."""
    settings = _settings(folder)
    extra = settings.get("extra_special_tokens")
    all_settings = {**settings, **(extra if isinstance(extra, dict) else {})}
    roles = {role: _content(token) for role, token in all_settings.items() if role.endswith("_token")}
    return {role: token for role, token in roles.items() if token}


def _more_special_tokens(folder: Path) -> list[str]:
    """The special tokens that a folder's settings list without a role."""
    settings = _settings(folder)
    lists = [settings.get(key) for key in ("additional_special_tokens", "extra_special_tokens")]
    listed = [_content(token) for tokens in lists if isinstance(tokens, list) for token in tokens]
    return [token for token in dict.fromkeys(listed) if token]


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; special_tokens_map.json overrides an old one."""
    settings = _read_settings(folder / "tokenizer_config.json")
    is_old = "added_tokens_decoder" not in settings
    return settings | _read_settings(folder / "special_tokens_map.json") if is_old else settings


def _read_settings(path: Path) -> dict[str, Any]:
    content: Any = read_json(path) if path.is_file() else None
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    """The text of a special token, which settings hold as a string or as an object with `content`."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _write_config(out_dir: Path, roles: dict[str, str], more_special_tokens: list[str]) -> None:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles, "clean_up_tokenization_spaces": False}
    if more_special_tokens:
        config["additional_special_tokens"] = more_special_tokens
    write_json(out_dir / "tokenizer_config.json", config)


def _write_digests(out_dir: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    write_json_checked(out_dir / DIGESTS, {name: sha256(out_dir / name) for name in names})


# Characters whose encodings together contain every byte that occurs in UTF-8.
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
    """Finds characters that a tokenizer drops."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._model = tokenizer.model
        self._normalizer = tokenizer.normalizer
        self._pre_tokenizer = tokenizer.pre_tokenizer
        self._added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}

    def may_lose(self) -> bool:
        """Whether a character could be dropped silently.

        Only a BPE without an unk token and without tokens for all bytes does that. Other models raise an error.
        """
        return isinstance(self._model, models.BPE) and any(map(self.loses, _EVERY_BYTE))

    def first_lost(self, batches: Iterable[list[str]]) -> str | None:
        """The first character that would be dropped from batches of texts; None if there is none."""
        checked: set[str] = set()
        for texts in batches:
            new = set().union(*texts) - checked
            lost = next(filter(self.loses, sorted(new)), None)
            if lost is not None:
                return lost
            checked |= new
        return None

    def loses(self, character: str) -> bool:
        """Whether the model has no token for a part of the normalised and pre-tokenised character."""
        if character in self._added:
            return False
        text = character if self._normalizer is None else self._normalizer.normalize_str(character)
        pieces = [text] if self._pre_tokenizer is None else dict(self._pre_tokenizer.pre_tokenize_str(text))
        return any(not self._model.tokenize(letter) for letter in set().union(*pieces))
