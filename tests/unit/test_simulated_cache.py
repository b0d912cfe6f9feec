"""The simulated engine's KV bookkeeping."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kv_events import BlockRemoved, BlockStored
from backends.simulated_cache import BlockPool


def test_a_second_request_shares_the_full_blocks_of_the_first() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first = pool.acquire(range(10), None)
    assert first is not None
    pool.publish_full(first, range(10))
    second = pool.acquire(range(10), None)
    assert second is not None
    assert len(second.shared) == 2
    assert pool.used_blocks == 4  # 2 shared, and each one's own partial block


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    lease = pool.acquire(range(8), None)
    assert lease is not None
    pool.publish_full(lease, range(8))
    assert len(pool.cached_blocks(range(8), None)) == 1


def test_a_cache_salt_separates() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    lease = pool.acquire(range(8), "a")
    assert lease is not None
    pool.publish_full(lease, range(8))
    assert pool.cached_blocks(range(9), "b") == []
    assert pool.cached_blocks(range(9), None) == []
    assert len(pool.cached_blocks(range(9), "a")) == 2


def test_eviction_takes_the_deepest_block_of_the_oldest_first_and_says_so() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    lease = pool.acquire(range(12), None)
    assert lease is not None
    pool.publish_full(lease, range(12))
    hashes = list(lease.shared)
    pool.release(lease)
    assert pool.acquire(range(100, 104), None) is not None
    assert pool.events[-1] == BlockRemoved(block_hashes=[hashes[-1]], medium="GPU")


def test_a_request_that_does_not_fit_holds_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    assert pool.acquire(range(12), None) is None
    assert pool.used_blocks == 0


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("agr"), st.integers(0, 3), st.integers(1, 30)), max_size=60))
def test_blocks_are_never_lost_nor_used_twice_and_events_tell_what_is_findable(
    steps: list[tuple[str, int, int]],
) -> None:
    pool = BlockPool(num_blocks=12, block_size=4)
    leases = []
    for step, family, length in steps:
        if step == "a":
            tokens = [family * 1000 + i for i in range(length)]
            lease = pool.acquire(tokens, None)
            if lease is not None:
                pool.publish_full(lease, tokens)
                leases.append((lease, tokens))
        elif step == "g" and leases:
            lease, tokens = leases[family % len(leases)]
            if pool.extend(lease, len(tokens) + 1):
                tokens.append(family * 1000 + len(tokens))
                pool.publish_full(lease, tokens)
        elif step == "r" and leases:
            pool.release(leases.pop(family % len(leases))[0])
        assert 0 <= pool.used_blocks <= pool.num_blocks
    findable: set[int | bytes] = set()
    for event in pool.events:
        if isinstance(event, BlockStored):
            assert len(event.token_ids) == len(event.block_hashes) * event.block_size
            assert findable.isdisjoint(event.block_hashes)
            findable |= set(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert findable >= set(event.block_hashes)
            findable -= set(event.block_hashes)
    assert findable == set(pool._holders)
    for lease, _ in leases:
        pool.release(lease)
    assert pool.used_blocks == 0
