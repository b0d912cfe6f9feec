from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from backends.arguments import SUPPORTED
from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, decoder
from backends.kv_publisher import pack_tokens
from backends.vllm import WIRE_FORMATS

STORED = {
    "type": "BlockStored",
    "block_hashes": [11, 12],
    "parent_block_hash": 10,
    "token_ids": [1, 2, 3, 4],
    "block_size": 2,
    "lora_id": 1,
    "medium": "GPU",
    "lora_name": "poet",
    "extra_keys": [("poet", "salt"), ("poet",)],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
"""The fields of vllm.distributed.kv_events.BlockStored, 0.32 and 0.33."""
NEW = {"vllm-0.32": {}, "vllm-0.33": {"lookahead_token_ids": [[3], [5]]}}
"""What a version adds."""


def frames(*events: dict[str, Any]) -> list[bytes]:
    return [b"", (7).to_bytes(8, "big"), msgspec.msgpack.encode([0.5, list(events), 1])]


@pytest.mark.parametrize("wire_format", NEW)
def test_events_of_each_version_are_read(wire_format: str) -> None:
    removed = {"type": "BlockRemoved", "block_hashes": [11], "medium": "GPU", "group_idx": 0}
    batch = decoder(wire_format)(frames({**STORED, **NEW[wire_format]}, removed, {"type": "AllBlocksCleared"}))
    assert (batch.sequence, batch.dp_rank) == (7, 1)
    assert batch.events == [
        BlockStored([11, 12], 10, [1, 2, 3, 4], 2, "GPU", "poet", "salt"),
        BlockRemoved([11], "GPU"),
        AllBlocksCleared(),
    ]


@pytest.mark.parametrize(
    ("lora", "extra_keys", "salt"),
    [
        (None, None, None),
        (None, [("salt",), None], "salt"),
        (None, [(("image", 3), "salt"), None], "salt"),
        ("poet", [("poet",), ("poet",)], None),
        ("poet", [("poet", "poet"), ("poet",)], "poet"),
    ],
)
def test_an_adapter_s_name_is_not_taken_for_a_salt(lora: str | None, extra_keys: Any, salt: str | None) -> None:
    given = {**STORED, "parent_block_hash": None, "lora_name": lora, "extra_keys": extra_keys}
    (stored,) = decoder("vllm-0.32")(frames(given)).events
    assert isinstance(stored, BlockStored)
    assert (stored.lora_name, stored.cache_salt) == (lora, salt)


def test_every_supported_version_has_a_format_that_is_read() -> None:
    assert WIRE_FORMATS.keys() == set(SUPPORTED["vllm"])
    for wire_format in WIRE_FORMATS.values():
        decoder(wire_format)


def test_of_a_hybrid_model_only_the_group_that_keeps_whole_prefixes_is_told_of() -> None:
    """Every group tells of the same blocks by the same hashes."""
    decode = decoder("vllm-0.33")
    window = {**STORED, "group_idx": 0, "kv_cache_spec_kind": "sliding_window"}
    whole = {**STORED, "group_idx": 1}
    gone = [{"type": "BlockRemoved", "block_hashes": [11], "group_idx": group} for group in (0, 1)]
    (stored,) = decode(frames(window, whole)).events
    assert isinstance(stored, BlockStored)
    assert decode(frames(gone[0])).events == []
    assert decode(frames(gone[1])).events == [BlockRemoved([11])]


@pytest.mark.parametrize(
    ("tokens", "told"),
    [([1, 258], b"\x01\0\0\0\x02\x01\0\0"), ([1, -1], [1, -1]), ([(1, 2)], [(1, 2)]), ([], [])],
    ids=["packed", "one that is none", "pairs", "none"],
)
def test_our_engine_cores_pack_token_ids_and_leave_the_rest_as_it_is(tokens: list[Any], told: Any) -> None:
    """And they leave the engine's own event alone: SGLang goes on appending to the last one."""
    published: list[Any] = []
    publisher = type("ZmqEventPublisher", (), {"publish": lambda self, events: published.extend(events.events)})
    stored = msgspec.defstruct("BlockStored", [("block_hashes", list[int]), ("token_ids", list[int])])
    module = SimpleNamespace(ZmqEventPublisher=publisher, BlockStored=stored)
    pack_tokens(module)
    event, cleared = stored([5], tokens), object()
    module.ZmqEventPublisher().publish(SimpleNamespace(events=[event, cleared]))
    assert published == [stored([5], told), cleared]
    assert event.token_ids is tokens
