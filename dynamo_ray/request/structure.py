"""What a client may want its answer to look like, in OpenAI's, vLLM's and SGLang's words, and in the engines'. Pure."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from backends.engine import Structure
from dynamo_ray.errors import InvalidRequest

MAX_BYTES = 64 * 1024
"""Of a schema, an expression or a grammar: engines compile each one, and every rank does."""
MAX_DEPTH = 64
"""Of a schema: compilers recurse into it, some of them without a limit of their own."""


class JsonSchema(Struct, frozen=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(min_length=1, max_length=64)]
    schema: Any | UnsetType = UNSET
    """A JSON Schema: an object, or true."""
    strict: bool | None = None
    """Every schema is kept to, whatever this says."""
    description: str | None = None
    """Not shown to the model; say it in a message."""


class ResponseFormat(Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's."""

    json: Any | UnsetType = UNSET
    """A JSON Schema, or its text."""
    regex: str | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Asking(Protocol):
    """A body, as far as it may ask for a structure."""

    @property
    def response_format(self) -> ResponseFormat | None: ...
    @property
    def structured_outputs(self) -> StructuredOutputs | None: ...
    @property
    def regex(self) -> str | None: ...
    @property
    def grammar(self) -> str | None: ...
    @property
    def ebnf(self) -> str | None: ...


class Wanted(NamedTuple):
    structure: Structure
    field: str
    """Where the client asked for it."""


def wanted(body: Asking) -> Wanted | None:
    """The structure asked for; None: any text will do.

    Raises:
        InvalidRequest: Two structures, or one that cannot be; names the field.
    """
    found = [*_of_response_format(body.response_format), *_of_structured_outputs(body.structured_outputs)]
    if body.regex is not None:
        found.append(Wanted(Structure("regex", body.regex), "regex"))
    found += [
        Wanted(Structure("grammar", text), field)
        for field, text in (("grammar", body.grammar), ("ebnf", body.ebnf))
        if text is not None
    ]
    if len(found) > 1:
        first, second = found[0].field, found[1].field
        raise InvalidRequest(f"{second}: {first} already says how the answer must look; send one of them", second)
    for structure, field in found:
        _check_text(structure, field)
    return found[0] if found else None


def _of_response_format(given: ResponseFormat | None) -> list[Wanted]:
    if given is None:
        return []
    if given.type != "json_schema":
        if given.json_schema is not None:
            field = "response_format.json_schema"
            raise InvalidRequest(f"{field} needs `type` to be json_schema, not {given.type}", field)
        return [Wanted(Structure("json_object"), "response_format")] if given.type == "json_object" else []
    if given.json_schema is None:
        raise InvalidRequest("`response_format.json_schema` is missing", "response_format.json_schema")
    field = "response_format.json_schema.schema"
    if given.json_schema.schema is UNSET:
        raise InvalidRequest(f"`{field}` is missing", field)
    return [Wanted(Structure("json_schema", schema_text(given.json_schema.schema, field)), field)]


def _of_structured_outputs(given: StructuredOutputs | None) -> list[Wanted]:
    if given is None:
        return []
    found = []
    if given.json is not UNSET and given.json is not None:
        field = "structured_outputs.json"
        found.append(Wanted(Structure("json_schema", schema_text(_parsed(given.json, field), field)), field))
    if given.regex is not None:
        found.append(Wanted(Structure("regex", given.regex), "structured_outputs.regex"))
    if given.grammar is not None:
        found.append(Wanted(Structure("grammar", given.grammar), "structured_outputs.grammar"))
    if given.json_object:
        found.append(Wanted(Structure("json_object"), "structured_outputs.json_object"))
    return found


def _parsed(schema: Any, field: str) -> Any:
    """vLLM takes a schema's text too."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"{field}: this text is not JSON: {error}", field) from error


def schema_text(schema: Any, field: str) -> str:
    """The schema as JSON, its properties in the order they were given in: answers keep to that order.

    Raises:
        InvalidRequest: It is no JSON Schema, admits nothing, or is too large; names `field`.
    """
    if schema is False:
        raise InvalidRequest(f"{field}: nothing matches the schema `false`; send an object", field)
    if schema is True:
        schema = {}  # the same by definition, and every engine takes it
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field}: a JSON Schema is an object, or true", field)
    _check_shape(schema, field)
    return json.dumps(schema, ensure_ascii=False, separators=(",", ":"))


def _check_shape(schema: dict[str, Any], field: str) -> None:
    """Level by level, and no further than a schema of the right size goes."""
    level: list[dict[str, Any] | list[Any]] = [schema]
    depth = num_values = 0
    while level:
        depth += 1
        num_values += sum(map(len, level))
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{field}: nested more than {MAX_DEPTH} deep; use $defs and $ref", field)
        if num_values > MAX_BYTES:
            raise InvalidRequest(f"{field}: has more than {MAX_BYTES} bytes", field)
        inner = [value for values in level for value in (values.values() if isinstance(values, dict) else values)]
        level = [value for value in inner if isinstance(value, dict | list)]


def _check_text(structure: Structure, field: str) -> None:
    if structure.kind in ("regex", "grammar") and not structure.value:
        raise InvalidRequest(f"{field}: is empty; leave it out where any text will do", field)
    size = len(structure.value.encode())
    if size > MAX_BYTES:
        raise InvalidRequest(f"{field}: has {size} bytes; at most {MAX_BYTES} are taken", field)
