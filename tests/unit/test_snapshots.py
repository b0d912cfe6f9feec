"""What a rank holds, handed from one ingress replica to another in parts: all of it as of one batch, or nothing."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynamo_ray.events import snapshots
from dynamo_ray.events.snapshots import Answers, Ask, Assembly, NoSnapshot, Part, Unavailable
from dynamo_ray.routing.kv_index import Snapshot, TierSnapshot
from dynamo_ray.routing.ranks import Holder

HOLDER = Holder("w", 1, 0)


def of(*tiers: int, sequence: int = 7) -> Snapshot:
    """So many blocks on each tier."""

    def tier(blocks: int) -> TierSnapshot:
        theirs: list[int | bytes] = [b"h%d" % n if n % 2 else -n for n in range(blocks)]
        return TierSnapshot(theirs, [2**64 - 1 - n for n in range(blocks)], [(name, 1) for name in theirs[::2]])

    return Snapshot(sequence, [tier(blocks) for blocks in tiers])


def handed_over(answers: Answers, holder: Holder = HOLDER, asker: bytes = b"x") -> Snapshot:
    assembly = Assembly(holder)
    while True:
        snapshot = assembly.take(answers.answer(asker, assembly.ask(), 0.0))
        if snapshot is not None:
            return snapshot


@pytest.mark.parametrize("tiers", [(0,), (1,), (3,), (4,), (5,), (8,), (9,), (0, 0, 0), (4, 0, 9), (5, 5)])
def test_it_arrives_as_it_was(monkeypatch: pytest.MonkeyPatch, tiers: tuple[int, ...]) -> None:
    monkeypatch.setattr(snapshots, "BLOCKS_PER_PART", 4)
    answers = Answers({HOLDER: of(*tiers)}.get)
    assert handed_over(answers) == of(*tiers)
    assert (answers.num_served, answers.expires_s) == (1, None)


def test_it_is_of_one_moment_though_the_rank_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "BLOCKS_PER_PART", 4)
    held = {HOLDER: of(9)}
    answers, assembly = Answers(held.get), Assembly(HOLDER)
    assert assembly.take(answers.answer(b"x", assembly.ask(), 0.0)) is None
    held[HOLDER] = of(20, sequence=8)
    assert assembly.take(answers.answer(b"x", assembly.ask(), 0.0)) is None
    assert assembly.take(answers.answer(b"x", assembly.ask(), 0.0)) == of(9)


def test_a_rank_that_is_not_certain_there_has_none() -> None:
    answers = Answers(lambda _: None)
    with pytest.raises(NoSnapshot, match="not known for certain"):
        handed_over(answers)
    assert answers.num_refused == 1


def test_only_so_many_are_given_out_at_once_and_who_stops_asking_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "BLOCKS_PER_PART", 4)
    monkeypatch.setattr(snapshots, "MAX_SESSIONS", 2)
    answers = Answers({HOLDER: of(9)}.get)
    for asker in (b"a", b"b"):
        Assembly(HOLDER).take(answers.answer(asker, Assembly(HOLDER).ask(), 100.0))
    with pytest.raises(NoSnapshot, match="busy"):
        Assembly(HOLDER).take(answers.answer(b"c", Assembly(HOLDER).ask(), 109.9))
    assert answers.expires_s == 110.0
    Assembly(HOLDER).take(answers.answer(b"c", Assembly(HOLDER).ask(), 110.0))
    assert answers.expires_s == 120.0


def test_more_than_the_limit_is_neither_given_out_nor_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    generous = Answers({HOLDER: of(9)}.get)
    monkeypatch.setattr(snapshots, "BLOCKS_PER_PART", 4)
    Assembly(HOLDER).take(generous.answer(b"x", Assembly(HOLDER).ask(), 0.0))
    monkeypatch.setattr(snapshots, "MAX_BLOCKS", 3)
    with pytest.raises(NoSnapshot, match="more than 3"):
        handed_over(Answers({HOLDER: of(9)}.get))
    assembly = Assembly(HOLDER)
    with pytest.raises(NoSnapshot, match="more than 3"):
        assembly.take(msgspec.msgpack.encode(Part(0, False, 7, 0, [1] * 4, [1] * 4, [])))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Unavailable("too hot"), "too hot"),
        (Part(1, True, 7, 0, [], [], []), "part 1"),
        (Part(0, True, 7, 1, [], [], []), "tier 1"),
        (Part(0, True, 7, 8, [], [], []), "not a part"),
        (Part(0, True, 7, 0, [1], [], []), "lengths"),
        (Part(0, True, 7, 0, [1], [-1], []), "not a part"),
        (Part(0, True, 7, 0, [1], [1], [(1, -1)]), "not a part"),
        (Part(0, True, 7, 0, [1] * 8193, [1] * 8193, []), "not a part"),
        (["part", 0, True, 7, 0, [1.5], [1], []], "not a part"),
        ("junk", "not a part"),
    ],
)
def test_an_answer_that_does_not_fit_is_no_snapshot(answer: Any, why: str) -> None:
    with pytest.raises(NoSnapshot, match=why):
        Assembly(HOLDER).take(msgspec.msgpack.encode(answer))


def test_parts_of_two_moments_are_no_snapshot() -> None:
    assembly = Assembly(HOLDER)
    assembly.take(msgspec.msgpack.encode(Part(0, False, 7, 0, [], [], [])))
    with pytest.raises(NoSnapshot, match="part 1 at 8"):
        assembly.take(msgspec.msgpack.encode(Part(1, True, 8, 0, [], [], [])))


@given(st.one_of(st.binary(max_size=64), st.integers(0, 5).map(lambda n: msgspec.msgpack.encode(Ask("w", 1, 0, n)))))
def test_whatever_is_asked_gets_an_answer(payload: bytes) -> None:
    answers = Answers({HOLDER: of(3)}.get)
    answer = msgspec.msgpack.decode(answers.answer(b"x", payload, 0.0))
    assert answer[0] in ("part", "unavailable")
