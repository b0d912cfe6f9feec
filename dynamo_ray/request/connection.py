"""The ingress's end of the data plane: one connection to one worker, many requests on it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import cast

import msgspec

from backends.engine import GenerateRequest, RankLoad, Role, TokenChunk
from dynamo_ray.errors import ClientTooSlow
from dynamo_ray.request import wire

log = logging.getLogger(__name__)

_decoder: msgspec.msgpack.Decoder[wire.ToIngress] = msgspec.msgpack.Decoder(wire.ToIngress)
CONNECT_TIMEOUT_S = 5.0
RECHECK_S = 0.05
MAX_PENDING_TOKENS = 65_536
"""Tokens one client may leave unread before its request is given up."""


class LegFailed(Exception):
    """One leg of a request ended without its last chunk; the pipeline decides whether another pair is tried."""

    def __init__(
        self, message: str, worker: str, retryable: bool, overloaded: bool = False, field: str | None = None
    ) -> None:
        super().__init__(message, worker, retryable, overloaded, field)
        self.message, self.worker, self.retryable = message, worker, retryable
        self.overloaded, self.field = overloaded, field

    def __str__(self) -> str:
        return f"{self.worker}: {self.message}"


class TokenStream:
    """The chunks of one leg; what arrives between two pulls is merged, so a slow reader costs no frames.

    `close` must be called exactly when the reader is done. A leg ends at its worker with its last chunk, with a
    failure the worker reports, or by an Abort that is sent as soon as nobody here wants more of it.
    """

    def __init__(self, request: GenerateRequest, connection: WorkerConnection) -> None:
        self.request = request
        self.finished = False
        """Its last chunk is here."""
        self._connection = connection
        self._pending: list[TokenChunk] = []
        self._num_pending_tokens = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._dependent: TokenStream | None = None

    @property
    def pending(self) -> bool:
        """There are chunks that `next` has not returned yet."""
        return bool(self._pending)

    @property
    def peeked(self) -> TokenChunk | None:
        """The oldest chunk nobody has pulled yet."""
        return self._pending[0] if self._pending else None

    async def next(self) -> TokenChunk:
        """Everything since the last pull as one chunk; waits until there is something.

        Raises:
            LegFailed: The worker refused or lost the request.
            RequestError: The deadline passed, or the reader was too slow.
        """
        if not self._pending:
            if self._error is not None:
                raise self._error
            self._waiter = self._connection.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
            if not self._pending:
                assert self._error is not None
                raise self._error
        pending, self._pending = self._pending, []
        self._num_pending_tokens = 0
        return pending[0] if len(pending) == 1 else _merge(pending)

    def feed(self, chunk: TokenChunk) -> None:
        self._pending.append(chunk)
        self._num_pending_tokens += len(chunk.token_ids)
        if chunk.finish_reason is not None:
            self.finished = True
            if self.request.leg is not Role.PREFILL:  # whose KV is still there, until somebody has fetched it
                self._connection.forget(self)
        elif self._num_pending_tokens > MAX_PENDING_TOKENS:
            self.fail(ClientTooSlow(f"the client left {MAX_PENDING_TOKENS} tokens unread"))
        self._wake()

    def fail(self, error: Exception) -> None:
        """End the stream with an error, and the leg with it; chunks already here are still delivered first."""
        if self._error is not None or (self.finished and self.request.leg is not Role.PREFILL):
            return
        self._error = error
        self._abandon()
        self._wake()
        if self._dependent is not None:
            self._dependent.fail(error)

    def feeds(self, dependent: TokenStream | None) -> None:
        """From now on a failure of this leg, its worker's death after its last chunk included, is also that one's."""
        self._dependent = dependent
        if dependent is not None and self._error is not None:
            dependent.fail(self._error)

    def fail_at(self, deadline_s: float, error: Exception) -> None:
        """Fail when the loop's clock reaches `deadline_s`."""
        self._deadline = self._connection.loop.call_at(deadline_s, self.fail, error)

    def close(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._abandon()

    def _abandon(self) -> None:
        if self._connection.forget(self) and not self.finished:
            self._connection.abort(self.request.request_id)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _merge(chunks: list[TokenChunk]) -> TokenChunk:
    first, last = chunks[0], chunks[-1]
    return TokenChunk(
        first.request_id,
        [token for chunk in chunks for token in chunk.token_ids],
        last.finish_reason,
        None if first.logprobs is None else [entry for chunk in chunks for entry in chunk.logprobs or ()],
        first.cached_tokens,
        first.transferred_tokens,
        last.handoff,
        first.engine_s,
    )


class WorkerConnection(asyncio.Protocol):
    """A live connection to one incarnation of one worker.

    `on_load(worker_info, loads)` is called at every heartbeat, `on_turn()` when the worker begins or ceases to take new
    requests though it lives, `on_flush(worker_info)` after a command has emptied its caches, and `on_lost(connection)`
    once, when the connection has ended: by either side, or because nothing came for `heartbeat_timeout_s`.
    """

    def __init__(
        self,
        info: wire.WorkerInfo,
        secret: bytes,
        heartbeat_timeout_s: float,
        on_load: Callable[[wire.WorkerInfo, tuple[RankLoad, ...]], None],
        on_turn: Callable[[], None],
        on_flush: Callable[[wire.WorkerInfo], None],
        on_lost: Callable[[WorkerConnection], None],
    ) -> None:
        self.info = info
        self.loop = asyncio.get_running_loop()
        self.alive = False
        self.draining = False
        self.paused: str | None = None
        """Why it takes no new requests until a command ends that."""
        self._flushes: int | None = None
        self._secret = secret
        self._timeout_s = heartbeat_timeout_s
        self._on_load, self._on_turn, self._on_flush, self._on_lost = on_load, on_turn, on_flush, on_lost
        self._nonce = secrets.token_bytes(wire.NONCE_BYTES)
        self._reader = wire.FrameReader(wire.MAX_WELCOME_BYTES)
        self._streams: dict[str, TokenStream] = {}
        self._ready: asyncio.Future[None] = self.loop.create_future()
        self._heard_s = self.loop.time()
        self._suspect = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    async def connect(self) -> None:
        """Connect and prove the secret both ways.

        Raises:
            OSError: Nobody listens, or the peer is not the worker it should be.
        """
        host, _, port = self.info.address.rpartition(":")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self.loop.create_connection(lambda: self, host, int(port))
                await self._ready
        except TimeoutError:
            self.close()
            raise ConnectionError(f"{self.info.worker} at {self.info.address} did not answer in time") from None

    def submit(self, request: GenerateRequest) -> TokenStream:
        """Start a leg.

        Raises:
            LegFailed: The connection is gone.
        """
        if not self.alive or self._transport is None:
            raise LegFailed("not connected", self.info.worker, retryable=True)
        stream = TokenStream(request, self)
        self._streams[request.request_id] = stream
        self._transport.write(wire.encode(wire.Submit(request)))
        return stream

    def abort(self, request_id: str) -> None:
        self._send(wire.Abort(request_id))

    def release(self, request_id: str) -> None:
        """Tell a prefill worker that nobody will fetch this request's KV any more."""
        self._send(wire.Release(request_id))

    def forget(self, stream: TokenStream) -> bool:
        """Take nothing more for it; whether it was still known, which is as long as its worker may have it."""
        known = self._streams.get(stream.request.request_id) is stream
        if known:
            del self._streams[stream.request.request_id]
        return known

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        was_alive, self.alive = self.alive, False
        if self._watchdog is not None:
            self._watchdog.cancel()
        if not self._ready.done():
            self._ready.set_exception(exc or ConnectionResetError("closed during the handshake"))
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.fail(LegFailed("the connection was lost", self.info.worker, retryable=True))
        if was_alive:
            self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        self._heard_s = self.loop.time()
        try:
            for frame in self._reader.feed(data):
                self._receive(_decoder.decode(frame))
        except (wire.FrameTooLarge, msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
            log.error("%s sent a bad frame: %s", self.info.worker, error)
            self.close()

    def _receive(self, message: wire.ToIngress) -> None:
        if isinstance(message, wire.Step) and self.alive:
            streams = self._streams
            for chunk in message.chunks:
                stream = streams.get(chunk.request_id)
                if stream is not None:
                    stream.feed(chunk)
        elif isinstance(message, wire.Challenge) and not self.alive:
            self._answer(message)
        elif isinstance(message, wire.Welcome) and not self.alive:
            self._welcomed(message)
        elif isinstance(message, wire.Heartbeat) and self.alive:
            self._heard(message)
        elif isinstance(message, wire.Failed) and self.alive:
            self._failed(message)
        else:
            log.error("%s sent %s out of turn", self.info.worker, type(message).__name__)
            self.close()

    def _heard(self, heartbeat: wire.Heartbeat) -> None:
        if (self.draining, self.paused) != (heartbeat.draining, heartbeat.paused):
            self.draining, self.paused = heartbeat.draining, heartbeat.paused
            self._on_turn()
        flushes, self._flushes = self._flushes, heartbeat.flushes
        if flushes is not None and flushes != heartbeat.flushes:
            self._on_flush(self.info)
        self._on_load(self.info, heartbeat.load)

    def _answer(self, challenge: wire.Challenge) -> None:
        if challenge.version != wire.PROTOCOL_VERSION:
            self._refuse(f"speaks protocol {challenge.version}, we speak {wire.PROTOCOL_VERSION}")
            return
        self._send(wire.Hello(self._nonce, wire.proof(self._secret, b"client", challenge.nonce)))

    def _welcomed(self, welcome: wire.Welcome) -> None:
        if not wire.check_proof(self._secret, b"server", self._nonce, welcome.proof):
            self._refuse("does not know the secret")
        elif (welcome.info.worker, welcome.info.epoch) != (self.info.worker, self.info.epoch):
            self._refuse(f"is {welcome.info.worker} epoch {welcome.info.epoch}, not epoch {self.info.epoch}")
        else:
            self._reader.max_frame_bytes = wire.MAX_FRAME_BYTES
            self.alive = True
            self._ready.set_result(None)
            self._watch()

    def _refuse(self, reason: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(ConnectionError(f"the server at {self.info.address} {reason}"))
        self.close()

    def _failed(self, message: wire.Failed) -> None:
        stream = self._streams.pop(message.request_id, None)
        if stream is not None:
            worker = self.info.worker
            stream.fail(LegFailed(message.message, worker, message.retryable, message.overloaded, message.field))

    def _watch(self) -> None:
        """A worker that is stopped, not dead, keeps its sockets open: silence is the only sign."""
        silent_s = self.loop.time() - self._heard_s
        if silent_s >= self._timeout_s and not self._suspect:
            # We may have been the one that was stopped: read what has arrived meanwhile before judging.
            self._suspect = True
            self._watchdog = self.loop.call_later(RECHECK_S, self._watch)
            return
        self._suspect = False
        if silent_s >= self._timeout_s:
            log.error("%s has been silent for %.1f s: treating it as dead", self.info.worker, silent_s)
            self.close()
            return
        self._watchdog = self.loop.call_later(self._timeout_s - silent_s + 0.01, self._watch)

    def _send(self, message: wire.ToWorker) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(wire.encode(message))
