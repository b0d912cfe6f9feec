"""The index and its decoders under anything: they never fail, and equal a model too simple to be wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from backends.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    KVEventDecodeError,
    decoder,
    packed_tokens,
)
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import Holder, KVIndex
from dynamo_ray.routing.ranks import Ranks

HOLDERS = [Holder(name, 1, rank) for name in "ab" for rank in (0, 1)]
FORMATS = ["vllm-0.32", "vllm-0.33", "sglang-0.5.16", "sglang-0.5.23", "simulated-1"]
SIZE = 2
MEDIA = {"GPU": 0, "CPU": 1, "DISK": 2}

Prefix = tuple[Any, ...]
"""Whose block it is (adapter, salt), and all tokens up to its end."""


class Model:
    """Per rank and tier the copies of every name, and which prefix a name is; slow and plain."""

    def __init__(self) -> None:
        self.copies: dict[tuple[Holder, int], Counter[Any]] = {
            (h, tier): Counter() for h in HOLDERS for tier in range(3)
        }
        self.prefix: dict[tuple[Holder, int, Any], Prefix] = {}

    def apply(self, holder: Holder, event: KVEvent) -> None:
        if isinstance(event, AllBlocksCleared):
            for tier in range(3):
                self.copies[holder, tier].clear()
        elif isinstance(event, BlockRemoved):
            for name in event.block_hashes:
                self.copies[holder, MEDIA[event.medium or "GPU"]] -= Counter([name])
        else:
            self._store(holder, MEDIA[event.medium or "GPU"], event)

    def _store(self, holder: Holder, tier: int, event: BlockStored) -> None:
        prefix: Prefix = (event.lora_name, event.cache_salt)
        if event.parent_block_hash is not None:
            known = self._known(holder, event.parent_block_hash)
            if known is None and event.token_ids:
                return
            prefix = known or ()
        stored = []
        for number, name in enumerate(event.block_hashes):
            if event.token_ids:
                prefix = (*prefix, *event.token_ids[number * SIZE : (number + 1) * SIZE])
                stored.append((name, prefix))
            elif (known := self._known(holder, name)) is not None:
                stored.append((name, known))
        for name, found in stored:
            held = self.copies[holder, tier][name] > 0
            if not held or self.prefix[holder, tier, name] == found:
                self.prefix[holder, tier, name] = found
                self.copies[holder, tier][name] += 1

    def _known(self, holder: Holder, name: Any) -> Prefix | None:
        for tier in range(3):
            if self.copies[holder, tier][name] > 0:
                return self.prefix[holder, tier, name]
        return None

    def depth(self, holder: Holder, tokens: Sequence[int], tier: int) -> int:
        """Leading blocks on that tier or a faster one."""
        held = {
            self.prefix[holder, each, name]
            for each in range(tier + 1)
            for name, count in self.copies[holder, each].items()
            if count > 0
        }
        depth = 0
        while depth * SIZE < len(tokens) and (None, None, *tokens[: (depth + 1) * SIZE]) in held:
            depth += 1
        return depth


PROMPTS = [[0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1]]


def name(prompt: Sequence[int], depth: int, variant: int) -> int:
    """As engines name blocks: by all tokens up to its end; in two ways, for two names of one block."""
    return 100 * variant + int("1" + "".join(map(str, prompt[: depth * SIZE])), 2) if depth else 0


def event(kind: str, number: int, start: int, stop: int, variant: int, medium: str) -> KVEvent:
    if kind == "cleared":
        return AllBlocksCleared()
    prompt = PROMPTS[number]
    named: list[int | bytes] = [name(prompt, depth + 1, variant) for depth in range(start, stop)]
    if kind == "removed":
        return BlockRemoved(named, medium)
    if kind == "moved":
        return BlockStored(list(named), None, [], 0, medium)
    if kind == "misnamed":
        named[:] = named[::-1]
    ids = prompt[start * SIZE : max(start, stop) * SIZE]
    salt = "s" if kind == "salted" else None
    return BlockStored(named, name(prompt, start, variant) or None, ids, SIZE, medium, None, salt)


KINDS = ["stored"] * 7 + ["removed"] * 6 + ["moved", "moved", "misnamed", "salted", "cleared"]
events = st.builds(
    event,
    st.sampled_from(KINDS),
    st.integers(0, 1),
    st.sampled_from([0, 0, 0, 1, 2]),
    st.integers(1, 4),
    st.integers(0, 1),
    st.sampled_from(["GPU", "GPU", "GPU", "GPU", "CPU", "DISK"]),
)


@settings(max_examples=100, phases=(Phase.generate,))
@given(st.lists(st.tuples(st.sampled_from(HOLDERS[:2]), events), min_size=8, max_size=24))
def test_after_any_events_every_rank_s_leading_blocks_are_the_model_s(told: list[tuple[Holder, KVEvent]]) -> None:
    ranks = Ranks()
    index, model = KVIndex("m", ranks), Model()
    for holder in HOLDERS:
        index.add_holder(holder)
    for number, (holder, each) in enumerate(told):
        index.apply(holder, KVEventBatch(number, None, [each]))
        model.apply(holder, each)
    slowest = max((MEDIA[each.medium or "GPU"] for _, each in told if isinstance(each, BlockStored)), default=0)
    for prompt, mask in product(PROMPTS, (-1, 0b0010)):
        found = index.lookup(block_hashes(prompt, SIZE, chain_seed("m")), mask)
        for tier, runs in enumerate(found):
            depths = {h: model.depth(h, prompt, tier) for h in HOLDERS if tier <= slowest and mask >> ranks.add(h) & 1}
            assert len(ranks.by_holder(runs)) == sum(ranks_of.bit_count() for ranks_of, _ in runs)
            assert ranks.by_holder(runs) == {holder: depth for holder, depth in depths.items() if depth}
    for holder in HOLDERS:
        index.remove_holder(holder)
    assert index._tiers == ({}, {}, {})


wild_numbers = st.sampled_from([0, 1, 2, 3, -1, 1 << 31, 1 << 32, 1 << 64, -(1 << 63), 1 << 70])
wild_names = wild_numbers | st.sampled_from([b"", b"x" * 70])
wild_media = st.sampled_from(["GPU", "CPU", "TAPE", "", None])
wild_words = st.sampled_from([None, "", "s", "\ud800", "\0"])
wild = st.builds(
    BlockStored,
    st.lists(wild_names, max_size=4),
    st.none() | wild_names,
    st.lists(wild_numbers | wild_words, max_size=8),
    wild_numbers,
    wild_media,
    wild_words,
    wild_words,
)
wild_removed = st.builds(BlockRemoved, st.lists(wild_names, max_size=5), wild_media)


@settings(max_examples=50)
@given(
    st.lists(
        wild | st.builds(BlockRemoved, st.lists(wild_names, max_size=5), st.none() | st.text(max_size=3)), max_size=8
    )
)
def test_events_that_no_engine_sends_harm_nobody(told: list[KVEvent]) -> None:
    index = KVIndex("m", Ranks())
    honest, hostile = HOLDERS[0], HOLDERS[1]
    for holder in (honest, hostile):
        index.add_holder(holder)
    index.apply(honest, KVEventBatch(0, None, [BlockStored([1, 2], None, [1, 2, 3, 4], SIZE)]))
    index.apply(hostile, KVEventBatch(0, None, told))
    index.apply(Holder("a", 0, 0), KVEventBatch(0, None, told))
    assert index.overlap(block_hashes([1, 2, 3, 4], SIZE, chain_seed("m")))[honest] == 2
    index.remove_holder(hostile)
    assert index.num_blocks == 2


def honest_frames(wire_format: str, tokens: list[int] | bytes) -> bytes:
    if wire_format == "sglang-0.5.16":
        return msgspec.msgpack.encode([0.5, [["BlockStored", [1, 2], None, tokens, 2, None, "GPU"]], 1])
    stored = {"type": "BlockStored", "block_hashes": [1, 2], "parent_block_hash": None, "token_ids": tokens}
    return msgspec.msgpack.encode([0.5, [{**stored, "block_size": 2, "medium": "GPU"}], 1])


@pytest.mark.parametrize("wire_format", FORMATS)
@settings(max_examples=60)
@given(payload=st.binary(max_size=40), at=st.integers(0, 200), cut=st.integers(0, 4), packed=st.booleans())
def test_any_bytes_are_a_batch_or_are_refused_and_what_is_read_can_be_applied(
    wire_format: str, payload: bytes, at: int, cut: int, packed: bool
) -> None:
    good = honest_frames(wire_format, packed_tokens([1, 2, 3, 4]) if packed else [1, 2, 3, 4])
    at %= len(good)
    index = KVIndex("m", Ranks())
    index.add_holder(HOLDERS[0])
    decode = decoder(wire_format)
    for frame in (payload, good[:at] + payload[:3] + good[at + cut :], good):
        try:
            index.apply(HOLDERS[0], decode([b"", bytes(8), frame]))
        except KVEventDecodeError:
            continue
    assert index.num_held(HOLDERS[0]) >= 1 or index.anomalies.counts


@pytest.mark.parametrize("wire_format", FORMATS)
def test_packed_tokens_are_the_same_blocks(wire_format: str) -> None:
    tokens = [0, 129_279, 2**31, 2**32 - 1]
    index = KVIndex("m", Ranks())
    for holder, told in zip(HOLDERS, (tokens, packed_tokens(tokens)), strict=False):
        index.add_holder(holder)
        index.apply(holder, decoder(wire_format)([b"", bytes(8), honest_frames(wire_format, told)]))
    assert index.overlap(block_hashes(tokens, SIZE, chain_seed("m"))) == dict.fromkeys(HOLDERS[:2], 2)


@pytest.mark.parametrize("wire_format", FORMATS)
def test_packed_tokens_that_are_not_whole_are_refused(wire_format: str) -> None:
    with pytest.raises(KVEventDecodeError, match="15 bytes"):
        decoder(wire_format)([b"", bytes(8), honest_frames(wire_format, bytes(15))])


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b""],
        [b"", bytes(8)],
        [b"", bytes(7), b""],
        [b"", bytes(8), b"\x90" * 100_000],
        [b"", bytes(8), bytes(33 << 20)],
    ],
    ids=["none", "topic only", "no payload", "short sequence", "nested", "oversized"],
)
@pytest.mark.parametrize("wire_format", FORMATS)
def test_frames_that_are_none_are_refused(wire_format: str, frames: list[bytes]) -> None:
    with pytest.raises(KVEventDecodeError):
        decoder(wire_format)(frames)
