"""Consecutive free ports on one machine, held against others that ask here for as long as their owner lives."""

from __future__ import annotations

import random
import socket
from dataclasses import dataclass
from typing import Self

PORT_RANGE = range(21_000, 29_000)
"""Above Ray's worker ports (10002-19999), below Serve's (30000) and Linux's ephemeral ones (32768)."""
ATTEMPTS = 200


@dataclass(frozen=True, slots=True)
class PortBlock:
    ports: tuple[int, ...]
    claims: tuple[socket.socket, ...]
    """Kernel objects that say who owns each port; gone with the process."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for claim in self.claims:
            claim.close()


def reserve_ports(address: str, count: int) -> PortBlock:
    """Claim `count` consecutive ports that nobody listens on now.

    Whoever else asks here, from any process of this machine, gets other ports, even before these are bound: a claim
    is an abstract Unix socket, which the kernel drops with its owner (unix(7)).

    Raises:
        OSError: No such run of ports was found.
    """
    for _ in range(ATTEMPTS):
        first = random.randrange(PORT_RANGE.start, PORT_RANGE.stop - count)
        block = _claim(address, tuple(range(first, first + count)))
        if block is not None:
            return block
    raise OSError(f"no {count} consecutive free ports on {address} in {PORT_RANGE.start}-{PORT_RANGE.stop - 1}")


def _claim(address: str, ports: tuple[int, ...]) -> PortBlock | None:
    claims: list[socket.socket] = []
    try:
        for port in ports:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            claims.append(claim)
            claim.bind(f"\0dynamo-ray-port-{port}")
            with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
                probe.bind((address, port))
    except OSError:
        for claim in claims:
            claim.close()
        return None
    return PortBlock(ports, tuple(claims))
