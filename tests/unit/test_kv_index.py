"""Who holds which block: exact, and never more than was said."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, KVEventBatch
from backends.simulated_cache import BlockPool
from dynamo_ray.routing.anomalies import Anomaly
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.holdings import STEP_BLOCKS
from dynamo_ray.routing.kv_index import Holder, KVIndex, Snapshot, TierSnapshot
from dynamo_ray.routing.ranks import Ranks

A, B = Holder("a", 1, 0), Holder("b", 1, 0)
SIZE = 4


def hashes(tokens: list[int], salt: str | None = None) -> list[int]:
    return block_hashes(tokens, SIZE, chain_seed("m", cache_salt=salt))


def stored(tokens: list[int], first: int, parent: int | None = None, salt: str | None = None) -> BlockStored:
    """Blocks named first, first+1, ... over `tokens`."""
    names: list[int | bytes] = list(range(first, first + len(tokens) // SIZE))
    return BlockStored(names, parent, tokens, SIZE, "GPU", None, salt)


def index_with(*applied: tuple[Holder, KVEvent]) -> KVIndex:
    index = KVIndex("m", Ranks())
    for number, (holder, event) in enumerate(applied):
        index.add_holder(holder)
        index.apply(holder, KVEventBatch(number, 0, [event]))
    return index


def test_the_overlap_is_the_leading_run_of_blocks_each_holder_has() -> None:
    tokens = list(range(16))
    index = index_with((A, stored(tokens, 100)), (B, stored(tokens[:8], 7)))
    assert index.overlap(hashes(tokens)) == {A: 4, B: 2}
    assert index.overlap(hashes(tokens[:8] + [99] * 8)) == {A: 2, B: 2}
    assert index.overlap(hashes([5] * 16)) == {}
    assert index.overlap([]) == {}


def test_chains_continue_across_events_by_the_engine_s_own_hashes() -> None:
    tokens = list(range(16))
    index = index_with((A, stored(tokens[:8], 100)), (A, stored(tokens[8:], 102, parent=101)))
    assert index.overlap(hashes(tokens)) == {A: 4}


def test_blocks_below_an_unknown_parent_are_counted_not_guessed() -> None:
    index = index_with((A, stored(list(range(8)), 100, parent=55)))
    assert index.num_blocks == 0
    assert index.orphan_blocks == 2


def test_a_block_stored_twice_is_held_until_both_copies_are_removed() -> None:
    """vLLM computes equal prompts side by side without sharing, and tells of each copy."""
    tokens = list(range(16))
    twice = ((A, stored(tokens, 100)), (A, stored(tokens, 100)))
    once_removed = index_with(*twice, (A, BlockRemoved([100, 101, 102, 103])))
    assert once_removed.overlap(hashes(tokens)) == {A: 4}
    assert index_with(*twice, *((A, BlockRemoved([100, 101, 102, 103])),) * 2).num_blocks == 0
    assert (
        index_with(*twice, (A, AllBlocksCleared()), (A, stored(tokens, 100)), (A, BlockRemoved([100]))).overlap(
            hashes(tokens)
        )
        == {}
    )


def test_a_block_is_counted_on_the_fastest_tier_that_holds_it_and_on_every_slower() -> None:
    tokens = list(range(16))
    on_host = stored(tokens, 100)
    index = index_with(
        (A, stored(tokens[:8], 100)),
        (A, BlockStored([102], 101, tokens[8:12], SIZE, "CPU_PINNED")),
        (A, BlockStored([103], 102, tokens[12:], SIZE, "STORAGE")),
        (B, BlockStored(on_host.block_hashes, None, tokens, SIZE, "CPU")),
    )
    assert index.lookup(hashes(tokens)) == ([(1, 2)], [(1, 3), (2, 4)], [(3, 4)])
    assert index.lookup(hashes(tokens), mask=0b10) == ([], [(2, 4)], [(2, 4)])
    index.apply(A, KVEventBatch(9, 0, [BlockRemoved([100, 101], "GPU")]))
    assert index.lookup(hashes(tokens)).device == []
    assert index.lookup(hashes(tokens)).host == [(2, 4)], "what left the device is not on the host"
    index.remove_holder(B)
    assert index.lookup(hashes(tokens)) == ([], [], [])


def test_a_block_moves_to_the_host_by_its_name_alone_if_it_was_told_of() -> None:
    """vLLM's offloading and TensorRT-LLM say no tokens again."""
    tokens = list(range(8))
    index = index_with(
        (A, stored(tokens, 1)), (A, BlockStored([1, 2, 77], None, [], 0, "CPU")), (A, BlockRemoved([1, 2], "GPU"))
    )
    assert index.lookup(hashes(tokens)) == ([], [(1, 2)], [])
    assert index.anomalies.total(Anomaly.UNKNOWN_BLOCK) == 1


def test_two_names_of_one_block_are_two_copies() -> None:
    tokens = list(range(8))
    index = index_with((A, stored(tokens, 1)), (A, stored(tokens, 11)), (A, BlockRemoved([1, 2])))
    assert index.overlap(hashes(tokens)) == {A: 2}
    index.apply(A, KVEventBatch(9, 0, [BlockRemoved([11])]))
    assert index.overlap(hashes(tokens)) == {}


def test_a_rank_in_doubt_answers_what_it_told_since_until_its_cache_is_known_again() -> None:
    tokens = list(range(16))
    index = index_with((A, stored(tokens, 1)), (B, stored(tokens, 1)))
    index.doubt(A)
    assert index.overlap(hashes(tokens)) == {B: 4}
    index.apply(A, KVEventBatch(9, 0, [stored(tokens[:4], 1), BlockStored([4], 3, tokens[12:], SIZE)]))
    assert index.overlap(hashes(tokens)) == {A: 1, B: 4}
    assert (index.doubtful, index.snapshot(A, 9)) == ({A}, None)
    index.apply(A, KVEventBatch(10, 0, [AllBlocksCleared()]))
    assert (index.doubtful, index.overlap(hashes(tokens))) == (set(), {B: 4})


def test_a_snapshot_carries_a_rank_to_another_process() -> None:
    tokens = list(range(16))
    one = index_with(
        (B, stored(tokens[:4], 50)),
        (A, stored(tokens, 1)),
        (A, stored(tokens[:4], 1)),
        (A, stored(tokens, 31)),
        (A, BlockStored([1, 2], None, [], 0, "CPU")),
    )
    packed = msgspec.msgpack.encode(one.snapshot(A, 7))
    other = KVIndex("m", Ranks())
    other.add_holder(A)
    other.doubt(A)
    snapshot = msgspec.msgpack.decode(packed, type=Snapshot)
    restore(other, snapshot)
    assert (snapshot.sequence, other.doubtful) == (7, set())
    for removed in ([1, 2, 3, 4], [31], [1]):
        assert other.overlap(hashes(tokens)).get(A) == one.overlap(hashes(tokens)).get(A) is not None
        for index in (one, other):
            index.apply(A, KVEventBatch(8, 0, [BlockRemoved(list(removed))]))
    assert A not in one.overlap(hashes(tokens)) | other.overlap(hashes(tokens))
    assert other.lookup(hashes(tokens)).host == [(1, 4)], "its first block is on the host, the others by another name"
    restore(other, Snapshot(9, [TierSnapshot([1], [], [])]))
    assert other.doubtful == {A}


def restore(index: KVIndex, snapshot: Snapshot) -> int:
    """Returns in how many steps."""
    return len(list(index.restoring(A, snapshot)))


def contents(index: KVIndex) -> list[tuple[object, ...]]:
    held = index.snapshot(A, 0)
    assert held is not None
    return [(dict(zip(t.theirs, t.ours, strict=True)), dict(t.copies)) for t in held.tiers if t.theirs]


def large(first: int, num_blocks: int) -> Snapshot:
    """One block in 10,000 has three names, and every tenth name was stored twice; half as many are on the host."""
    names = list(range(first, first + num_blocks))
    ours = [1_000_000 + name - (name % 10_000 if name % 10_000 in (1, 9_999) else 0) for name in names]
    device = TierSnapshot(names, ours, [(name, 1) for name in names if name % 10 == 0])
    return Snapshot(1, [device, TierSnapshot(names[::2], ours[::2], [])])


def test_a_large_snapshot_is_taken_in_by_short_steps_and_until_the_last_the_rank_is_in_doubt() -> None:
    index, fresh = (index_with((A, AllBlocksCleared())) for _ in range(2))
    other, snapshot = large(50_000, 20_000), large(0, 20_000)
    restore(index, other)
    restore(fresh, snapshot)
    before = index.num_held(A)
    for _ in index.restoring(A, snapshot):
        assert abs(index.num_held(A) - before) <= STEP_BLOCKS
        before = index.num_held(A)
        assert (index.doubtful, index.snapshot(A, 1)) == ({A}, None)
    assert index.doubtful == set()
    assert (
        contents(index)
        == contents(fresh)
        == [(dict(zip(tier.theirs, tier.ours, strict=True)), dict(tier.copies)) for tier in snapshot.tiers]
    )
    for again in (index, fresh):
        again.apply(A, KVEventBatch(9, 0, [BlockRemoved([1, 9_999, 10])]))
        assert again.overlap([1_000_000]) == again.overlap([1_000_010]) == {A: 1}, "another name, another copy"
        again.apply(A, KVEventBatch(10, 0, [BlockRemoved([0, 10, 0])]))
        assert again.overlap([1_000_000]) == again.overlap([1_000_010]) == {}
    restore(index, Snapshot(2, []))
    assert (index.num_held(A), index.num_blocks) == (0, 0)


@pytest.mark.parametrize("after", range(0, 12, 3))
@pytest.mark.parametrize("what", ["cleared", "in doubt", "restored", "gone", "known anew"])
def test_what_happens_to_a_rank_while_a_snapshot_is_taken_in_has_the_last_word(what: str, after: int) -> None:
    index = index_with((B, stored(list(range(8)), 1)), (A, AllBlocksCleared()))
    latest = Snapshot(2, [TierSnapshot([5], [7], [])])
    restore(index, large(50_000, 10_000))
    for number, _ in enumerate(index.restoring(A, large(0, 10_000))):
        if number == after:
            if what == "cleared":
                index.clear_holder(A)
            elif what == "in doubt":
                index.doubt(A)
            elif what == "restored":
                restore(index, latest)
            else:
                index.remove_holder(A)
                if what == "known anew":
                    index.add_holder(A)
                    index.apply(A, KVEventBatch(0, 0, [stored(list(range(4)), 5)]))
    assert index.doubtful == ({A} if what == "in doubt" else set())
    assert index.num_held(A) == (1 if what in ("restored", "known anew") else 0)
    assert index.num_blocks == (3 if what == "restored" else 2)


def test_removal_cuts_the_run_there() -> None:
    tokens = list(range(16))
    index = index_with((A, stored(tokens, 100)), (A, BlockRemoved([102, 12345])))
    assert index.overlap(hashes(tokens)) == {A: 2}


def test_clearing_and_removing_a_holder_leaves_the_others() -> None:
    tokens = list(range(16))
    index = index_with((A, stored(tokens, 1)), (B, stored(tokens, 1)), (A, AllBlocksCleared()))
    assert index.overlap(hashes(tokens)) == {B: 4}
    index.remove_holder(B)
    assert index.num_blocks == 0
    index.apply(A, KVEventBatch(9, 0, [stored(tokens, 1)]))
    index.apply(B, KVEventBatch(9, 0, [stored(tokens, 1)]))
    assert index.overlap(hashes(tokens)) == {A: 4}


def test_a_removed_rank_s_column_is_used_again_without_its_blocks() -> None:
    ranks = Ranks()
    index = KVIndex("m", ranks)
    index.add_holder(A)
    index.apply(A, KVEventBatch(0, 0, [stored(list(range(16)), 1)]))
    index.remove_holder(A)
    ranks.remove(A)
    assert (ranks.add(B), ranks.num_columns, ranks.holder(0)) == (0, 1, B)
    index.add_holder(B)
    assert index.overlap(hashes(list(range(16)))) == {}


def test_events_of_an_unknown_incarnation_are_ignored() -> None:
    index = index_with((A, stored(list(range(8)), 1)))
    index.apply(Holder("a", 2, 0), KVEventBatch(0, 0, [AllBlocksCleared()]))
    assert index.num_blocks == 2


def test_models_and_salts_share_nothing() -> None:
    tokens = list(range(8))
    index = index_with((A, stored(tokens, 1, salt="tenant")))
    assert index.overlap(hashes(tokens)) == {}
    assert index.overlap(hashes(tokens, "tenant")) == {A: 2}
    assert chain_seed("m", "ab", "c") != chain_seed("m", "a", "bc")


def test_many_holders_at_many_depths_are_told_apart() -> None:
    tokens = list(range(400))
    index = KVIndex("m", Ranks())
    for number in range(100):
        holder = Holder(f"w{number}", 1, number % 8)
        index.add_holder(holder)
        index.apply(holder, KVEventBatch(0, None, [stored(tokens[: SIZE * (number + 1)], 1)]))
    overlap = index.overlap(hashes(tokens))
    assert overlap == {Holder(f"w{n}", 1, n % 8): n + 1 for n in range(100)}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("aabbf"), st.integers(0, 4), st.integers(1, 30)), max_size=40))
def test_the_index_equals_the_caches_it_hears_of(steps: list[tuple[str, int, int]]) -> None:
    index = KVIndex("m", Ranks())
    pools = {A: BlockPool(10, SIZE), B: BlockPool(6, SIZE)}
    for holder in pools:
        index.add_holder(holder)
    prompts = []
    for number, (name, family, length) in enumerate(steps):
        holder = A if name in "af" else B
        if name == "f":
            pools[holder].flush()
        tokens = [family] * 6 + [i * (family + 1) for i in range(length)]
        prompts.append(tokens)
        pool = pools[holder]
        lease = pool.acquire(tokens)
        if lease is not None:
            pool.publish_full(lease, tokens)
            pool.release(lease)
        events, pool.events = pool.events, []
        index.apply(holder, KVEventBatch(number, 0, events))
    for tokens in prompts:
        overlap = index.overlap(hashes(tokens))
        for holder, pool in pools.items():
            # The cache never serves the last token, the index knows the block all the same.
            assert len(pool.cached_blocks([*tokens, 0, 0, 0, 0])) >= overlap.get(holder, 0)
            assert len(pool.cached_blocks(tokens)) <= overlap.get(holder, 0)
    assert index.orphan_blocks == 0


TOKENS = list(range(8))


@pytest.mark.parametrize(
    ("event", "anomaly"),
    [
        (BlockStored([1], None, [], SIZE, "GPU"), Anomaly.UNKNOWN_BLOCK),
        (BlockStored([1, 2], None, TOKENS, 0, "GPU"), Anomaly.BLOCK_SIZE),
        (BlockStored([1, 2], None, TOKENS, -4, "GPU"), Anomaly.BLOCK_SIZE),
        (BlockStored([1], None, TOKENS, 1 << 40, "GPU"), Anomaly.BLOCK_SIZE),
        (BlockStored([1], None, TOKENS, SIZE, "GPU"), Anomaly.LENGTH),
        (BlockStored([1, 2, 3], None, TOKENS, SIZE, "GPU"), Anomaly.LENGTH),
        (BlockStored([1, 2], None, [-1, *TOKENS[1:]], SIZE, "GPU"), Anomaly.TOKENS),
        (BlockStored([1, 2], None, [1 << 32, *TOKENS[1:]], SIZE, "GPU"), Anomaly.TOKENS),
        (BlockStored([1, 2], 99, TOKENS, SIZE, "GPU"), Anomaly.UNKNOWN_PARENT),
        (BlockStored([1, 2], None, TOKENS, SIZE, "TAPE"), Anomaly.MEDIUM),
        (BlockStored([50, 2], None, TOKENS, SIZE, "GPU"), Anomaly.CONTRADICTION),
    ],
)
def test_what_makes_no_sense_is_counted_logged_once_and_changes_nothing(
    event: BlockStored, anomaly: Anomaly, caplog: pytest.LogCaptureFixture
) -> None:
    held = [7] * 8
    index = index_with((A, stored(held, 50)), (A, event), (A, event))
    assert index.anomalies.total(anomaly) >= 2
    assert len(caplog.records) == 1
    assert index.overlap(hashes(held)) == {A: 2}
    assert index.overlap(hashes(TOKENS)) == {}


def test_a_batch_beyond_any_step_s_leaves_the_rank_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamo_ray.routing.kv_index.MAX_BATCH_BLOCKS", 3)
    index = index_with((A, stored(TOKENS, 1)))
    index.apply(A, KVEventBatch(1, 0, [BlockRemoved([1, 2, 3, 4])]))
    assert (index.doubtful, index.num_held(A)) == ({A}, 0)
    monkeypatch.setattr("dynamo_ray.routing.kv_index.MAX_RANK_BLOCKS", 1)
    index.apply(A, KVEventBatch(2, 0, [stored(TOKENS, 1)]))
    assert (index.anomalies.total(Anomaly.TOO_MANY_BLOCKS), index.num_held(A)) == (2, 0)


def test_of_a_rank_that_is_gone_nothing_stays_but_the_number_of_its_mistakes() -> None:
    index = index_with((A, BlockStored([1], None, TOKENS, 0, "GPU")))
    index.remove_holder(A)
    index.apply(A, KVEventBatch(1, 0, [stored(TOKENS, 1)]))
    assert index.anomalies.counts == {(Anomaly.BLOCK_SIZE, "gone"): 1, (Anomaly.UNKNOWN_RANK, str(A)): 1}
    assert index.num_blocks == 0
