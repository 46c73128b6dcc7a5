"""YAML files of settings, which may build on others."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 1_000_000
MOST_VALUES = 100_000
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
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise ConfigError("not UTF-8 text") from None
    except RecursionError:
        raise ConfigError("not valid YAML: nested too deeply") from None
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except ConfigError:
        raise
    except Exception as error:  # beside YAMLError, what the constructors of dates and numbers raise
        raise ConfigError("not valid YAML: " + " ".join(str(error).split())) from None
    if content is None:
        raise ConfigError("the file is empty")
    if not isinstance(content, dict):
        raise ConfigError("expected a mapping of keys to values")
    return content


def read_with_bases(path: Path, users: Sequence[Path] = ()) -> dict[str, Any]:
    """The mapping in a YAML file, laid over those of the files that its key `base` names.

    `base` is a path or a list of paths, relative to the file; later ones are laid over earlier ones. Mappings are
    merged key by key, all else is replaced. Raises ConfigError for a base that is missing or builds on itself.
    """
    content = read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"base: given {shown(bases)}; expected a path or a list of paths")
    merged: dict[str, Any] = {}
    for base in bases:
        file = _real(path.parent / base)
        if file in (_real(path), *users):
            raise ConfigError(f"base: {base} builds on itself")
        try:
            merged = _laid_over(merged, read_with_bases(file, (_real(path), *users)))
        except ConfigError as error:
            raise ConfigError(f"base: {base}: {error}") from None
    return _laid_over(merged, content)


def shown(value: Any) -> str:
    """A value as a message can show it, on one line and not too long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:150]}... ({len(text):,} characters)"


def _real(path: Path) -> Path:
    # Not Path.resolve, which raises RuntimeError for links that go round.
    return Path(os.path.realpath(path))


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            merged[key] = _laid_over(below[key], above[key])
    return merged


class _Loader(yaml.SafeLoader):
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
