"""What every rank is known to carry: each request once, whoever tells of it, and nothing when all have left."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engine import RankLoad, Role
from dynamo_ray.routing.load import Booked, Booking, LoadTable
from dynamo_ray.routing.ranks import Holder, Ranks

RANKS = [Holder(f"w{i}", 1, 0) for i in range(3)]
A, B = RANKS[0], RANKS[1]


def table(block_size: int = 16, role: Role = Role.AGGREGATED) -> LoadTable:
    made = LoadTable(Ranks())
    for holder in RANKS:
        made.add_holder(holder, role, block_size)
    return made


def seen(made: LoadTable, holder: Holder) -> tuple[float, float, float]:
    load = made.load(holder)
    return load.queued_tokens, load.num_requests, load.kv_tokens


def test_a_booking_is_in_the_arrays_until_it_is_freed() -> None:
    made = table()
    booking = made.book(B, 300, 512)
    assert made.values[:, :3].tolist() == [[0, 300, 0], [0, 1, 0], [0, 512, 0]]
    made.prefilled(booking)
    assert seen(made, B) == (0, 1, 512)
    made.free(booking)
    made.free(booking)
    made.prefilled(booking)
    assert seen(made, B) == (0, 0, 0)


def test_what_waits_here_is_seen_by_those_who_choose_and_is_neither_sent_nor_told() -> None:
    made = table()
    sent, waiting = made.book(B, 300, 512), made.wait(B, 20, 16)
    assert seen(made, B) == (320, 2, 528)
    assert made.sent[:, 1].tolist() == [300, 1, 512]
    assert made.ours() == {B: Booked(300, 1, 512)}
    made.report(B, RankLoad(0, 1, 0, 32, 99))
    assert seen(made, B) == (320, 2, 528), "the rank does not have it"
    made.free(waiting)
    made.free(waiting)
    assert seen(made, B) == (300, 1, 512)
    made.free(sent)
    gone = made.wait(B, 20, 16)
    made.remove_holder(B)
    made.free(gone)
    assert made.num_bookings == 0
    assert not made.values.any()
    assert made.sent is made.values


def test_a_report_adds_only_what_nobody_has_booked() -> None:
    made = table()
    made.book(A, 100, 160)
    made.report(A, RankLoad(0, num_running=1, num_waiting=0, kv_used_blocks=10, kv_total_blocks=99))
    assert seen(made, A) == (100, 1, 160), "the report is of the booked request"
    made.report(A, RankLoad(0, num_running=2, num_waiting=1, kv_used_blocks=15, kv_total_blocks=99))
    assert seen(made, A)[1:] == (3, 240), "two requests and five blocks more are somebody else's, or grown"
    booking = made.book(A, 50, 64)
    assert seen(made, A)[1:] == (4, 304), "what was booked after the report comes on top"
    made.free(booking)
    made.report(A, RankLoad(0, num_running=0, num_waiting=0, kv_used_blocks=0, kv_total_blocks=99))
    assert seen(made, A) == (100, 1, 160), "a request on its way is not in the report, and counts"


def test_who_waits_unbooked_has_a_prompt_to_compute_where_prompts_are_computed() -> None:
    waiting = RankLoad(0, num_running=3, num_waiting=2, kv_used_blocks=0, kv_total_blocks=99)
    queued = {}
    for role in Role:
        made = table(role=role)
        made.report(A, waiting)
        queued[role] = seen(made, A)[0]
    assert queued[Role.DECODE] == 0 < queued[Role.AGGREGATED] < queued[Role.PREFILL]


def test_what_other_ingresses_book_counts_as_they_told_last() -> None:
    made = table()
    made.book(A, 10, 16)
    made.peer("r1", {A: Booked(100, 2, 64), B: Booked(7, 1, 16)})
    made.peer("r2", {A: Booked(1, 1, 16)})
    assert seen(made, A) == (111, 4, 96)
    made.peer("r1", {A: Booked(50, 1, 32)})
    assert seen(made, A) == (61, 3, 64)
    assert seen(made, B) == (7, 1, 16), "a rank that is not named stays as it was told"
    made.report(A, RankLoad(0, num_running=3, num_waiting=0, kv_used_blocks=4, kv_total_blocks=99))
    assert seen(made, A) == (61, 3, 64), "a report is of theirs as well"
    made.forget("r1")
    made.forget("r1")
    assert seen(made, A) == (11, 2, 32)
    assert seen(made, B) == (0, 0, 0)


def test_what_a_peer_told_of_a_rank_that_is_not_known_yet_counts_once_it_is() -> None:
    made = table()
    late = Holder("late", 1, 0)
    made.peer("r1", {late: Booked(9, 1, 16)})
    made.add_holder(late)
    assert seen(made, late) == (9, 1, 16)


def test_peers_are_told_what_changed_and_newcomers_everything() -> None:
    made = table()
    made.take_changes()
    booking = made.book(A, 10, 16)
    made.book(B, 5, 16)
    assert made.take_changes() == {A: Booked(10, 1, 16), B: Booked(5, 1, 16)}
    assert made.take_changes() == {}
    made.free(booking)
    assert made.take_changes() == {A: Booked(0, 0, 0)}
    assert made.ours() == {B: Booked(5, 1, 16)}


def test_a_rank_that_left_takes_its_load_with_it_and_a_new_one_in_its_place_is_idle() -> None:
    made = table()
    booking = made.book(A, 10, 16)
    made.report(A, RankLoad(0, 5, 5, 5, 5))
    made.remove_holder(A)
    made.report(A, RankLoad(0, 1, 1, 1, 1))
    assert made.reported() == {}
    again = Holder("w0", 2, 0)
    made._ranks.remove(A)
    made.add_holder(again)
    made.free(booking)
    assert seen(made, again) == (0, 0, 0)
    assert made.num_bookings == 0


STEPS = st.tuples(st.sampled_from("bwpfdurlx"), st.integers(0, 2), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(st.lists(STEPS, max_size=60))
def test_no_walk_leaves_anything_behind(steps: list[tuple[str, int, int]]) -> None:
    """b: book, w: wait, p: prefilled, f: free, d: a rank dies, u: it is back, r: it reports, l: a peer tells, x: it is
    gone.
    """
    made = table(block_size=1)
    bookings: list[Booking] = []
    for step, rank, number in steps:
        holder = RANKS[rank]
        match step:
            case "b":
                bookings.append(made.book(holder, number, number + 1))
            case "w":
                bookings.append(made.wait(holder, number, number + 1))
            case "p" if bookings:
                made.prefilled(bookings[number % len(bookings)])
            case "f" if bookings:
                made.free(bookings[number % len(bookings)])
            case "d":
                made.remove_holder(holder)
                made._ranks.remove(holder)
            case "u":
                made.add_holder(holder, block_size=1)
            case "r":
                made.report(holder, RankLoad(0, number, number % 3, number, 99))
            case "l":
                made.peer(f"r{number % 2}", {holder: Booked(number, number, number)})
            case "x":
                made.forget(f"r{number % 2}")
        assert (made.sent >= 0).all()
        assert (made.sent <= made.values).all()
    for booking in bookings:
        made.free(booking)
    for replica in ("r0", "r1"):
        made.forget(replica)
    for holder in RANKS:
        made.report(holder, RankLoad(0, 0, 0, 0, 99))
    assert made.num_bookings == 0
    assert not made.values.any()
    assert made.ours() == {}
