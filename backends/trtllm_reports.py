"""What TensorRT-LLM tells of itself between requests: KV events, published rank by rank, and how full its caches are.

It has no socket for either in 1.2, and 1.3's for events only with one of its cache managers, so the adapter polls.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from backends.engine import EngineStartError, KVEventSource
from backends.kv_events import KVEventBatch
from backends.kv_publisher import KVEventPublisher
from backends.trtllm_events import EventReader


@dataclass
class _Rank:
    kv_used_blocks: int | None = None
    sequence: int = 0
    publisher: KVEventPublisher | None = None


class Reports:
    """Of one engine, all its attention DP ranks."""

    def __init__(self, num_ranks: int) -> None:
        self.kv_total_blocks: int | None = None
        """Of one rank; known after the first iteration."""
        self._ranks = [_Rank() for _ in range(num_ranks)]
        self._reader: EventReader | None = None

    def kv_used_blocks(self, rank: int) -> int | None:
        """As it was told last; None: of this rank nothing ever was."""
        return self._ranks[rank].kv_used_blocks

    def take_statistics(self, executor: Any) -> None:
        """Ask for what is new; waits for the answer of another process."""
        for each in _fetch(executor.rpc_client.fetch_stats_async()):
            cache = each.get("kvCacheStats")
            if cache is None:
                continue
            self.kv_total_blocks = self.kv_total_blocks or cache["maxNumBlocks"]
            rank = each.get("attentionDpRank") or 0
            if rank < len(self._ranks):
                self._ranks[rank].kv_used_blocks = cache["usedNumBlocks"]

    def open(self, host: str, block_size: int) -> tuple[KVEventSource, ...]:
        """Publish every rank's events from here on: TensorRT-LLM gathers them on its first.

        Raises:
            EngineStartError: Nothing can be bound there.
        """
        self._reader = EventReader(block_size)
        sources = []
        for number, rank in enumerate(self._ranks):
            try:
                rank.publisher = publisher = KVEventPublisher(host)
            except OSError as error:
                raise EngineStartError(f"cannot listen on {host}: {error}") from error
            sources.append(KVEventSource(number, publisher.endpoint, publisher.replay_endpoint, "simulated-1"))
        return tuple(sources)

    @property
    def publishes(self) -> bool:
        return self._reader is not None

    def fetch_events(self, executor: Any) -> list[Any]:
        """Ask for what is new; waits for the answer of another process."""
        return _fetch(executor.rpc_client.fetch_kv_cache_events_async())

    def publish(self, told: list[Any]) -> None:
        """On the loop that `open` was called on."""
        assert self._reader is not None
        for number, events in self._reader.read(told).items():
            rank = self._ranks[number]
            if rank.publisher is not None and events:
                rank.publisher.publish(KVEventBatch(rank.sequence, number, events))
                rank.sequence += 1

    async def close(self) -> None:
        for rank in self._ranks:
            publisher, rank.publisher = rank.publisher, None
            if publisher is not None:
                await publisher.close()


def _fetch(call: Any) -> list[Any]:
    """The LLM's own get_stats and get_kv_cache_events wait on queues that its Ray executor does not fill, in 1.2 and
    1.3 (RpcExecutorMixin.setup_mainloop fetches responses alone); its first worker answers these calls."""
    return [json.loads(each) if isinstance(each, str) else each for each in call.remote()]
