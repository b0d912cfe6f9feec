from __future__ import annotations

from typing import Any

import msgspec
import pytest

from backends.kv_events import BlockStored, decoder

EVENTS = {
    "sglang-0.5.16": lambda tokens: ["BlockStored", [11], None, tokens, 2, None, "GPU"],
    "sglang-0.5.23": lambda tokens: {
        "type": "BlockStored",
        "block_hashes": [11],
        "parent_block_hash": None,
        "token_ids": tokens,
        "block_size": 2,
        "lora_id": None,
        "medium": "GPU",
    },
}
"""The fields of sglang.srt.disaggregation.kv_events.BlockStored."""


@pytest.mark.parametrize("wire_format", EVENTS)
@pytest.mark.parametrize("tokens", [[1, 2], [(1, 2), (2, 3)]], ids=["plain", "with an EAGLE draft"])
def test_a_block_is_its_own_tokens_whether_or_not_a_draft_pairs_them_with_the_next(
    wire_format: str, tokens: list[Any]
) -> None:
    payload = msgspec.msgpack.encode([0.5, [EVENTS[wire_format](tokens)], 1])
    (stored,) = decoder(wire_format)([b"", bytes(8), payload]).events
    assert stored == BlockStored([11], None, [1, 2], 2, "GPU")
