"""The JSON schema and the page of settings are those of the source, and every shipped config fits the schema."""

import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from ssd_lit.cli import main
from ssd_lit.config.schema import experiment_schema
from ssd_lit.config.yaml_file import parse_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = experiment_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_files_are_those_of_the_source(tmp_path: Path) -> None:
    made = tmp_path / "schema.json", tmp_path / "settings.md"
    assert main(["schema", "--out", str(made[0]), "--page", str(made[1])]) == 0
    for path, kept in zip(made, (ROOT / "configs/schema.json", ROOT / "docs/settings.md"), strict=True):
        assert path.read_text() == kept.read_text(), f"{kept}: out of date; `ssd-lit schema` writes it anew"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_shipped_config_fits_the_schema_that_it_names(path: Path, validator: Any) -> None:
    text = path.read_text(encoding="utf-8")
    schema = os.path.relpath(ROOT / "configs/schema.json", path.parent)
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={schema}"
    validator.validate(parse_yaml(text))


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{base: quick.yaml, arms: {ssd: null, dense: {moe: {top_k: 2}}}, data: {held_out: {novel: null}}}", True),
        ("{arms: {ssd: {grid: {moe.top_k: [1, 2], switching: [{tau: 0.5, check_every: 2}]}}}}", True),
        ("{arms: {ssd: {grid: {moe.top_k: [one]}}}}", False),
        ("{arms: {ssd: {grid: {moe.topk: [1]}}}}", False),
        ("{model: {d_modle: 3}}", False),
        ("{model: {layers: 0}}", False),
        ("{arms: {ssd: {method: sdd}}}", False),
        ("{data: {sources: [{kind: files}]}}", False),
        ("{base: 3}", False),
    ],
)
def test_the_schema_takes_what_is_right_alone(text: str, right: bool, validator: Any) -> None:
    assert validator.is_valid(parse_yaml(text)) == right


def test_every_setting_has_a_meaning() -> None:
    schema = experiment_schema()
    kinds = [schema, *schema["$defs"].values()]
    bare = [key for kind in kinds for key, field in kind["properties"].items() if not field.get("description")]
    # A section says itself what it is.
    assert all(kind["description"] for kind in kinds)
    sections = {"data", "model", "moe", "optim", "training", "switching", "evaluation", "tokenizer"}
    assert set(bare) <= sections
