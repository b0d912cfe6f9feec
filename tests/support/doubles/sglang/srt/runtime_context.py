"""srt/runtime_context.py, of 0.5.23 only: what the last engine of this process was started with."""

from __future__ import annotations

from typing import Any

_published: list[Any] = []


def publish(server_args: Any) -> None:
    _published[:] = [server_args]


def get_schedule() -> Any:
    return _published[0]


def get_memory() -> Any:
    return _published[0]
