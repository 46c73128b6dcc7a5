"""A section of settings: typed, strict, and a mistake in it told by key, value given and values allowed."""

import difflib
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssd_lit.config.yaml_file import ConfigError, dotted, shown

LONGEST_NAME = 60
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.]*$", max_length=LONGEST_NAME)]
Positive = Annotated[int, Field(gt=0, le=1_000_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Method = Literal["dense", "ssd", "sparse", "upcycle", "posthoc"]
Family = Literal["gpt2", "bert", "t5", "llama", "opt", "mistral", "qwen2", "qwen3", "gpt_neox"]
Seed = Annotated[int, Field(ge=0, le=1_000_000)]
"""scikit-learn takes seeds below 2^32, and clusterings are given a thousand for each of ours."""


class Section(BaseModel):
    """A block of settings that knows all its keys."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


T = TypeVar("T", bound=Section)


def checked(kind: type[T], content: dict[str, Any], where: Callable[[tuple[str, ...]], str] = ".".join) -> T:
    """The section with that content. Raises ConfigError at the first two mistakes, with keys as `where` names them."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(kind, one, where) for one in error.errors()[:2])) from None


def _explain(kind: type[Section], error: Any, where: Callable[[tuple[str, ...]], str]) -> str:
    location = tuple(str(part) for part in error["loc"])
    key = dotted([where(location)])
    match error["type"]:
        case "extra_forbidden":
            return unknown_key(key, location[-1], _known_keys(kind, location[:-1]))
        case "missing":
            return f"{key}: missing; it must be given"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{key}: {message}" if location else message
        case _:
            return f"{key}: given {shown(error['input'])}; {error['msg'][0].lower()}{error['msg'][1:]}"


def unknown_key(title: str, key: str, known: Sequence[str]) -> str:
    """The message for a key that there is not, with the nearest known one, or all that are allowed."""
    close = difflib.get_close_matches(key, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(known)}"
    return f"{title}: unknown key; {hint}"


def _known_keys(kind: type[Section], location: tuple[str, ...]) -> list[str]:
    """Keys allowed at `location`, found by walking the field types down from `kind`."""
    fields = kind.model_fields
    for part in location:
        if part in fields:
            annotation = fields[part].annotation
            found = _sections_in(annotation)
            if found:
                fields = {name: field for section in found for name, field in section.model_fields.items()}
    return list(fields)


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for inner in getattr(annotation, "__args__", ()) for found in _sections_in(inner)]
