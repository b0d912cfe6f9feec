"""Which ranks are busy: by requests, by their worker's, and by KV that they say they hold."""

from __future__ import annotations

import pytest

from backends.engine import RankLoad, Role
from dynamo_ray.request.occupancy import Occupancy
from dynamo_ray.routing.chooser import WorkerFacts
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

BLOCK, BLOCKS = 16, 10


class Known:
    """Two workers of two ranks each; columns 0 and 1 are the first one's."""

    def __init__(self, role: Role = Role.DECODE) -> None:
        self.role = role
        self.ranks = Ranks()
        self.table = LoadTable(self.ranks)
        self.occupancy = Occupancy(self.ranks, self.table, 4, 6, 1000)
        for name in ("a", "b"):
            self.up(name)

    def up(self, name: str, num_ranks: int = 2) -> None:
        facts = WorkerFacts(name, 1, self.role, num_ranks, BLOCK, BLOCKS)
        for holder in facts.holders:
            self.ranks.add(holder)
            self.table.add_holder(holder, facts.role, BLOCK)
        self.occupancy.up(facts)

    def book(self, worker: str, rank: int, count: int, kv_tokens: int = 0, queued_tokens: int = 0) -> None:
        for _ in range(count):
            self.table.book(Holder(worker, 1, rank), queued_tokens, kv_tokens)

    def heard(self, worker: str, rank: int, load: RankLoad) -> None:
        self.table.report(Holder(worker, 1, rank), load)
        self.occupancy.heard(Holder(worker, 1, rank), load)

    def busy(self, prompt_tokens: int = 1) -> set[int]:
        mask = self.occupancy.busy(prompt_tokens)
        return {column for column in range(mask.bit_length()) if mask >> column & 1}


def test_a_rank_is_busy_with_as_many_requests_as_it_may_have() -> None:
    known = Known()
    known.book("a", 0, 3)
    assert known.busy() == set()
    known.book("a", 0, 1)
    assert known.busy() == {0}


def test_all_ranks_of_a_full_worker_are_busy() -> None:
    known = Known()
    known.book("b", 0, 3)
    known.book("b", 1, 3)
    assert known.busy() == {2, 3}


def test_booked_kv_makes_a_rank_busy_only_if_it_says_so_too() -> None:
    """Requests that share a prefix hold its blocks once, and are booked with them each."""
    known = Known()
    known.book("a", 0, 2, kv_tokens=100)
    assert known.busy() == {0}, "nothing was heard of it yet"
    known.heard("a", 0, RankLoad(0, 2, 0, 7, BLOCKS))
    assert known.busy(prompt_tokens=48) == set()
    assert known.busy(prompt_tokens=49) == {0}
    known.heard("a", 0, RankLoad(0, 1, 1, 7, BLOCKS))
    assert known.busy(prompt_tokens=1) == {0}, "requests wait in it"


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
