"""The hand-off of KV from a prefill leg to a decode leg, in both styles, and who frees what when."""

from __future__ import annotations

import random
from dataclasses import dataclass

import msgspec

from backends.engine import KVHandoff, TokenChunk
from dynamo_ray.request.connection import TokenStream, WorkerConnection
from dynamo_ray.request.wire import WorkerInfo

MAX_ROOM = 1 << 62


@dataclass(slots=True)
class Transfer:
    """The KV of one prefill leg on its way to decode.

    The prefill side frees it when decode has its copy; until `landed`, leaving the pipeline makes us say so.
    """

    handoff: KVHandoff
    prefill: WorkerConnection
    leg: TokenStream
    """Open until `settle`: it may still be running beside decode (concurrent style), and its worker may die."""
    cached_tokens: int = 0
    engine_s: float = 0.0
    """What prefill took before decode could start."""
    has_landed: bool = False

    def landed(self) -> None:
        """Decode has produced a token, so it has its copy: what becomes of the prefill side no longer matters."""
        if not self.has_landed:
            self.has_landed = True
            self.leg.feeds(None)
            if self.leg.peeked is not None:
                self.cached_tokens = self.leg.peeked.cached_tokens or 0

    def both(self, chunk: TokenChunk) -> TokenChunk:
        """A chunk of decode's as that of both legs: what prefill did not compute is what the client was spared."""
        if chunk.cached_tokens is not None:
            chunk = msgspec.structs.replace(chunk, cached_tokens=self.cached_tokens)
        if chunk.engine_s is not None:
            chunk = msgspec.structs.replace(chunk, engine_s=self.engine_s + chunk.engine_s)
        return chunk

    def settle(self) -> None:
        """End the prefill side: abort it if it still runs, free what decode never fetched."""
        self.leg.close()
        if not self.has_landed:
            self.prefill.release(self.leg.request.request_id)


def rendezvous(prefill: WorkerInfo, dp_rank: int) -> KVHandoff:
    """What both legs of a concurrent hand-off are told.

    room % attn_dp_size == dp_rank, because SGLang's prefill derives the rank that serves a room from it
    (data_parallel_controller.py, follow_bootstrap_room, 0.5.16 and 0.5.23).
    """
    size = prefill.engine.attn_dp_size
    room = random.randrange(MAX_ROOM // size) * size + dp_rank
    address = prefill.engine.bootstrap_address
    if address is None:
        raise ValueError(f"{prefill.worker} hands over concurrently but has no bootstrap address")
    return KVHandoff({"bootstrap_address": address, "bootstrap_room": room, "prefill_dp_rank": dp_rank})
