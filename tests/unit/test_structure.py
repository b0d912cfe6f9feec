"""What a client may want its answer to look like, and what the engines are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.engine import Structure
from dynamo_ray.errors import InvalidRequest
from dynamo_ray.request import openai
from dynamo_ray.request.structure import MAX_BYTES, MAX_DEPTH, Wanted, wanted

SCHEMA = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}}
TEXT = '{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"}}}'
AT = "response_format.json_schema.schema"


def json_schema(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": schema, **fields}}}


def parse(fields: dict[str, Any]) -> Wanted | None:
    """Both endpoints take the same, and name the same field."""
    found = []
    for make, own in (
        (openai.parse_chat, {"messages": [{"role": "user", "content": "hi"}]}),
        (openai.parse_completion, {"prompt": "hi"}),
    ):
        found.append(wanted(make(json.dumps({"model": "m", **own, **fields}).encode(), "m")))  # type: ignore[operator]
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, (Structure("json_object"), "response_format")),
        (json_schema(SCHEMA), (Structure("json_schema", TEXT), AT)),
        (json_schema(SCHEMA, strict=True, description="a person"), (Structure("json_schema", TEXT), AT)),
        (json_schema(True), (Structure("json_schema", "{}"), AT)),
        ({"regex": "[ab]+"}, (Structure("regex", "[ab]+"), "regex")),
        ({"grammar": 'root ::= "a"'}, (Structure("grammar", 'root ::= "a"'), "grammar")),
        ({"ebnf": 'root ::= "a"'}, (Structure("grammar", 'root ::= "a"'), "ebnf")),
        ({"structured_outputs": {"json": SCHEMA}}, (Structure("json_schema", TEXT), "structured_outputs.json")),
        ({"structured_outputs": {"json": TEXT}}, (Structure("json_schema", TEXT), "structured_outputs.json")),
        ({"structured_outputs": {"regex": "a"}}, (Structure("regex", "a"), "structured_outputs.regex")),
        ({"structured_outputs": {"grammar": "a"}}, (Structure("grammar", "a"), "structured_outputs.grammar")),
        ({"structured_outputs": {"json_object": True}}, (Structure("json_object"), "structured_outputs.json_object")),
        ({"regex": "a", "response_format": {"type": "text"}}, (Structure("regex", "a"), "regex")),
    ],
)
def test_every_dialect_says_the_same_to_the_engines(fields: dict[str, Any], expected: Any) -> None:
    assert parse(fields) == expected


def nested(depth: int) -> dict[str, Any]:
    """A schema of that many objects inside each other."""
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"name": "x", "schema": {}}}},
            "response_format.json_schema",
            "needs",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, AT, "missing"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
            "missing",
        ),
        (json_schema([1]), AT, "object"),
        (json_schema("{}"), AT, "object"),
        (json_schema(None), AT, "object"),
        (json_schema(False), AT, "nothing matches"),
        (json_schema(nested(MAX_DEPTH + 1)), AT, "deep"),
        (json_schema({"enum": ["x" * MAX_BYTES]}), AT, "bytes"),
        (json_schema({"enum": [0] * (MAX_BYTES + 1)}), AT, "bytes"),
        (json_schema({"enum": [{}] * (MAX_BYTES + 1)}), AT, "bytes"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "not JSON"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs.json", "object"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "not known"),
        ({"regex": ""}, "regex", "empty"),
        ({"regex": "é" * (MAX_BYTES // 2 + 1)}, "regex", "bytes"),
        ({"grammar": ""}, "grammar", "empty"),
        ({"regex": 3}, "regex", "str"),
        ({"regex": "a", "grammar": "b"}, "grammar", "regex already"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "response_format already"),
        ({"structured_outputs": {"regex": "a", "grammar": "b"}}, "structured_outputs.grammar", "already"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "structure"),
        ({"regex": "a", "min_tokens": 3}, "min_tokens", "structure"),
    ],
)
def test_a_structure_that_cannot_be_is_refused_with_its_field(fields: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        parse(fields)
    assert caught.value.field == field


def test_the_largest_schemas_are_taken() -> None:
    assert parse(json_schema(nested(MAX_DEPTH))) is not None
    around = len(json.dumps({"enum": [""]}, separators=(",", ":")))
    found = parse(json_schema({"enum": ["x" * (MAX_BYTES - around)]}))
    assert found is not None
    assert len(found.structure.value) == MAX_BYTES


def test_numbers_beyond_64_bits_and_other_alphabets_survive() -> None:
    found = parse(json_schema({"maximum": 2**70, "title": "größer"}))
    assert found is not None
    assert found.structure.value == '{"maximum":1180591620717411303424,"title":"größer"}'


def test_what_an_engine_finds_fault_with_has_the_clients_name_for_it() -> None:
    raw = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}], **json_schema(SCHEMA)})
    body = openai.parse_chat(raw.encode(), "m")
    assert openai.field_of(body, "structure") == AT
    assert openai.field_of(body, "lora") == "model"
    assert openai.field_of(body, "prompt") == "messages"
    assert openai.field_of(body, "priority") == "priority"
    assert openai.field_of(body, None) is None
