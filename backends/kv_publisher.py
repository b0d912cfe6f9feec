"""Publishes KV events over ZeroMQ with a replay buffer, by the protocol of vLLM 0.32 (distributed/kv_events.py).

PUB sends [topic, sequence, payload]. The replay ROUTER takes ["", start sequence] from a REQ or DEALER peer and
answers with every buffered batch from there on, then with sequence -1.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from backends.kv_events import KVEventBatch, encode, tokens_to_publish

END_OF_REPLAY = (-1).to_bytes(8, "big", signed=True)


class KVEventPublisher:
    """One rank's publisher, on the running loop. Ports are free ones on `host`.

    Raises:
        OSError: Nothing can be bound there.
    """

    def __init__(self, host: str, buffer_batches: int = 10_000) -> None:
        self._context = zmq.asyncio.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._replay = self._context.socket(zmq.ROUTER)
        try:
            self.endpoint = _bind(self._pub, host)
            self.replay_endpoint = _bind(self._replay, host)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise OSError(error.errno, error.strerror) from error
        self._buffer: deque[list[bytes]] = deque(maxlen=buffer_batches)
        self._task = asyncio.create_task(self._serve_replay(), name="kv-replay")

    def publish(self, batch: KVEventBatch) -> None:
        """Send and keep for replay; never blocks: a subscriber that is too slow finds a gap."""
        frames = encode(msgspec.structs.replace(batch, published_unix_s=time.time()))
        self._buffer.append(frames)
        with contextlib.suppress(zmq.Again):
            zmq.Socket.shadow(self._pub).send_multipart(frames, zmq.NOBLOCK)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._context.destroy(linger=0)

    async def _serve_replay(self) -> None:
        while True:
            frames = await self._replay.recv_multipart()
            if len(frames) != 3 or len(frames[2]) != 8:
                continue
            peer, _, start = frames
            for batch in list(self._buffer):
                if batch[1] >= start:
                    await self._replay.send_multipart([peer, b"", *batch])
            await self._replay.send_multipart([peer, b"", b"", END_OF_REPLAY, b""])


def pack_tokens(kv_events: Any) -> None:
    """Have this process's publishers tell token ids packed: less work for them, and much less for every reader.

    `kv_events` is the engine's module: distributed/kv_events.py of vLLM 0.32 and 0.33, srt/disaggregation/kv_events.py
    of SGLang 0.5.16 and 0.5.23. Their encoders take what a field holds, whatever it is declared to be.
    """
    publish = kv_events.ZmqEventPublisher.publish

    def packed(event: Any) -> Any:
        if not isinstance(event, kv_events.BlockStored):
            return event
        return msgspec.structs.replace(event, token_ids=tokens_to_publish(event.token_ids))

    def publish_packed(self: Any, events: Any) -> None:
        events.events = [packed(event) for event in events.events]
        publish(self, events)

    kv_events.ZmqEventPublisher.publish = publish_packed


def _bind(socket: zmq.asyncio.Socket, host: str) -> str:
    port = socket.bind_to_random_port(f"tcp://{host}")
    return f"tcp://{host}:{port}"
