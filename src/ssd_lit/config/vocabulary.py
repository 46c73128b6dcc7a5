"""Whether a checkpoint can be trained on the tokens of the data, found before anything runs."""

from collections.abc import Mapping
from pathlib import Path

from ssd_lit.config.data import DataConfig
from ssd_lit.config.pretrained import check_complete, embedded_tokens, longest_input
from ssd_lit.config.yaml_file import ConfigError, shown
from ssd_lit.support.files import read_json


def check_checkpoint(checkpoint: Path, data: DataConfig) -> None:
    """Raise ConfigError if a checkpoint (model.pretrained) cannot read the blocks of tokens that the data has.

    Its embeddings are of its own tokenizer's tokens, so that is the one to give; and it reads as many tokens as it has
    positions.
    """
    folder = data.tokenizer.folder
    if folder is None:
        raise ConfigError(
            f"model.pretrained {checkpoint}: its embeddings are of its own tokenizer's tokens, not of one that is "
            f"trained here; give its own as data.tokenizer.folder, such as {checkpoint}"
        )
    try:
        ids, rows = token_ids(Path(folder)), embedded_tokens(checkpoint)
        longest = longest_input(checkpoint)
        own = token_ids(checkpoint) if (checkpoint / "tokenizer.json").is_file() else ids
    except ValueError as error:
        raise ConfigError(f"data.tokenizer.folder: {error}") from None
    try:
        check_complete(checkpoint)
    except ValueError as error:
        raise ConfigError(f"model.pretrained: {error}") from None
    tokens = 1 + max(ids.values(), default=-1)
    if tokens > rows:
        raise ConfigError(
            f"data.tokenizer.folder {folder}: has {tokens} tokens, but the checkpoint in {checkpoint} "
            f"(model.pretrained) embeds {rows}; give its own tokenizer"
        )
    by_id = {number: token for token, number in own.items()}
    for token, number in ids.items():
        if by_id.get(number, token) != token or own.get(token, number) != number:
            raise ConfigError(
                f"data.tokenizer.folder {folder}: its token {number} is {shown(token)}, but that of the checkpoint in "
                f"{checkpoint} (model.pretrained) is {shown(by_id.get(number))}; give its own tokenizer"
            )
    if longest is not None and longest < data.sequence_length:
        raise ConfigError(
            f"data.sequence_length {data.sequence_length}: the checkpoint in {checkpoint} (model.pretrained) reads "
            f"{longest} tokens at most"
        )


def token_ids(folder: Path) -> dict[str, int]:
    """The tokens of the tokenizer.json of a folder and their ids, special tokens included.

    Raises ValueError if there is none.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer.json in folder {str(folder)!r}")
    content = read_json(path)
    try:
        vocabulary = content["model"]["vocab"]
        # Unigram models list their entries, with their scores, in order.
        ids = vocabulary if isinstance(vocabulary, Mapping) else {token: n for n, (token, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
        return {str(token): int(number) for token, number in {**ids, **added}.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: not a tokenizer") from None
