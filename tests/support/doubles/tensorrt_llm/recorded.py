"""What was recorded of TensorRT-LLM's source, and its classes of data made from it."""

from __future__ import annotations

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[3] / "contract/recorded/trtllm_signatures.json"


@cache
def recorded() -> dict[str, Any]:
    made: dict[str, Any] = json.loads(RECORD.read_text())
    return made


def data_class(name: str, kw_only: bool = True) -> Any:
    """With the fields of both versions; `check` knows whose each is."""
    fields: dict[str, Any] = {}
    for of_version in recorded().values():
        fields |= of_version["fields"][name]
    return dataclasses.make_dataclass(
        name,
        [(key, Any) if default is None else (key, Any, _default(*default)) for key, default in fields.items()],
        kw_only=kw_only,
    )


def check(value: Any, version: str) -> None:
    """As that version's constructor would.

    Raises:
        TypeError: The value has something in a field that this version does not have.
    """
    if value is None:
        return
    name = type(value).__name__
    known = recorded()[version]["fields"][name]
    for field in dataclasses.fields(value):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in known and getattr(value, field.name) != default:
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {field.name!r}")


def _default(value: Any) -> Any:
    return dataclasses.field(default_factory=list) if value == [] else value
