"""The data-plane server around one engine: requests in, one frame of tokens out per engine step and connection."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import cast

import msgspec

from backends.engine import Command, Engine, EngineError, EngineInfo, GenerateRequest, TokenChunk
from dynamo_ray.cluster.commands import Hold, empties_caches
from dynamo_ray.request import wire

log = logging.getLogger(__name__)

_decoder: msgspec.msgpack.Decoder[wire.ToWorker] = msgspec.msgpack.Decoder(wire.ToWorker)
_hello_decoder = msgspec.msgpack.Decoder(wire.Hello)
HANDSHAKE_TIMEOUT_S = 5.0
MAX_UNREAD_BYTES = 16 * 1024 * 1024
"""An ingress that leaves this much unread is gone for us: its connection is closed and its requests are aborted."""


class WorkerServer:
    """Serves one engine to any number of ingresses that know the secret.

    A connection that ends, for whatever reason, aborts its requests. A request over `max_queued_requests` is
    refused at once, never queued.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        worker: str,
        epoch: int,
        secret: bytes,
        host: str,
        port: int = 0,
        max_queued_requests: int = 256,
    ) -> None:
        self.engine = engine
        self.secret = secret
        self.max_queued_requests = max_queued_requests
        self.draining = False
        self.holds: frozenset[Hold] = frozenset()
        self.flushes = 0
        self.on_flush: Callable[[], None] = lambda: None
        """Called after `flushes` has grown."""
        self.peers: set[_Peer] = set()
        self.num_requests = 0
        self._worker, self._epoch, self._host, self._port = worker, epoch, host, port
        self._idle = asyncio.Event()
        self._idle.set()
        self._server: asyncio.Server | None = None
        self._heartbeats: asyncio.Task[None] | None = None
        self.info: wire.WorkerInfo | None = None

    async def start(self, engine_info: EngineInfo) -> wire.WorkerInfo:
        """Listen; returns what ingresses need to connect.

        Raises:
            OSError: The port is taken.
        """
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Peer(self), self._host, self._port)
        port = self._server.sockets[0].getsockname()[1]
        self.info = wire.WorkerInfo(self._worker, self._epoch, f"{self._host}:{port}", engine_info)
        self._heartbeats = asyncio.create_task(self._beat(), name=f"heartbeat-{self._worker}")
        return self.info

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for those inside; False when some were still running at the end."""
        self.draining = True
        self._send_heartbeat()
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def hold(self, holds: frozenset[Hold]) -> frozenset[Hold]:
        """Refuse new requests for these reasons too, and have ingresses send none; returns those that are new."""
        new = holds - self.holds
        self.holds |= holds
        self._send_heartbeat()
        return new

    def unhold(self, holds: frozenset[Hold]) -> None:
        self.holds -= holds
        self._send_heartbeat()

    async def control(self, command: Command) -> None:
        """Have the engine carry it out; whether requests come meanwhile is up to `hold`.

        Raises:
            EngineError: As `Engine.control`.
        """
        try:
            await self.engine.control(command)
        finally:
            if empties_caches(command):  # perhaps half, where it failed
                self.flushes += 1
                self.on_flush()
                self._send_heartbeat()

    @property
    def paused(self) -> str | None:
        return " and ".join(sorted(self.holds)) or None

    async def stop(self) -> None:
        """Close every connection, aborting its requests; safe to call twice."""
        if self._heartbeats is not None:
            self._heartbeats.cancel()
        if self._server is not None:
            self._server.close()
        tasks = [task for peer in self.peers for task in peer.requests.values()]
        for task in tasks:
            task.cancel()
        for peer in list(self.peers):
            peer.abort()
        await asyncio.gather(*tasks, return_exceptions=True)

    def entered(self) -> None:
        self.num_requests += 1
        self._idle.clear()

    def left(self) -> None:
        self.num_requests -= 1
        if not self.num_requests:
            self._idle.set()

    async def _beat(self) -> None:
        while True:
            self._send_heartbeat()
            await asyncio.sleep(wire.HEARTBEAT_INTERVAL_S)

    def heartbeat(self) -> wire.Heartbeat:
        return wire.Heartbeat(self.engine.load(), self.draining, self.paused, self.flushes)

    def _send_heartbeat(self) -> None:
        frame = wire.encode(self.heartbeat())
        for peer in list(self.peers):
            peer.write(frame)


class _Peer(asyncio.Protocol):
    """One connected ingress."""

    def __init__(self, server: WorkerServer) -> None:
        self.requests: dict[str, asyncio.Task[None]] = {}
        self._server = server
        self._nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._reader = wire.FrameReader(wire.MAX_HELLO_BYTES)
        self._outbox: list[TokenChunk] = []
        self._flush_scheduled = False
        self._authenticated = False
        self._releases: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = cast(asyncio.Transport, transport)
        self._deadline = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self.close)
        self.write(wire.encode(wire.Challenge(wire.PROTOCOL_VERSION, self._nonce)))

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        self._server.peers.discard(self)
        for task in self.requests.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._reader.feed(data):
                if self._authenticated:
                    self._receive(_decoder.decode(frame))
                else:
                    self._authenticate(_hello_decoder.decode(frame))
        except (wire.FrameTooLarge, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            log.warning("closing a connection that sent what no ingress sends: %s", error)
            self.close()

    def write(self, frame: bytes) -> None:
        if self._transport.is_closing():
            return
        self._transport.write(frame)
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            log.warning("closing a connection whose ingress left %d bytes unread", MAX_UNREAD_BYTES)
            self._transport.abort()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """As `close`, without waiting for an ingress that does not read."""
        self._transport.abort()

    def _receive(self, message: wire.ToWorker) -> None:
        if isinstance(message, wire.Submit):
            self._submit(message.request)
        elif isinstance(message, wire.Abort):
            task = self.requests.get(message.request_id)
            if task is not None:
                task.cancel()
        elif isinstance(message, wire.Release):
            release = asyncio.create_task(self._server.engine.release(message.request_id))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)

    def _authenticate(self, hello: wire.Hello) -> None:
        server = self._server
        if not wire.check_proof(server.secret, b"client", self._nonce, hello.proof):
            log.warning("closing a connection that does not know the secret")
            self.close()
            return
        assert server.info is not None
        self._deadline.cancel()
        self._authenticated = True
        self._reader.max_frame_bytes = wire.MAX_FRAME_BYTES
        server.peers.add(self)
        self.write(wire.encode(wire.Welcome(wire.proof(server.secret, b"server", hello.nonce), server.info)))
        self.write(wire.encode(server.heartbeat()))

    def _submit(self, request: GenerateRequest) -> None:
        server, request_id = self._server, request.request_id
        if server.draining:
            self._fail(request_id, "the worker is draining", retryable=True, overloaded=True)
        elif server.paused is not None:
            self._fail(request_id, f"the worker {server.paused}", retryable=True, overloaded=True)
        elif server.num_requests >= server.max_queued_requests:
            limit = server.max_queued_requests
            self._fail(request_id, f"the worker already has {limit} requests", retryable=True, overloaded=True)
        elif request_id in self.requests:
            self._fail(request_id, f"request {request_id} is already running here", retryable=False)
        else:
            server.entered()
            task = asyncio.create_task(self._run(request, self._loop.time()), name=f"request-{request_id}")
            self.requests[request_id] = task
            task.add_done_callback(lambda _: self._ended(request_id))

    def _ended(self, request_id: str) -> None:
        del self.requests[request_id]
        self._server.left()

    async def _run(self, request: GenerateRequest, arrived_s: float) -> None:
        is_first, task = True, asyncio.current_task()
        assert task is not None
        try:
            chunks: AsyncGenerator[TokenChunk] = self._server.engine.generate(request)
            async with aclosing(chunks):
                async for chunk in chunks:
                    if task.cancelling():  # Python 3.11's wait_for, which SGLang 0.5.16 uses, can swallow that
                        raise asyncio.CancelledError
                    if chunk.finish_reason == "abort" and self._server.paused is not None:
                        # The command ended it, not its client, who gets the answer from another worker.
                        raise EngineError(f"it ended unfinished: the worker {self._server.paused}")
                    if is_first:
                        is_first = False
                        chunk = msgspec.structs.replace(chunk, engine_s=self._loop.time() - arrived_s)
                    self._push(chunk)
        except EngineError as error:
            self._fail(request.request_id, error.message, retryable=error.retryable, field=error.field)
        except Exception as error:
            log.exception("request %s failed inside the engine", request.request_id)
            self._fail(request.request_id, f"the engine failed: {error!r}", retryable=True)

    def _push(self, chunk: TokenChunk) -> None:
        """Queue for the frame of this engine step: the flush runs after every task the step woke."""
        self._outbox.append(chunk)
        if not self._flush_scheduled:
            self._flush_scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_scheduled = False
        if self._outbox:
            chunks, self._outbox = self._outbox, []
            self.write(wire.encode(wire.Step(chunks)))

    def _fail(
        self, request_id: str, message: str, *, retryable: bool, field: str | None = None, overloaded: bool = False
    ) -> None:
        self._flush()
        self.write(wire.encode(wire.Failed(request_id, message, retryable, field, overloaded)))
