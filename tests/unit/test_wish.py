"""Which ranks a request waits for, what others see of it meanwhile, and when it chooses anew."""

from __future__ import annotations

import pytest

from backends.engine import Role
from backends.kv_events import BlockStored, KVEventBatch
from dynamo_ray.config import RouterConfig
from dynamo_ray.request.wish import Wish
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Choice, Chooser, WorkerFacts
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder

BLOCK = 16
A, B, C = 0b001, 0b010, 0b100
PROMPT = list(range(40 * BLOCK))


class Known:
    """Three aggregated workers of one rank; the first holds all of `PROMPT` but its last block."""

    def __init__(self, policy: str = "latency") -> None:
        self.chooser = Chooser("m", RouterConfig(policy=policy))
        for name in "abc":
            self.up(name)
        self.holds("a")
        self.ask = Ask(PROMPT, chain_seed("m"), 10)
        self.wish = Wish(self.chooser)

    def up(self, name: str, epoch: int = 1) -> None:
        self.chooser.up(WorkerFacts(name, epoch, Role.AGGREGATED, 1, BLOCK, 1000))

    def holds(self, name: str) -> None:
        held = BlockStored(list(range(39)), None, PROMPT[: 39 * BLOCK], BLOCK)
        self.chooser.apply(Holder(name, 1, 0), KVEventBatch(0, 0, [held]))

    def choose(self, prefill: int | None, decode: int) -> Choice:
        return self.chooser.choose(self.ask, prefill, decode, 0.0)

    def seek(self, busy: int, decode: int = A | B | C, wish: Wish | None = None) -> str | None:
        choice = (wish or self.wish).seek(self.choose, None, decode, busy)
        return None if choice is None else choice.decode.holder.worker

    def load(self, worker: str) -> tuple[float, float]:
        load = self.chooser.table.load(Holder(worker, 1, 0))
        return load.queued_tokens, load.num_requests


def test_it_waits_for_the_rank_that_has_its_prefix_though_others_are_free() -> None:
    known = Known()
    assert known.seek(busy=A) is None
    assert known.wish.stuck == A
    assert known.seek(busy=A | B) is None
    assert known.wish.uncached(known.ask, 0.0) == BLOCK
    assert known.seek(busy=B) == "a"
    assert (known.wish.stuck, known.load("a")) == (0, (0, 0)), "it is booked by whoever asked"


def test_whoever_chooses_meanwhile_sees_it_and_peers_are_not_told() -> None:
    known = Known("blocks")
    waiting = [Wish(known.chooser) for _ in range(9)]
    assert known.seek(A, wish=waiting[0]) is None
    assert known.load("a") == (BLOCK, 1)
    assert known.chooser.table.take_changes() == {}
    assert {known.seek(A | B | C, wish=wish) for wish in waiting} == {None}
    assert {wish.stuck for wish in waiting} == {A, B, C}, "it counts, and others have become better"
    for wish in waiting:
        wish.free()
        wish.free()
    assert [known.load(worker) for worker in "abc"] == [(0, 0)] * 3
    assert known.chooser.table.num_bookings == 0
    assert len(known.chooser.pending) == 0


@pytest.mark.parametrize("change", ["comes", "goes", "may not"])
def test_it_chooses_anew_when_ranks_come_or_go_or_it_may_not_use_its_own(change: str) -> None:
    known = Known()
    assert known.seek(busy=A) is None
    if change == "comes":
        known.chooser.table.book(Holder("a", 1, 0), 5000, 5000)
        known.holds("b")
        assert known.seek(A) is None, "it has chosen"
        known.up("d")
        assert known.seek(A, A | B | C | 0b1000) == "b"
    elif change == "goes":
        known.chooser.down("a", 1)
        assert known.seek(0, B | C) in ("b", "c")
        known.up("f")  # in the column of the one that went
        assert known.chooser.table.num_bookings == 0
    else:
        assert known.seek(A, B | C) in ("b", "c")


def test_one_that_may_not_go_yet_waits_for_what_is_busy_of_its_ranks() -> None:
    known = Known()
    known.wish.hold(known.choose, None, A | B | C, busy=A)
    assert known.wish.stuck == A
    other = Wish(known.chooser)
    other.hold(known.choose, None, A | B | C, busy=B)
    assert other.stuck == A, "somebody before it is to have it"
    assert known.load("a")[1] == 2


def test_an_event_of_its_cache_shows_that_a_rank_works() -> None:
    known = Known()
    before = known.chooser.table.moves(0)
    known.holds("a")
    assert known.chooser.table.moves(0) == before + 1
