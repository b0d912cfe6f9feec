"""How simulated engines hand KV over: a rendezvous at the prefill side.

The prefill side offers a key with its state; the decode side asks for the key, waits until it is offered, and
says when its copy has landed, upon which the prefill side frees its blocks. A prefill side that dies or does not
know the key fails the pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec

from backends.engine import EngineError, GenerateRequest, KVHandoff

_WAIT_S = 30.0


class Fabric:
    """One engine's end. `released(key)` is called when a peer has its copy."""

    def __init__(self, host: str, released: Callable[[str], None]) -> None:
        self._host = host
        self._released = released
        self._offers: dict[str, asyncio.Future[tuple[int, int]]] = {}
        """Done: fetchable. Not done: a peer came first and waits."""
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.StreamWriter] = set()
        self.address: str | None = None

    async def listen(self) -> str:
        """Open the rendezvous of a prefill engine; returns its address."""
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.address = f"{self._host}:{self._server.sockets[0].getsockname()[1]}"
        return self.address

    def close(self) -> None:
        """Vanish: peers find nobody here any more. Safe to call twice."""
        if self._server is not None:
            self._server.close()
        for writer in self._peers:
            writer.close()

    def offer(self, key: str, state: int, num_tokens: int) -> dict[str, Any]:
        """Make KV fetchable; returns what a `sequential` hand-off carries."""
        future = self._future(key)
        if not future.done():
            future.set_result((state, num_tokens))
        return {"address": self.address, "key": key}

    def withdraw(self, key: str) -> None:
        future = self._offers.pop(key, None)
        if future is not None and not future.done():
            future.cancel()

    async def pull(self, handoff: KVHandoff) -> tuple[int, int]:
        """(state, tokens) of the prefill side.

        Raises:
            EngineError: It is gone, or never heard of this request.
        """
        address, key = _where(handoff)
        early = "bootstrap_room" in handoff.params
        try:
            async with asyncio.timeout(_WAIT_S):
                return await _ask(address, {"await" if early else "pull": key})
        except (OSError, EOFError, TimeoutError) as error:
            raise EngineError(f"the KV of {key} cannot be fetched from {address}: {error!r}") from error

    async def landed(self, handoff: KVHandoff) -> None:
        """Tell the prefill side to free.

        Raises:
            EngineError: It is gone: it died while the bytes were on their way.
        """
        address, key = _where(handoff)
        try:
            await _ask(address, {"landed": key})
        except (OSError, EOFError) as error:
            raise EngineError(f"{address} was lost while {key} was fetched: {error!r}") from error

    async def _fetch(self, key: str, early: bool, peer: asyncio.StreamReader) -> tuple[int, int]:
        """The offer of that key; `early` waits for one that is yet to come, as long as the peer does."""
        if not early and key not in self._offers:
            raise ConnectionResetError(f"no KV is held for {key}")
        offer = self._future(key)
        left = asyncio.ensure_future(peer.read(1))
        try:
            await asyncio.wait((offer, left), return_when=asyncio.FIRST_COMPLETED)
        finally:
            left.cancel()
        if not offer.done():
            self.withdraw(key)
        return offer.result()

    def _future(self, key: str) -> asyncio.Future[tuple[int, int]]:
        if key not in self._offers:
            self._offers[key] = asyncio.get_running_loop().create_future()
        return self._offers[key]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._peers.add(writer)
        try:
            message = msgspec.msgpack.decode(await _read(reader), type=dict[str, str])
            if "landed" in message:
                self._released(message["landed"])
                answer: tuple[int, int] = (0, 0)
            else:
                early = "await" in message
                answer = await self._fetch(message["await" if early else "pull"], early, reader)
            _write(writer, answer)
            await writer.drain()
        except (OSError, EOFError, asyncio.CancelledError, msgspec.DecodeError):
            pass  # The peer sees the closed connection, which is the whole message.
        finally:
            self._peers.discard(writer)
            writer.close()


def key_of(request: GenerateRequest) -> str:
    """Of a prefill leg: the room that the dispatcher chose, or the request's own id."""
    return request.request_id if request.handoff is None else str(request.handoff.params["bootstrap_room"])


def _where(handoff: KVHandoff) -> tuple[str, str]:
    params = handoff.params
    if "bootstrap_room" in params:
        return params["bootstrap_address"], str(params["bootstrap_room"])
    return params["address"], params["key"]


async def _ask(address: str, message: dict[str, str]) -> tuple[int, int]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        _write(writer, message)
        return msgspec.msgpack.decode(await _read(reader), type=tuple[int, int])
    finally:
        writer.close()


def _write(writer: asyncio.StreamWriter, message: object) -> None:
    body = msgspec.msgpack.encode(message)
    writer.write(len(body).to_bytes(4, "big") + body)


async def _read(reader: asyncio.StreamReader) -> bytes:
    size = int.from_bytes(await reader.readexactly(4), "big")
    return await reader.readexactly(size)
