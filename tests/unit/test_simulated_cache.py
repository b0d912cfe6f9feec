"""The simulated engine's KV bookkeeping."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from backends.simulated_cache import BlockPool, Family


def test_a_second_request_shares_the_full_blocks_of_the_first() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    first = pool.acquire(range(10))
    assert first is not None
    pool.publish_full(first, range(10))
    second = pool.acquire(range(10))
    assert second is not None
    assert len(second.shared) == 2
    assert pool.used_blocks == 4  # 2 shared, and each one's own partial block


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    lease = pool.acquire(range(8))
    assert lease is not None
    pool.publish_full(lease, range(8))
    assert len(pool.cached_blocks(range(8))) == 1


def test_a_cache_salt_separates() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    lease = pool.acquire(range(8), Family("a"))
    assert lease is not None
    pool.publish_full(lease, range(8))
    assert pool.cached_blocks(range(9), Family("b")) == []
    assert pool.cached_blocks(range(9)) == []
    assert len(pool.cached_blocks(range(9), Family("a"))) == 2


def test_adapters_share_nothing_with_each_other_nor_with_the_model() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    lease = pool.acquire(range(8), Family(lora="sql"))
    assert lease is not None
    pool.publish_full(lease, range(8))
    for other in (Family(), Family(lora="poems"), Family(salt="sql"), Family("x", "sql")):
        assert pool.cached_blocks(range(9), other) == []
    assert len(pool.cached_blocks(range(9), Family(lora="sql"))) == 2
    stored = pool.events[-1]
    assert isinstance(stored, BlockStored)
    assert (stored.lora_name, stored.cache_salt) == ("sql", None)


def test_after_a_flush_nothing_is_found_though_requests_keep_what_they_hold() -> None:
    pool = BlockPool(num_blocks=8, block_size=4)
    gone, held = pool.acquire(range(8)), pool.acquire(range(100, 108))
    assert gone is not None
    assert held is not None
    pool.publish_full(gone, range(8))
    pool.publish_full(held, range(100, 108))
    pool.release(gone)
    pool.flush()
    assert pool.events[-1] == AllBlocksCleared()
    assert pool.used_blocks == 2
    assert pool.cached_blocks(range(9)) == pool.cached_blocks(range(100, 109)) == []
    assert pool.extend(held, 12)
    pool.publish_full(held, range(100, 112))
    assert pool.events[-1] == AllBlocksCleared(), "what follows old blocks is old too"
    pool.release(held)
    assert pool.used_blocks == 0
    assert not pool._holders
    fresh = pool.acquire(range(8))
    assert fresh is not None
    pool.publish_full(fresh, range(8))
    assert len(pool.cached_blocks(range(9))) == 2


def test_eviction_takes_the_deepest_block_of_the_oldest_first_and_says_so() -> None:
    pool = BlockPool(num_blocks=3, block_size=4)
    lease = pool.acquire(range(12))
    assert lease is not None
    pool.publish_full(lease, range(12))
    hashes = list(lease.shared)
    pool.release(lease)
    assert pool.acquire(range(100, 104)) is not None
    assert pool.events[-1] == BlockRemoved(block_hashes=[hashes[-1]], medium="GPU")


def test_a_request_that_does_not_fit_holds_nothing() -> None:
    pool = BlockPool(num_blocks=2, block_size=4)
    assert pool.acquire(range(12)) is None
    assert pool.used_blocks == 0


@settings(max_examples=200)
@given(st.lists(st.tuples(st.sampled_from("agrf"), st.integers(0, 3), st.integers(1, 30)), max_size=60))
def test_blocks_are_never_lost_nor_used_twice_and_events_tell_what_is_findable(
    steps: list[tuple[str, int, int]],
) -> None:
    pool = BlockPool(num_blocks=12, block_size=4)
    leases = []
    for step, family, length in steps:
        if step == "a":
            tokens = [family * 1000 + i for i in range(length)]
            lease = pool.acquire(tokens)
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
        elif step == "f":
            pool.flush()
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
        else:
            findable.clear()
    of_before = {block for lease, _ in leases if lease.flushes < pool._flushes for block in lease.shared}
    assert findable == set(pool._holders) - of_before
    for lease, _ in leases:
        pool.release(lease)
    assert pool.used_blocks == 0
