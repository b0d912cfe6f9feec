"""The OpenAPI document, from the same types that check the requests."""

from __future__ import annotations

from typing import Any

import msgspec

from dynamo_ray import __version__
from dynamo_ray.request.openai import ChatBody, CompletionBody
from dynamo_ray.routing.explanation import Explanation

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_STATUSES = {
    "400": "A field is wrong; `param` names it",
    "401": "No valid API key",
    "404": "Neither the model served nor one of its adapters",
    "413": "The body is too large",
    "429": "Every rank is busy, and the queue full or longer than the deadline; see Retry-After",
    "502": "The workers of this request were lost, and so were those it was moved to",
    "503": "No worker is ready; see Retry-After",
    "504": "The deadline has passed",
}


def document(model: str) -> dict[str, Any]:
    """OpenAPI 3.1, ready for JSON."""
    types = (ChatBody, CompletionBody, Explanation)
    schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")[1]
    return {
        "openapi": "3.1.0",
        "info": {"title": f"dynamo_ray: {model}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": _generating("The assistant's next message", "ChatBody")},
            "/v1/completions": {"post": _generating("A continuation of each prompt", "CompletionBody")},
            "/v1/route": {"post": _routing()},
            "/v1/models": {"get": _plain("The model served, and its adapters")},
            "/v1/models/{model}": {"get": {**_plain("One of them"), "parameters": [_MODEL]}},
            "/health": {"get": _plain("This process is alive")},
            "/ready": {"get": _plain("Requests can be served; 503 with the reason while they cannot")},
            "/metrics": {"get": _plain("Prometheus metrics")},
            "/openapi.json": {"get": _plain("This document")},
        },
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }


def _plain(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": "OK"}}}


def _routing() -> dict[str, Any]:
    bodies = [{"$ref": f"#/components/schemas/{schema}"} for schema in ("ChatBody", "CompletionBody")]
    described = _generating("Where such a request would go, and why; nothing is generated", "")
    described["requestBody"]["content"]["application/json"]["schema"] = {"oneOf": bodies}
    answer = {"application/json": {"schema": {"$ref": "#/components/schemas/Explanation"}}}
    described["responses"]["200"] = {"description": "Every candidate of both legs", "content": answer}
    return described


def _generating(summary: str, schema: str) -> dict[str, Any]:
    body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers: dict[str, Any] = {"200": {"description": "The answer; server-sent events with stream: true"}}
    answers |= {status: {"description": text, "content": error} for status, text in _STATUSES.items()}
    return {"summary": summary, "requestBody": {"required": True, "content": body}, "responses": answers}
