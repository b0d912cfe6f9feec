"""What stands for addresses and ports while a worker has no place yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backends.engine import NodePlace

NUM_PORTS = 1024
"""More than any node of any worker needs."""
FIRST_PORT = 20_000


class Port(int):
    """A node's port, counted from the first of its block; reads `<port+3>` and adds up like a number."""

    def __new__(cls, offset: int) -> Port:
        return super().__new__(cls, FIRST_PORT + offset)

    def __str__(self) -> str:
        return f"<port{int(self) - FIRST_PORT:+d}>"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __add__(self, other: int) -> Port:
        return Port(int(self) - FIRST_PORT + int(other))

    def __sub__(self, other: int) -> Port:
        return Port(int(self) - FIRST_PORT - int(other))


def place(node_rank: int, address: str = "") -> NodePlace:
    """A node of a worker, at an address where one is planned."""
    return NodePlace(address or f"<node-{node_rank}>", tuple(map(Port, range(NUM_PORTS))))


def written(value: Any) -> Any:
    """The same with every placeholder as text, for JSON and YAML."""
    if isinstance(value, Port):
        return str(value)
    if isinstance(value, Mapping):
        return {key: written(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [written(item) for item in value]
    return value
