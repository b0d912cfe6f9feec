"""TensorRT-LLM's KV events, which it hands out in process and as mappings, as ours; pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from backends.kv_events import BlockRemoved, BlockStored, KVEvent

Told = Mapping[str, Any]
"""One event: `event_id`, `window_size`, `data` and, with attention DP, `attention_dp_rank`."""


class EventReader:
    """Of one engine, all its ranks. Remembers what it left out, so that its removal is left out too, and what was
    moved to the host, so that it is removed there.

    1.2 does not tell whose salt or adapter a block is of: it is then taken for one of neither, and a router that goes
    by it finds less cached than it was told.

    Left out are blocks that are not full, which nobody can find by their tokens, and those of attention windows
    shorter than the longest, which hold less than a prompt.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._longest_window = 0
        self._left_out: set[tuple[int, int]] = set()
        self._on_host: set[tuple[int, int]] = set()

    def read(self, told: Iterable[Told]) -> dict[int, list[KVEvent]]:
        """Every rank's events, in their order."""
        found: dict[int, list[KVEvent]] = defaultdict(list)
        for event in told:
            if not event:
                continue
            rank, window = event.get("attention_dp_rank") or 0, event.get("window_size") or 0
            self._longest_window = max(self._longest_window, window)
            data = event["data"]
            if window < self._longest_window:
                continue
            if data["type"] == "stored":
                found[rank].extend(self._stored(rank, data))
            elif data["type"] == "removed":
                found[rank].extend(self._removed(rank, data["block_hashes"]))
            elif data["type"] == "updated":
                found[rank].extend(self._moved(rank, data))
        return dict(found)

    def _stored(self, rank: int, data: Told) -> list[KVEvent]:
        hashes: list[int | bytes] = []
        tokens: list[int] = []
        for block in data["blocks"]:
            ids = [token["token_id"] for token in block["tokens"]]
            if len(ids) != self._block_size:
                self._left_out.add((rank, block["block_hash"]))
                continue
            hashes.append(block["block_hash"])
            tokens += ids
        if not hashes:
            return []
        return [
            BlockStored(
                hashes,
                data.get("parent_hash"),
                tokens,
                self._block_size,
                "GPU",
                data.get("lora_name"),
                data.get("cache_salt"),
            )
        ]

    def _removed(self, rank: int, hashes: list[int]) -> list[KVEvent]:
        keys = [(rank, each) for each in hashes]
        on_host: list[int | bytes] = [each for _, each in filter(self._on_host.__contains__, keys)]
        known: list[int | bytes] = [key[1] for key in keys if key not in self._left_out and key not in self._on_host]
        self._left_out.difference_update(keys)
        self._on_host.difference_update(keys)
        told = ((known, "GPU"), (on_host, "CPU"))
        return [BlockRemoved(blocks, medium) for blocks, medium in told if blocks]

    def _moved(self, rank: int, data: Told) -> list[KVEvent]:
        """A block is on one level at a time: 0 the device, 1 the host; a move is told by its name alone."""
        key, level = (rank, data["block_hash"]), data.get("cache_level")
        if key in self._left_out or not level or level["new_value"] not in (0, 1):
            return []
        to_host = level["new_value"] == 1
        if to_host == (key in self._on_host):
            return []
        (self._on_host.add if to_host else self._on_host.remove)(key)
        to, source = ("CPU", "GPU") if to_host else ("GPU", "CPU")
        return [BlockStored([key[1]], None, [], 0, to), BlockRemoved([key[1]], source)]
