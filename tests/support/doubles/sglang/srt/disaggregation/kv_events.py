"""srt/disaggregation/kv_events.py: a rank's KV events over ZeroMQ, in the encoding of its version."""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent


@dataclass
class KVEventBatch:
    ts: float
    events: list[KVEvent]


class ZmqEventPublisher:
    """PUB of [topic, sequence, payload], and a ROUTER that answers a sequence with every batch from there on, then -1.

    0.5.16 binds an endpoint only where it names a wildcard, and replays without the topic; 0.5.23 binds where `bind` is
    set, and replays what it sent.
    """

    END_SEQ = (-1).to_bytes(8, "big", signed=True)

    def __init__(self, version: str, config: str, attn_dp_rank: int) -> None:
        given = json.loads(config)
        self._version = version
        self._rank = attn_dp_rank
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        endpoint = self.offset_endpoint_port(given["endpoint"], attn_dp_rank)
        if given.get("bind") or "*" in endpoint or "::" in endpoint:
            self._pub.bind(endpoint)
        else:
            self._pub.connect(endpoint)
        self._buffer: deque[list[bytes]] = deque(maxlen=given.get("buffer_steps", 10_000))
        self._sequence = 0
        self._topic = () if version == "0.5.16" else (b"",)
        self._replay = self._context.socket(zmq.ROUTER)
        self._replay.bind(self.offset_endpoint_port(given["replay_endpoint"], attn_dp_rank))
        threading.Thread(target=self._serve_replay, name="zmq-publisher", daemon=True).start()

    @staticmethod
    def offset_endpoint_port(endpoint: str, attn_dp_rank: int) -> str:
        head, _, port = endpoint.rpartition(":")
        return f"{head}:{int(port) + attn_dp_rank}"

    def publish(self, events: KVEventBatch) -> None:
        payload = ENCODERS[self._version](events.ts, events.events, self._rank)
        frames = [b"", self._sequence.to_bytes(8, "big"), payload]
        self._sequence += 1
        self._buffer.append(frames)
        self._pub.send_multipart(frames)

    def _serve_replay(self) -> None:
        while True:
            peer, _, start = self._replay.recv_multipart()
            for frames in list(self._buffer):
                if frames[1] >= start:
                    self._replay.send_multipart([peer, b"", *self._topic, *frames[1:]])
            self._replay.send_multipart([peer, b"", *self._topic, self.END_SEQ, b""])


def encode_positional(ts: float, events: list[KVEvent], attn_dp_rank: int) -> bytes:
    """0.5.16: arrays, an event a block, what is None at their end left out."""
    return msgspec.msgpack.encode([ts, [array for event in events for array in _arrays(event)], attn_dp_rank])


def encode_tagged(ts: float, events: list[KVEvent], attn_dp_rank: int) -> bytes:
    """0.5.23: maps with a `type`, several blocks an event; optional fields that are None left out."""
    return msgspec.msgpack.encode([ts, [_map(event) for event in events], attn_dp_rank])


ENCODERS = {"0.5.16": encode_positional, "0.5.23": encode_tagged}


def _arrays(event: KVEvent) -> list[list[Any]]:
    if isinstance(event, AllBlocksCleared):
        return [["AllBlocksCleared"]]
    if isinstance(event, BlockRemoved):
        return [["BlockRemoved", [block], event.medium] for block in event.block_hashes]
    parents = [event.parent_block_hash, *event.block_hashes]
    size = len(event.token_ids) // len(event.block_hashes)  # of what a block's are: integers or bytes
    tokens = [event.token_ids[i * size : (i + 1) * size] for i in range(len(event.block_hashes))]
    return [
        ["BlockStored", [block], parents[i], tokens[i], event.block_size, None, event.medium]
        for i, block in enumerate(event.block_hashes)
    ]


def _map(event: KVEvent) -> dict[str, Any]:
    if isinstance(event, AllBlocksCleared):
        return {"type": "AllBlocksCleared"}
    if isinstance(event, BlockRemoved):
        return {"type": "BlockRemoved", "block_hashes": event.block_hashes, "medium": event.medium}
    assert isinstance(event, BlockStored)
    made: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": event.block_hashes,
        "parent_block_hash": event.parent_block_hash,
        "token_ids": event.token_ids,
        "block_size": event.block_size,
        "lora_id": None,
        "medium": event.medium,
    }
    return made | ({} if event.cache_salt is None else {"cache_salt": event.cache_salt})
