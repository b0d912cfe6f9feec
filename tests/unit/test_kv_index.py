"""Who holds which block: exact, and never more than was said."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent, KVEventBatch
from backends.simulated_cache import BlockPool
from dynamo_ray.routing.approximate import RoutedPrefixes
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import Holder, KVIndex
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


def test_what_happens_on_slower_media_says_nothing_of_the_device() -> None:
    tokens = list(range(8))
    assert index_with((A, stored(tokens, 1)), (A, BlockRemoved([1, 2], "CPU"))).overlap(hashes(tokens)) == {A: 2}


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


def test_what_was_routed_counts_until_it_expires() -> None:
    ranks = Ranks()
    ranks.add(A)
    routed = RoutedPrefixes(ranks, ttl_s=10.0)
    routed.routed(A, [1, 2, 3], now_s=0.0)
    assert routed.overlap([1, 2, 9], now_s=5.0) == {A: 2}
    assert routed.overlap([1, 2, 3], now_s=11.0) == {}
    routed.remove_holder(A)
    assert routed.overlap([1], now_s=5.0) == {}
