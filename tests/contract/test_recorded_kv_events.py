"""KV events as vLLM 0.32.0 sent them, recorded: stores, extensions, a salted prompt, evictions, a cleared cache."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEventBatch, decoder
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import Holder, KVIndex
from dynamo_ray.routing.ranks import Ranks

ENCODINGS: dict[str, list[list[str]]] = json.loads(
    (Path(__file__).parent / "recorded/kv_event_encodings.json").read_text()
)
"""By wire format the frames of three batches, encoded by the event classes in that version's own wheel: tokens 1 to 128
in two blocks on the device; the first on the host too, and both off the device; all cleared."""
RECORDING: dict[str, Any] = json.loads((Path(__file__).parent / "recorded/vllm_0_32_kv_events.json").read_text())


@pytest.fixture(scope="module")
def batches() -> list[KVEventBatch]:
    decode = decoder(RECORDING["wire_format"])
    return [decode([bytes.fromhex(frame) for frame in frames]) for frames in RECORDING["frames"]]


def test_batches_are_numbered_without_gaps_and_name_their_rank(batches: list[KVEventBatch]) -> None:
    assert batches[0].sequence == 0
    assert all(later.sequence == earlier.sequence + 1 for earlier, later in pairwise(batches))
    assert {batch.dp_rank for batch in batches} == {0}


def test_a_prompt_and_its_extension_form_one_chain(batches: list[KVEventBatch]) -> None:
    (first,), (extension,) = batches[0].events, batches[1].events
    assert isinstance(first, BlockStored)
    assert isinstance(extension, BlockStored)
    size = RECORDING["block_size"]
    assert first.parent_block_hash is None
    assert first.token_ids == RECORDING["prompts"]["first"][: 2 * size]
    assert extension.parent_block_hash == first.block_hashes[-1]
    assert extension.token_ids == RECORDING["prompts"]["extended"][2 * size : 3 * size]


def test_the_salt_of_a_prompt_is_known(batches: list[KVEventBatch]) -> None:
    (salted,) = batches[2].events
    assert isinstance(salted, BlockStored)
    assert salted.cache_salt == RECORDING["salt"]
    assert salted.token_ids == RECORDING["prompts"]["salted"][: 2 * RECORDING["block_size"]]


def test_what_is_removed_was_stored_before(batches: list[KVEventBatch]) -> None:
    held: set[int | bytes] = set()
    num_removed = num_cleared = 0
    for event in (event for batch in batches for event in batch.events):
        if isinstance(event, BlockStored):
            held |= set(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert set(event.block_hashes) <= held
            held -= set(event.block_hashes)
            num_removed += len(event.block_hashes)
        else:
            assert isinstance(event, AllBlocksCleared)
            held.clear()
            num_cleared += 1
    assert (num_removed, num_cleared, len(held)) == (11, 1, 1)


@pytest.mark.parametrize("wire_format", ENCODINGS)
def test_each_engine_s_bytes_put_a_block_on_the_device_then_on_the_host_then_nowhere(wire_format: str) -> None:
    decode, holder = decoder(wire_format), Holder("w", 1, 3)
    index = KVIndex("m", Ranks())
    index.add_holder(holder)
    prompt = block_hashes(range(1, 129), 64, chain_seed("m"))
    seen = []
    for number, frames in enumerate(ENCODINGS[wire_format]):
        batch = decode([bytes.fromhex(frame) for frame in frames])
        assert (batch.sequence, batch.dp_rank) == (number, 3)
        index.apply(holder, batch)
        seen.append(index.lookup(prompt))
    on_device, on_host, nowhere = seen
    assert (on_device.device, on_device.host) == ([(1, 2)], [])
    assert (on_host.device, on_host.host) == ([], [(1, 1)])
    assert (nowhere.device, nowhere.host) == ([], [])
    assert not index.anomalies.counts
