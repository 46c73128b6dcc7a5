"""YAML of settings: read strictly, and laid over other settings."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ssd_lit.config.renamed import FREE, with_new_names
from ssd_lit.support.shipped import CONFIGS

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
MOST_DEPTH = 50
"""More is no config. Values are counted with every alias written out."""


class ConfigError(ValueError):
    """A mistake in a config, in words for the person who wrote it."""


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError, without the file's name, if there is none."""
    try:
        if not path.is_file():
            # A device or a pipe may have no end.
            raise ConfigError("not a file" if path.exists() else "no such file")
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"more than {MOST_BYTES:,} bytes: no config is as large")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    if content is None:
        raise ConfigError("the file is empty")
    if not isinstance(content, dict):
        raise ConfigError("expected a mapping of keys to values")
    return content


def parse_yaml(text: str) -> Any:
    """The value that a text holds as YAML. Raises ConfigError if it is not valid."""
    try:
        _check_depth(text)
        return yaml.load(text, Loader=_Loader)
    except ConfigError:
        raise
    except Exception as error:  # beside YAMLError, what the constructors of dates and numbers raise
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None


def typed_scalars(value: Any) -> Any:
    """A value whose strings are read as plain scalars of YAML: numbers, truths, null, else strings."""
    if isinstance(value, Mapping):
        return {key: typed_scalars(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [typed_scalars(inner) for inner in value]
    if not isinstance(value, str):
        return value
    loader: Any = _Loader("")
    try:
        return loader.construct_object(yaml.ScalarNode(loader.resolve(yaml.ScalarNode, value, (True, False)), value))
    except Exception as error:  # what the constructors of dates and numbers raise
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None


def read_layers(
    path: Path, users: Sequence[Path] = (), below: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The mapping in a YAML file laid over those of the files that its key `base` names, and the file's own mapping.

    All of them are laid over `below`, what bases before it have said.

    `base` is a path or a list of paths, relative to the file, or else to the configs that ship; later ones are laid
    over earlier ones. Settings with names of earlier versions get their present names. Raises ConfigError for a base
    that is missing or builds on itself, and for what `laid_over` refuses.
    """
    content = read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: given {shown(bases)}; expected a path or a list of paths")
    merged = dict(below or {})
    for base in bases:
        file = _real(path.parent / base)
        if not file.exists() and (CONFIGS / base).is_file():
            file = _real(CONFIGS / base)
        if file in (_real(path), *users):
            raise ConfigError(f"base: {base} builds on itself")
        try:
            # What a base drops may be of the base before it.
            merged, _ = read_layers(file, (_real(path), *users), merged)
        except ConfigError as error:
            raise ConfigError(f"base: {base}: {error}") from None
    own = with_new_names(content)
    return laid_over(merged, own), own


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any], where: tuple[str, ...] = ()) -> dict[str, Any]:
    """`above` over `below`: mappings are merged key by key, all else is replaced.

    null drops a mapping that is below it, and an entry of arms, of a grid or of held_out. Raises ConfigError where
    there is no such entry to drop.
    """
    merged = dict(below)
    for key, value in above.items():
        is_entry = _has_free_names(where)
        if value is None and is_entry and key not in below:
            place = dotted([*where, str(key)])
            raise ConfigError(f"{place}: nothing to drop; without it there are: {shown(list(below))}")
        if value is None and (is_entry or isinstance(below.get(key), dict)):
            del merged[key]
        elif isinstance(value, dict):
            inner = below.get(key)
            merged[key] = laid_over(inner if isinstance(inner, dict) else {}, value, (*where, str(key)))
        else:
            merged[key] = value
    return merged


def _has_free_names(where: tuple[str, ...]) -> bool:
    """Whether the keys of a mapping are names that a config chooses."""
    return where in FREE or (len(where) == 3 and where[::2] == ("arms", "grid"))


def shown(value: Any) -> str:
    """A value as a message can show it, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text):,} characters)"


def dotted(place: Sequence[str]) -> str:
    """The dotted key of a place in a config, as a message can show it."""
    key = ".".join(place)
    return key if len(key) <= 200 and key.isprintable() else shown(key)


def _real(path: Path) -> Path:
    # Not Path.resolve, which raises RuntimeError for links that go round.
    return Path(os.path.realpath(path))


class _Loader(yaml.CSafeLoader):
    """YAML that reads 3e-4 as a number, and refuses a key given twice and aliases that never end or unfold too far."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _values(node, {}) > MOST_VALUES:
            raise ConfigError(f"more than {MOST_VALUES:,} values: no config has as many")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given more than once")
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)


def _check_depth(text: str) -> None:
    """Raise ConfigError for mappings and lists that lie too deep in each other: libyaml's composer recurses in C."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise ConfigError("not valid YAML: nested too deeply")


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node and all below it come to, with aliases written out."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ConfigError(f"line {node.start_mark.line + 1}: an anchor that contains itself")
        return known[id(node)]
    known[id(node)] = 0
    below = [one for pair in node.value for one in pair] if isinstance(node, yaml.MappingNode) else node.value
    known[id(node)] = 1 + sum(_values(one, known) for one in below)
    return known[id(node)]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
