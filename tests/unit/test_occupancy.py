"""Which ranks are busy: by requests, by their worker's, and by KV that they say they hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from backends.engine import HandoffStyle, RankLoad, Role
from dynamo_ray.config import QUEUED_REQUESTS_PER_RANK, LimitsConfig
from dynamo_ray.request.occupancy import STALLED_S, Occupancy
from dynamo_ray.routing.chooser import WorkerFacts
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

BLOCK, BLOCKS = 16, 10


class Known:
    """Two workers of two ranks each; columns 0 and 1 are the first one's."""

    def __init__(
        self,
        role: Role = Role.DECODE,
        max_queued_requests: int | None = 6,
        max_requests: float = 4,
        handoff: HandoffStyle = "sequential",
    ) -> None:
        self.role, self.handoff = role, handoff
        self.ranks = Ranks()
        self.table = LoadTable(self.ranks)
        limits = LimitsConfig(max_queued_requests=max_queued_requests)
        self.occupancy = Occupancy(self.ranks, self.table, limits, max_requests, 1000)
        for name in ("a", "b"):
            self.up(name)

    def up(self, name: str, num_ranks: int = 2) -> None:
        facts = WorkerFacts(name, 1, self.role, num_ranks, BLOCK, BLOCKS, handoff=self.handoff)
        for holder in facts.holders:
            self.ranks.add(holder)
            self.table.add_holder(holder, facts.role, BLOCK)
        self.occupancy.up(facts)

    def book(self, worker: str, rank: int, count: int, kv_tokens: int = 0, queued_tokens: int = 0) -> None:
        for _ in range(count):
            self.table.book(Holder(worker, 1, rank), queued_tokens, kv_tokens)

    def heard(self, worker: str, rank: int, load: RankLoad, now_s: float = 0.0) -> None:
        self.table.report(Holder(worker, 1, rank), load)
        self.occupancy.heard(Holder(worker, 1, rank), load, now_s)

    def mask(self, prompt_tokens: int = 1) -> int:
        return self.occupancy.busy(prompt_tokens)

    def busy(self, prompt_tokens: int = 1) -> set[int]:
        mask = self.mask(prompt_tokens)
        return {column for column in range(mask.bit_length()) if mask >> column & 1}


def test_a_rank_is_busy_with_as_many_requests_as_it_may_have() -> None:
    known = Known()
    known.book("a", 0, 3)
    assert known.busy() == set()
    known.book("a", 0, 1)
    assert known.busy() == {0}


def test_without_a_limit_a_worker_may_have_as_many_as_its_ranks_make_up() -> None:
    known = Known(max_queued_requests=None, max_requests=math.inf)
    known.up("c", num_ranks=1)
    for worker in ("a", "c"):
        known.book(worker, 0, QUEUED_REQUESTS_PER_RANK)
    assert known.busy() == {4}
    known.book("a", 1, QUEUED_REQUESTS_PER_RANK)
    assert known.busy() == {0, 1, 4}


def test_all_ranks_of_a_full_worker_are_busy() -> None:
    known = Known()
    known.book("b", 0, 3)
    known.book("b", 1, 3)
    assert known.busy() == {2, 3}


def test_booked_kv_makes_a_rank_busy_only_if_it_says_so_too() -> None:
    """Requests that share a prefix hold its blocks once, and are booked with them each."""
    known = Known()
    known.book("a", 0, 2, kv_tokens=160)
    assert known.busy() == {0}, "nothing was heard of it yet"
    known.heard("a", 0, RankLoad(0, 2, 0, 7, BLOCKS))
    assert known.busy(prompt_tokens=48) == set()
    assert known.busy(prompt_tokens=49) == {0}
    known.heard("a", 0, RankLoad(0, 1, 1, 7, BLOCKS))
    assert known.busy(prompt_tokens=1) == {0}, "requests wait in it"


def test_as_many_tokens_as_a_decode_rank_holds_may_wait_for_room_in_it_while_their_prompts_are_computed() -> None:
    known = Known()
    known.book("a", 0, 2, kv_tokens=150)
    known.heard("a", 0, RankLoad(0, 1, 1, BLOCKS, BLOCKS))
    assert known.busy(prompt_tokens=20) == set()
    assert known.busy(prompt_tokens=21) == {0}


@pytest.mark.parametrize(("handoff", "busy"), [("concurrent", {0}), ("sequential", set())])
def test_none_wait_for_room_in_a_rank_whose_engine_computes_no_prompt_before_there_is_some(
    handoff: HandoffStyle, busy: set[int]
) -> None:
    known = Known(handoff=handoff)
    known.book("a", 0, 2, kv_tokens=80)
    known.heard("a", 0, RankLoad(0, 1, 1, BLOCKS, BLOCKS))
    assert known.busy() == busy


@pytest.mark.parametrize("role", [Role.PREFILL, Role.AGGREGATED])
def test_who_computes_prompts_is_busy_by_what_it_has_of_them_and_not_by_its_kv(role: Role) -> None:
    known = Known(role)
    known.book("a", 0, 2, kv_tokens=100, queued_tokens=499)
    known.heard("a", 0, RankLoad(0, 1, 1, BLOCKS, BLOCKS))
    assert known.busy() == set()
    known.book("a", 0, 1, queued_tokens=2)
    assert known.busy() == {0}


def test_what_waits_here_makes_no_rank_busy() -> None:
    known = Known()
    for _ in range(9):
        known.table.wait(Holder("a", 1, 0), 5000, 1000)
    assert known.busy() == set()


def test_a_rank_without_requests_is_never_busy_and_a_worker_s_columns_may_be_another_s_later() -> None:
    known = Known()
    assert known.busy(prompt_tokens=10_000) == set()
    for rank in range(2):
        known.table.remove_holder(Holder("a", 1, rank))
        known.ranks.remove(Holder("a", 1, rank))
    known.up("c", num_ranks=1)
    known.up("d", num_ranks=1)
    known.book("c", 0, 4)
    assert known.busy() == {0}
    for name in map(str, range(100)):  # beyond the columns there were room for
        known.up(name, num_ranks=1)
    known.book("99", 0, 4)
    column = known.ranks.column(Holder("99", 1, 0))
    assert known.busy() == {0, column}


SAME = RankLoad(0, 1, 1, 7, BLOCKS)


def hung(known: Known) -> None:
    """Rank a/0 has four requests, and says the same for as long as it may."""
    known.book("a", 0, 4)
    for now_s in (0.0, 1.0, STALLED_S):
        known.heard("a", 0, SAME, now_s)


def test_for_a_busy_rank_that_does_nothing_nobody_waits_who_may_use_another() -> None:
    known = Known()
    known.book("a", 0, 4)
    known.heard("a", 0, SAME, 0.0)
    known.heard("a", 0, SAME, STALLED_S - 0.1)
    assert known.occupancy.able(0b11, 0b1111, known.mask()) == (0b11, 0b1111)
    known.heard("a", 0, SAME, STALLED_S)
    assert known.occupancy.able(0b11, 0b1111, known.mask()) == (0b10, 0b1110)
    assert known.occupancy.able(None, 0b1, known.mask()) == (None, 0b1), "there is no other"
    assert known.occupancy.able(0, 0b1111, 0) == (0, 0b1111), "it is not busy"


@pytest.mark.parametrize(
    "happens",
    [
        lambda known: known.table.moved(0),
        lambda known: known.table.prefilled(known.table.book(Holder("a", 1, 0), 10, 10)),
        lambda known: known.table.generated(known.table.book(Holder("a", 1, 0), 10, 10), 5),
        lambda known: known.table.report(Holder("a", 1, 0), RankLoad(0, 2, 0, 7, BLOCKS)),
    ],
    ids=["event", "first token", "end", "report"],
)
def test_whatever_a_rank_does_shows_that_it_works(happens: Callable[[Known], None]) -> None:
    known = Known()
    hung(known)
    assert known.occupancy.stalled == 0b1
    happens(known)
    known.heard("a", 0, SAME, STALLED_S + 1.0)
    assert known.occupancy.stalled == 0
    known.heard("a", 0, SAME, 2 * STALLED_S + 0.5)
    assert known.occupancy.stalled == 0, "it has as long again"


def test_a_request_that_fails_or_leaves_shows_nothing_and_a_rank_without_any_has_nothing_to_do() -> None:
    known, silent = Known(), RankLoad(0, 0, 0, 0, BLOCKS)
    bookings = [known.table.book(Holder("a", 1, 0), 10, 10) for _ in range(2)]
    known.heard("a", 0, silent, 0.0)
    known.table.generated(bookings[0], 0)
    known.table.free(bookings[0])
    known.heard("a", 0, silent, STALLED_S)
    assert known.occupancy.stalled == 0b1
    known.table.free(bookings[1])
    known.heard("a", 0, silent, STALLED_S + 1.0)
    assert known.occupancy.stalled == 0
    known.heard("a", 0, silent, 100.0)
    known.book("a", 0, 4)
    known.heard("a", 0, silent, 101.0)
    assert known.occupancy.stalled == 0, "its time begins when it was last seen idle"


def test_a_worker_that_comes_again_does_not_inherit_that_the_one_before_it_hung() -> None:
    known = Known()
    hung(known)
    known.up("a")
    assert known.occupancy.stalled == 0
