"""TensorRT-LLM's KV events as ours."""

from __future__ import annotations

from typing import Any

from backends.kv_events import BlockRemoved, BlockStored
from backends.trtllm_events import EventReader


def block(block_hash: int, *tokens: int) -> dict[str, Any]:
    return {
        "type": "stored_block",
        "block_hash": block_hash,
        "tokens": [{"type": "unique_token", "token_id": token, "token_extra_id": 0} for token in tokens],
        "cache_level": 0,
        "priority": 35,
    }


def event(kind: str, rank: int | None = None, window: int = 4096, **data: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"event_id": 1, "window_size": window, "data": {"type": kind, **data}}
    return made if rank is None else made | {"attention_dp_rank": rank}


def stored(*blocks: dict[str, Any], parent: int | None = None, **fields: Any) -> dict[str, Any]:
    return event("stored", fields.pop("rank", None), parent_hash=parent, blocks=list(blocks), **fields)


def test_full_blocks_are_told_with_their_tokens_and_parent() -> None:
    big = (1 << 64) - 1
    told = [stored(block(big, 1, 2), block(8, 3, 4), parent=5, lora_name="a", cache_salt="tenant")]
    assert EventReader(2).read(told) == {0: [BlockStored([big, 8], 5, [1, 2, 3, 4], 2, "GPU", "a", "tenant")]}


def test_a_block_that_is_not_full_is_left_out_and_so_is_its_removal() -> None:
    reader = EventReader(2)
    assert reader.read([stored(block(7, 1, 2), block(8, 3))]) == {0: [BlockStored([7], None, [1, 2], 2, "GPU")]}
    assert reader.read([stored(block(9, 3))]) == {0: []}
    assert reader.read([event("removed", block_hashes=[8])]) == {0: []}
    assert reader.read([event("removed", block_hashes=[9, 7])]) == {0: [BlockRemoved([7], "GPU")]}
    assert reader.read([event("removed", block_hashes=[8])]) == {0: [BlockRemoved([8], "GPU")]}, "it is forgotten"


def test_ranks_are_told_apart() -> None:
    told = [stored(block(7, 1, 2), rank=1), stored(block(7, 1, 2), rank=0), event("removed", 1, block_hashes=[7])]
    assert EventReader(2).read(told) == {
        1: [BlockStored([7], None, [1, 2], 2, "GPU"), BlockRemoved([7], "GPU")],
        0: [BlockStored([7], None, [1, 2], 2, "GPU")],
    }


def test_short_attention_windows_are_left_out() -> None:
    told = [
        event("created", window=128, num_blocks_per_cache_level=[9, 0]),
        event("created", window=4096, num_blocks_per_cache_level=[9, 0]),
        stored(block(7, 1, 2), window=128),
        stored(block(8, 1, 2), window=4096),
    ]
    assert EventReader(2).read(told) == {0: [BlockStored([8], None, [1, 2], 2, "GPU")]}


def moved(block_hash: int, old: int, new: int) -> dict[str, Any]:
    diff = {"type": "event_diff", "old_value": old, "new_value": new}
    return event("updated", block_hash=block_hash, cache_level=diff, priority=None)


def test_a_block_is_where_it_was_moved_to_and_is_removed_there() -> None:
    reader = EventReader(2)
    reader.read([stored(block(7, 1, 2), block(8, 3, 4))])
    to_host = [BlockStored([7], None, [], 0, "CPU"), BlockRemoved([7], "GPU")]
    assert reader.read([moved(7, 0, 1), moved(7, 0, 1)]) == {0: to_host}
    assert reader.read([event("removed", block_hashes=[7, 8])]) == {
        0: [BlockRemoved([8], "GPU"), BlockRemoved([7], "CPU")]
    }
    assert reader.read([stored(block(7, 1, 2)), moved(7, 0, 1), moved(7, 1, 0)])[0][-2:] == [
        BlockStored([7], None, [], 0, "GPU"),
        BlockRemoved([7], "CPU"),
    ]


def test_what_changes_nothing_that_can_be_found_is_left_out() -> None:
    reader = EventReader(2)
    reader.read([stored(block(9, 3))])
    priority = event("updated", block_hash=7, cache_level=None, priority={"old_value": 1, "new_value": 2})
    assert not any(reader.read([{}, priority, moved(9, 0, 1)]).values())
