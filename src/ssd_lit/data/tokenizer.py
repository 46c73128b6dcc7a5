"""The tokenizer: a byte-level BPE trained on the training split, or one taken from a folder."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from ssd_lit.config import ConfigError, TokenizerConfig
from ssd_lit.data.documents import read_split
from ssd_lit.files import (
    check_digests,
    read_json,
    read_sealed,
    sha256,
    whole_file,
    write_json,
    write_sealed,
    write_text,
)

END_OF_TEXT = "<|endoftext|>"
MASK = "[MASK]"
DIGESTS = "digests.json"
"""Written last: the SHA-256 of each file of the tokenizer."""

# What merges are learnt from is cut there: learning takes the square of a word's length.
_WITHOUT_A_BREAK = re.compile(r"(\S{1000}|\s{1000})")
_SENTINEL = re.compile(r"<extra_id_(\d+)>")


def train_tokenizer(config: TokenizerConfig, documents_dir: Path, out_dir: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which Hugging Face's `from_pretrained` reads too, and digests.

    The special tokens come first: end of text, then the mask token and the sentinels that are asked for. The
    vocabulary is smaller than asked for if the text has too few different words. A tokenizer of config.folder keeps
    its own mask token and sentinels. Raises ConfigError if it cannot be read or has no end-of-text token.
    """
    if config.folder is not None:
        _copy(Path(config.folder), out_dir)
        _seal(out_dir)
        return
    mask = MASK if config.mask_token else None
    sentinels = [f"<extra_id_{number}>" for number in range(config.sentinels)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT, *([] if mask is None else [mask]), *sentinels],
        # All 256 bytes, whether seen or not, so that any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first_megabytes(documents_dir, config.train_megabytes), trainer)
    write_text(out_dir / "tokenizer.json", tokenizer.to_str(pretty=True))
    _write_config(out_dir, END_OF_TEXT, mask, sentinels)
    _seal(out_dir)


def check_tokenizer(directory: Path) -> None:
    """Raise ValueError if a file of a folder that `train_tokenizer` wrote is missing or damaged."""
    check_digests(directory, read_sealed(directory / DIGESTS))


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a folder, neither padding nor cutting, for which special tokens inside text are just text.

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
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_of_text_id(directory: Path) -> int:
    """The id of the token that ends each document, in a folder that `train_tokenizer` wrote."""
    found = _named_id(directory, "eos_token")
    if found is None:
        raise ValueError(f"{directory}: the tokenizer has no end-of-text token")
    return found


def mask_id(directory: Path) -> int | None:
    """The id of the token that hides another, in a folder that `train_tokenizer` wrote; None if there is none."""
    return _named_id(directory, "mask_token")


def sentinel_ids(directory: Path) -> list[int]:
    """The ids of <extra_id_0>, <extra_id_1>, ..., in a folder that `train_tokenizer` wrote; empty if there are none."""
    vocabulary = load_tokenizer(directory).get_vocab(with_added_tokens=True)
    return [vocabulary[token] for token in _sentinels(vocabulary)]


def _first_megabytes(documents_dir: Path, megabytes: float) -> Iterator[list[str]]:
    """Whole documents from the start of the training split, whose order is random already."""
    left = megabytes * 1e6
    for group in read_split(documents_dir, "train"):
        taken: list[str] = []
        for text in group:
            if left <= 0:
                break
            taken += [piece for piece in _WITHOUT_A_BREAK.split(text) if piece]
            left -= len(text.encode("utf-8"))
        yield taken
        if left <= 0:
            return


def _copy(folder: Path, out_dir: Path) -> None:
    try:
        vocabulary = load_tokenizer(folder).get_vocab(with_added_tokens=True)
    except ValueError as error:
        raise ConfigError(f"tokenizer.folder: {error}") from None
    token = _named(folder, "eos_token") or END_OF_TEXT
    if token not in vocabulary:
        raise ConfigError(
            f"tokenizer.folder: {folder} has no end-of-text token; "
            f"name one as eos_token in its tokenizer_config.json, or have {END_OF_TEXT} in the vocabulary"
        )
    with whole_file(out_dir / "tokenizer.json") as part:
        shutil.copyfile(folder / "tokenizer.json", part)
    mask = _named(folder, "mask_token") or MASK
    _write_config(out_dir, token, mask if mask in vocabulary else None, _sentinels(vocabulary))


def _sentinels(vocabulary: Iterable[str]) -> list[str]:
    """The tokens <extra_id_N> by rising N, whatever their ids: T5's own fall."""
    numbers = {token: int(found[1]) for token in vocabulary if (found := _SENTINEL.fullmatch(token))}
    return sorted(numbers, key=lambda token: numbers[token])


def _named_id(directory: Path, role: str) -> int | None:
    token = _named(directory, role)
    return None if token is None else load_tokenizer(directory).token_to_id(token)


def _named(folder: Path, role: str) -> str | None:
    """The eos_token or mask_token in tokenizer_config.json: a string, or an object with the string as content."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    content: Any = read_json(path)
    token = content.get(role) if isinstance(content, dict) else None
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _write_config(out_dir: Path, end_of_text: str, mask: str | None, sentinels: list[str]) -> None:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_of_text,
        "bos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    if mask is not None:
        config["mask_token"] = mask
    if sentinels:
        config["additional_special_tokens"] = sentinels
    write_json(out_dir / "tokenizer_config.json", config)


def _seal(out_dir: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    write_sealed(out_dir / DIGESTS, {name: sha256(out_dir / name) for name in names})
