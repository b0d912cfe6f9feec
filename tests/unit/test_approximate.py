"""Guesses of what ranks cache: bounded in time and number, and gone with the rank."""

from __future__ import annotations

import pytest
from data_path import cluster

from dynamo_ray.routing.approximate import RoutedPrefixes
from dynamo_ray.routing.ranks import Holder, Ranks
from dynamo_ray.simulator import clock

A, B = Holder("a", 1, 0), Holder("b", 1, 0)


@pytest.fixture
def ranks() -> Ranks:
    made = Ranks()
    made.add(A)
    made.add(B)
    return made


def test_what_was_routed_counts_until_it_expires(ranks: Ranks) -> None:
    routed = RoutedPrefixes(ranks, ttl_s=10.0)
    routed.routed(A, [1, 2, 3], now_s=0.0)
    routed.routed(B, [1, 2], now_s=5.0)
    assert routed.overlap([1, 2, 9], now_s=5.0) == {A: 2, B: 2}
    assert routed.lookup([1, 2, 3], 5.0, mask=0b01) == [(0b01, 3)]
    assert routed.overlap([1, 2, 3], now_s=10.0) == {B: 2}
    assert routed.overlap([1, 2, 3], now_s=20.0) == {}
    assert len(routed) == 0


def test_to_be_sent_again_is_to_count_for_longer(ranks: Ranks) -> None:
    routed = RoutedPrefixes(ranks, ttl_s=10.0)
    routed.routed(A, [1, 2, 3], now_s=0.0)
    routed.routed(A, [1, 2], now_s=8.0)
    assert routed.overlap([1, 2, 3], now_s=12.0) == {A: 2}


def test_a_rank_keeps_its_newest_prompts_and_of_one_too_long_the_beginning(ranks: Ranks) -> None:
    routed = RoutedPrefixes(ranks, max_blocks=4)
    routed.routed(A, [1, 2, 3], now_s=0.0)
    routed.routed(A, [5, 6], now_s=1.0)
    assert (routed.overlap([1, 2, 3], 1.0), routed.overlap([5, 6], 1.0)) == ({A: 2}, {A: 2})
    routed.routed(A, list(range(10, 20)), now_s=2.0)
    assert (routed.overlap(list(range(10, 20)), 2.0), len(routed)) == ({A: 4}, 4)


def test_a_rank_that_left_leaves_nothing_to_the_next_of_its_column(ranks: Ranks) -> None:
    routed = RoutedPrefixes(ranks)
    routed.routed(A, [1], now_s=0.0)
    routed.remove_holder(A)
    ranks.remove(A)
    routed.routed(A, [1], now_s=0.0)
    assert ranks.add(Holder("c", 1, 0)) == 0
    assert routed.overlap([1], now_s=0.0) == {}


def test_that_a_cache_is_guessed_is_said_once_and_shown(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> dict[str, float]:
        async with cluster(prefill=0, decode=1, router={"approximate": {"ttl_s": 7, "max_blocks": 9}}) as made:
            guesses = made.dispatch.router.chooser.guesses
            assert (guesses.ttl_s, guesses.max_blocks) == (7, 9)
            readings = made.dispatch.readings()
            return {
                labels["worker"]: value for name, _, labels, value in readings if name.endswith("index_approximate")
            }

    assert clock.run(main()) == {"decode-0": 1}
    (said,) = [record for record in caplog.records if "guessed" in record.getMessage()]
    assert (said.levelname, "decode-0" in said.getMessage(), "last 7 s" in said.getMessage()) == ("WARNING", True, True)
