"""Secrets of a configuration: what names where one stands is read in the process that uses it, as it is then."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from dynamo_ray.errors import ConfigError, Problem

_ELSEWHERE = re.compile(r"\$\{(?:file:(?P<file>/[^}]+)|(?P<variable>[A-Za-z_][A-Za-z0-9_]*))\}")


def check(value: str) -> str:
    """The value. Raises ValueError where it looks like the name of a place, and is none."""
    if value.startswith("${") and not _ELSEWHERE.fullmatch(value):
        raise ValueError("write ${NAME} for an environment variable, ${file:/path} for a file's content")
    return value


def is_literal(value: str) -> bool:
    """Whether it is the secret itself."""
    return _ELSEWHERE.fullmatch(value) is None


def variable(value: str) -> str | None:
    """The environment variable that it names."""
    elsewhere = _ELSEWHERE.fullmatch(value)
    return None if elsewhere is None else elsewhere["variable"]


def read(field: str, value: str) -> str:
    """The secret itself.

    Raises:
        ConfigError: It is not where it should be, or empty; names the field.
    """
    elsewhere = _ELSEWHERE.fullmatch(value)
    if elsewhere is None:
        return value
    if elsewhere["file"]:
        found = readable(field, elsewhere["file"]).read_text(encoding="utf-8").strip()
    else:
        name = elsewhere["variable"]
        if name not in os.environ:
            raise _wrong(field, f"the environment variable {name} is not set; set it on every node before Ray starts")
        found = os.environ[name]
    if not found:
        raise _wrong(field, f"{elsewhere['file'] or elsewhere['variable']} is empty; write the secret there")
    return found


def read_each(field: str, values: Sequence[str]) -> tuple[str, ...]:
    """All of a list. Raises as `read` does."""
    return tuple(read(f"{field}[{index}]", value) for index, value in enumerate(values))


def read_first(field: str, values: Sequence[str]) -> str | None:
    """The first of a list, wherever the others are; None: there is none. Raises as `read` does."""
    return read(f"{field}[0]", values[0]) if values else None


def bearer(key: str | None) -> dict[str, str]:
    """The header that shows an API key; none without one."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def readable(field: str, path: str) -> Path:
    """That file. Raises ConfigError where there is none to read."""
    file = Path(path).expanduser()
    if not os.access(file, os.R_OK) or not file.is_file():
        raise _wrong(field, f"there is no readable file {file} on this node")
    return file


def _wrong(field: str, message: str) -> ConfigError:
    return ConfigError((Problem(field, message),))
