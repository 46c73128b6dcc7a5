"""The settings of an experiment for editors and readers: a JSON schema of its YAML, and a page that lists them."""

import json
from typing import Any

from ssd_lit.config.experiment import Experiment
from ssd_lit.config.run_config import RUN_SECTIONS, RunConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
WHOLE = ("PackageSource", "FilesSource", "HubSource")
"""What stands in lists, which are replaced as a whole: only there a key without a default must be given."""
INTRODUCTION = (
    "All settings of an experiment's YAML. `ssd-lit schema` makes this page and [configs/schema.json]"
    "(../configs/schema.json) from the source.",
    "An arm has the sections model, moe, optim, training and switching as well, for what it changes in them.",
    "A key that nothing reads in the chosen family or method is refused where it is given. In a file that has a base,",
    "`null` drops a mapping of the base, such as an arm.",
)

Schema = dict[str, Any]


def experiment_schema() -> Schema:
    """The JSON schema of an experiment's YAML.

    Every key is optional, since a file may be laid over others; null drops a mapping of those.
    """
    schema = Experiment.model_json_schema()
    definitions: Schema = {**RunConfig.model_json_schema()["$defs"], **schema.pop("$defs")}
    for name in RUN_SECTIONS:
        section = {"$ref": RunConfig.model_json_schema()["properties"][name]["$ref"]}
        schema["properties"][name] = section
        definitions["Arm"]["properties"][name] = section
    definitions["Arm"]["properties"]["grid"] |= _grid_schema(definitions)
    for name, definition in (*definitions.items(), ("Experiment", schema)):
        _make_partial(definition, keep_required=name in WHOLE)
    arms = schema["properties"]["arms"]["anyOf"][0]
    del arms["minProperties"]
    for entries in (arms, definitions["DataConfig"]["properties"]["held_out"]["anyOf"][0]):
        entries["patternProperties"] = {key: _or_null(entry) for key, entry in entries["patternProperties"].items()}
        entries["additionalProperties"] = False
    base = {
        "description": "The files below this one, a path or a list of paths, relative to it or else to the configs "
        "that ship; later ones are laid over earlier ones.",
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}],
    }
    schema["properties"] = {"experiment": schema["properties"].pop("experiment"), "base": base, **schema["properties"]}
    return {"$schema": DRAFT, "title": "An experiment of ssd_lit", **schema, "$defs": dict(sorted(definitions.items()))}


def schema_text() -> str:
    """The schema as the text of a JSON file."""
    return json.dumps(experiment_schema(), indent=1, ensure_ascii=False) + "\n"


def reference_page() -> str:
    """The page of all settings in Markdown, section by section, made from the schema."""
    schema = experiment_schema()
    definitions = schema["$defs"]
    top = {name: field for name, field in schema["properties"].items() if name not in RUN_SECTIONS}
    lines = ["# Settings", "", *INTRODUCTION, ""]
    lines += [
        *_table("Experiment", schema["description"], top, definitions),
        *_table("arms.NAME", definitions["Arm"]["description"], definitions["Arm"]["properties"], definitions),
    ]
    for path in _sections(schema, definitions):
        definition = definitions[path[1]]
        lines += _table(path[0], definition["description"], definition["properties"], definitions)
    return "\n".join(lines).rstrip() + "\n"


def _make_partial(definition: Schema, *, keep_required: bool) -> None:
    """Drop titles and required keys, and let null stand for mappings."""
    definition.pop("title", None)
    if not keep_required:
        definition.pop("required", None)
    for name, field in definition["properties"].items():
        field.pop("title", None)
        if "$ref" in field or field.get("type") == "object":
            told = {key: field.pop(key) for key in ("description",) if key in field}
            field.pop("default", None)
            definition["properties"][name] = {**told, **_or_null(field)}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _grid_schema(definitions: Schema) -> Schema:
    """The keys of a grid: dotted ones with lists of values, and sections with lists of mappings."""
    properties: Schema = {}
    for section in RUN_SECTIONS:
        kind = RunConfig.model_fields[section].annotation
        assert isinstance(kind, type)
        for key, field in definitions[kind.__name__]["properties"].items():
            value = {name: part for name, part in field.items() if name not in ("description", "default", "title")}
            properties[f"{section}.{key}"] = _or_null({"type": "array", "items": value})
        properties[section] = _or_null({"type": "array", "items": {"$ref": f"#/$defs/{kind.__name__}"}})
    return {"properties": properties, "additionalProperties": False}


def _sections(schema: Schema, definitions: Schema, above: str = "") -> list[tuple[str, str]]:
    """The sections below a schema with their dotted names, and the names of their definitions."""
    found = []
    for name, field in schema["properties"].items():
        if name == "arms":
            continue
        for reference in _references(field):
            place = f"{above}{name}"
            if reference in WHOLE:
                kind = definitions[reference]["properties"]["kind"]["const"]
                found.append((f"{place}, kind {kind}", reference))
            else:
                found += [(place, reference), *_sections(definitions[reference], definitions, f"{place}.")]
    return found


def _references(field: Any) -> list[str]:
    """The names of the definitions that a field refers to, in order."""
    if isinstance(field, list):
        return [name for part in field for name in _references(part)]
    if not isinstance(field, dict):
        return []
    own = [field["$ref"].rpartition("/")[2]] if "$ref" in field else []
    return own + [name for key in ("anyOf", "oneOf", "items") for name in _references(field.get(key))]


def _table(title: str, meaning: str, fields: Schema, definitions: Schema) -> list[str]:
    rows = [
        f"| `{name}` | {_values(field)} | {_default(field)} | {' '.join(field.get('description', '').split())} |"
        for name, field in fields.items()
        if not (set(_references(field)) & definitions.keys() - set(WHOLE)) or name == "arms"
    ]
    head = ["| key | values | default | meaning |", "|---|---|---|---|"] if rows else []
    return [f"## {title}", "", " ".join(meaning.split()), "", *head, *rows, *([""] if rows else [])]


def _values(field: Schema) -> str:
    """The type of a setting and its allowed values, in words."""
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if "$ref" in field:
        return "a section"
    for key in ("anyOf", "oneOf"):
        if key in field:
            return " or ".join(dict.fromkeys(_values(part) for part in field[key]))
    match field.get("type"):
        case "array":
            return f"list of: {_values(field['items'])}"
        case "object":
            entries = list(field.get("patternProperties", {}).values())
            return f"mapping of names to: {_values(entries[0]['anyOf'][0])}" if entries else "mapping"
        case "integer":
            return f"whole number {_bounds(field)}"
        case "number":
            return f"number {_bounds(field)}"
        case "boolean":
            return "`true`, `false`"
        case "null":
            return "`null`"
        case "string" if "pattern" in field:
            return "name (small letters, digits, `_`, `.`)"
        case "string":
            return "text"
        case _:
            return "any value"


def _bounds(field: Schema) -> str:
    if field["type"] == "integer" and "exclusiveMinimum" in field:
        field = {**field, "minimum": field["exclusiveMinimum"] + 1}
        del field["exclusiveMinimum"]
    words = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    # A billion says that there is no limit worth telling.
    return " ".join(f"{word} {field[key]:,}" for key, word in words.items() if field.get(key, 10**9) < 10**9)


def _default(field: Schema) -> str:
    return f"`{json.dumps(field['default'])}`" if "default" in field else ""
