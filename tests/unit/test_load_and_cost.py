"""Bookings that always come back, and policies that choose by them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.engine import RankLoad
from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.cost import Candidate, Leg, decide
from dynamo_ray.routing.kv_index import Holder
from dynamo_ray.routing.load import Booking, LoadTable

RANKS = [Holder(f"w{i}", 1, 0) for i in range(3)]


def table() -> LoadTable:
    made = LoadTable()
    for holder in RANKS:
        made.add_holder(holder)
    return made


def candidates(made: LoadTable, *overlaps: int) -> list[Candidate]:
    return [Candidate(h, o, made.load(h)) for h, o in zip(RANKS, overlaps, strict=True)]


def chosen(made: LoadTable, overlaps: tuple[int, int, int], turn: int = 0, **options: object) -> int:
    config = RouterConfig.model_validate(options)
    leg = Leg(prompt_blocks=10, computes_prompt=True)
    return RANKS.index(decide(leg, candidates(made, *overlaps), turn, config).chosen.holder)


def test_the_rank_with_the_prefix_wins_when_all_are_idle() -> None:
    assert chosen(table(), (0, 8, 0)) == 1


def test_a_prefix_does_not_win_against_much_less_work() -> None:
    made = table()
    made.book(RANKS[1], prefill_blocks=20, decode_blocks=20)
    assert chosen(made, (0, 8, 0)) == 0


def test_equals_share_the_work() -> None:
    made = table()
    turns = []
    for turn in range(6):
        turns.append(chosen(made, (0, 0, 0), turn))
        made.book(RANKS[turns[-1]], 0, 10)
    assert sorted(turns) == [0, 0, 1, 1, 2, 2]


def test_round_robin_ignores_what_ranks_hold() -> None:
    assert [chosen(table(), (0, 9, 0), turn, policy="round_robin") for turn in range(4)] == [0, 1, 2, 0]


def test_the_credit_weighs_a_cached_block() -> None:
    assert chosen(table(), (0, 0, 9), overlap_score_credit=0.0, turn=1) == 1


def test_a_decode_leg_goes_where_least_is_held() -> None:
    made = table()
    made.book(RANKS[0], 0, 5)
    made.book(RANKS[1], 0, 3)
    made.book(RANKS[2], 0, 4)
    leg = Leg(prompt_blocks=10, computes_prompt=False)
    decision = decide(leg, candidates(made, 9, 0, 9), 0, RouterConfig())
    assert decision.chosen.holder == RANKS[1]
    assert [cost for _, cost in decision.costs] == [15.0, 13.0, 14.0]


def test_a_report_of_a_rank_that_left_is_not_kept() -> None:
    made = table()
    made.remove_holder(RANKS[0])
    made.report(RANKS[0], RankLoad(0, 1, 1, 1, 1))
    assert made.reported() == {}


@pytest.mark.parametrize("again", [1, 2])
def test_freeing_twice_counts_once(again: int) -> None:
    made = table()
    booking = made.book(RANKS[0], 3, 4)
    for _ in range(again + 1):
        made.free(booking)
    assert made.load(RANKS[0]).decode_blocks == 0
    assert made.load(RANKS[0]).num_requests == 0


@given(st.lists(st.tuples(st.sampled_from("bpfdu"), st.integers(0, 2), st.integers(0, 9))))
def test_no_interleaving_leaves_a_booking(steps: list[tuple[str, int, int]]) -> None:
    made = table()
    open_bookings: list[Booking] = []
    for step, rank, number in steps:
        if step == "b":
            open_bookings.append(made.book(RANKS[rank], number, number + 1))
        elif step == "p" and open_bookings:
            made.prefilled(open_bookings[number % len(open_bookings)])
        elif step == "f" and open_bookings:
            made.free(open_bookings.pop(number % len(open_bookings)))
        elif step == "d":
            made.remove_holder(RANKS[rank])
        elif step == "u":
            made.add_holder(RANKS[rank])
        assert all(made.load(h).num_requests >= 0 and made.load(h).decode_blocks >= 0 for h in RANKS)
    for booking in open_bookings:
        made.free(booking)
    assert made.num_bookings == 0
    assert all(
        (made.load(h).prefill_blocks, made.load(h).decode_blocks, made.load(h).num_requests) == (0, 0, 0) for h in RANKS
    )
