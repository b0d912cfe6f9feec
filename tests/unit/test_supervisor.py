"""The supervisor: events in, instructions out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engine import EngineInfo, Role
from dynamo_ray.cluster.lifecycle import (
    Adopted,
    Died,
    Drain,
    Drained,
    Event,
    Gone,
    GroupLost,
    Health,
    Instruction,
    Kill,
    NotReserved,
    Progress,
    Publish,
    Release,
    Released,
    Reserve,
    Reserved,
    Start,
    Started,
    StopAll,
    Tick,
)
from dynamo_ray.cluster.supervisor import Supervisor, Timings
from dynamo_ray.request.membership import Phase
from dynamo_ray.request.wire import WorkerInfo


def info(worker: str, epoch: int) -> WorkerInfo:
    engine = EngineInfo("simulated", "1", "m", Role.DECODE, 1, 16, 1024, 64, "sequential")
    return WorkerInfo(worker, epoch, f"10.0.0.1:{epoch}", engine)


class Driven:
    """A supervisor with a clock, and what it ordered last, without Publish."""

    def __init__(self, *workers: str, epochs: dict[str, int] | None = None, timings: Timings | None = None) -> None:
        self.now_s = 0.0
        self.supervisor = Supervisor(dict.fromkeys(workers or ("d",), Role.DECODE), epochs or {}, timings)
        self.published = 0

    def __call__(self, event: Event) -> list[Instruction]:
        ordered = list(self.supervisor.handle(event, self.now_s))
        self.published += Publish() in ordered
        return [instruction for instruction in ordered if instruction != Publish()]

    def ready(self, worker: str = "d") -> int:
        """Bring a new worker up; returns its epoch."""
        self(Tick())
        (start,) = self(Reserved(worker))
        assert isinstance(start, Start)
        assert self(Started(worker, start.epoch, (info(worker, start.epoch),))) == []
        return start.epoch

    def phase(self) -> Phase:
        return self.supervisor.statuses()[0].phase

    def detail(self) -> str:
        return self.supervisor.statuses()[0].detail


def test_a_worker_is_reserved_started_and_then_a_member() -> None:
    driven = Driven()
    assert driven(Tick()) == [Reserve("d")]
    assert driven(Reserved("d")) == [Start("d", 1)]
    assert driven(Progress("d", 1, "loading the model")) == []
    assert driven.detail() == "loading the model"
    assert driven.supervisor.members() == ()
    driven.now_s = 12.5
    driven(Started("d", 1, (info("d", 1),)))
    assert driven.supervisor.members() == (info("d", 1),)
    assert driven.detail() == "ready in 12.5 s"


def test_a_dead_rank_kills_the_gang_and_the_next_one_keeps_the_group() -> None:
    driven = Driven()
    driven.ready()
    assert driven(Died("d", 1, "node 0: SIGKILL")) == [Kill("d", 1)]
    assert driven.supervisor.members() == ()
    assert driven(Tick()) == []  # nothing is started before the old gang is gone
    assert driven(Gone("d", 1)) == []
    assert driven(Tick()) == [Start("d", 2)]
    assert "SIGKILL" in driven.detail()


def test_all_endpoints_of_a_worker_come_and_go_together_under_one_status() -> None:
    driven = Driven()
    driven(Tick())
    driven(Reserved("d"))
    endpoints = (info("d", 1), info("d.1", 1))
    driven(Started("d", 1, endpoints))
    assert driven.supervisor.members() == endpoints
    assert [status.worker for status in driven.supervisor.statuses()] == ["d"]
    assert driven(Died("d", 1, "node 1: SIGKILL")) == [Kill("d", 1)]
    assert driven.supervisor.members() == ()


def test_a_gang_that_keeps_failing_waits_longer_each_time_and_then_moves() -> None:
    driven = Driven(timings=Timings(first_backoff_s=1.0, keep_group_failures=3))
    driven(Tick())
    driven(Reserved("d"))
    waits = []
    for epoch in (1, 2):
        driven(Died("d", epoch, "no memory"))
        driven(Gone("d", epoch))
        due_s = driven.supervisor.next_wake_s
        assert due_s is not None
        waits.append(due_s - driven.now_s)
        driven.now_s = due_s
        assert driven(Tick()) == [Start("d", epoch + 1)]
    assert waits == [0.0, 1.0]
    driven(Died("d", 3, "no memory"))
    assert driven(Gone("d", 3)) == [Release("d")]
    driven(Released("d"))
    assert (driven.phase(), driven.detail()) == (Phase.BACKOFF, "no memory")
    driven.now_s = driven.supervisor.next_wake_s or 0.0
    assert driven(Tick()) == [Reserve("d")]


def test_a_gang_that_goes_on_failing_holds_no_nodes_while_it_waits() -> None:
    driven = Driven(timings=Timings(keep_group_failures=2))
    driven(Tick())
    for epoch in (1, 2, 3, 4):
        if epoch != 2:
            driven(Reserved("d"))
        driven(Died("d", epoch, "no such model.path"))
        assert driven(Gone("d", epoch)) == ([] if epoch == 1 else [Release("d")])
        if epoch > 1:
            assert driven(Released("d")) == []
        assert driven.supervisor.next_wake_s is not None
        driven.now_s = driven.supervisor.next_wake_s
        assert driven(Tick()) == ([Start("d", 2)] if epoch == 1 else [Reserve("d")])
        assert "no such model.path" in driven.detail()


def test_failures_before_a_long_stable_time_no_longer_count() -> None:
    driven = Driven(timings=Timings(stable_after_s=60.0))
    epoch = driven.ready()
    for _ in range(5):
        driven.now_s += 61.0
        assert driven(Died("d", epoch, "x")) == [Kill("d", epoch)]
        assert driven(Gone("d", epoch)) == []
        (start,) = driven(Tick())  # at once, and in the same group
        assert isinstance(start, Start)
        epoch = start.epoch
        driven(Started("d", epoch, (info("d", epoch),)))


def test_what_cannot_be_placed_is_retried_with_the_reason_shown() -> None:
    driven = Driven()
    driven(Tick())
    for wait_s in (1.0, 2.0, 4.0, 5.0, 5.0):
        driven(NotReserved("d", "needs 8 GPUs"))
        assert (driven.phase(), driven.detail()) == (Phase.BACKOFF, "needs 8 GPUs")
        assert driven.supervisor.next_wake_s == driven.now_s + wait_s
        driven.now_s += wait_s
        assert driven(Tick()) == [Reserve("d")]
        assert driven.detail() == "needs 8 GPUs"


def test_a_lost_group_is_released_and_reserved_anew() -> None:
    driven = Driven()
    driven.ready()
    assert driven(GroupLost("d", "node gone")) == [Kill("d", 1)]
    assert driven(Gone("d", 1)) == [Release("d")]
    assert driven(Released("d")) == []
    assert driven(Tick()) == [Reserve("d")]
    assert driven(Reserved("d")) == [Start("d", 2)]


def test_three_missed_health_checks_are_a_death_two_are_not() -> None:
    driven = Driven()
    driven.ready()
    for _ in range(2):
        assert driven(Health("d", 1, "no answer")) == []
    assert driven(Health("d", 1)) == []
    for _ in range(2):
        assert driven(Health("d", 1, "no answer")) == []
    assert driven(Health("d", 1, "no answer")) == [Kill("d", 1)]


def test_a_ready_worker_that_a_command_halts_is_said_to_take_no_requests_until_it_does() -> None:
    driven = Driven()
    driven.ready()
    before = driven.supervisor.statuses()
    driven(Health("d", 1, paused="is asleep"))
    driven(Health("d", 1, "no answer"))
    (halted,) = driven.supervisor.statuses()
    assert (halted.phase, halted.detail) == (Phase.READY, "takes no requests: d is asleep")
    assert driven.supervisor.members(), "ingresses stay connected to it"
    driven(Health("d", 1))
    assert driven.supervisor.statuses() == before
    driven(Health("d", 1, paused="is asleep"))
    driven(Died("d", 1, "killed"))
    assert driven.supervisor.statuses()[0].detail == "killed"


def test_a_start_that_never_ends_is_ended() -> None:
    driven = Driven(timings=Timings(start_timeout_s=100.0))
    driven(Tick())
    driven(Reserved("d"))
    assert driven.supervisor.next_wake_s == 100.0
    driven.now_s = 100.0
    assert driven(Tick()) == [Kill("d", 1)]


def test_an_adopted_gang_is_a_member_at_once_and_later_epochs_are_greater() -> None:
    driven = Driven(epochs={"d": 4})
    assert driven(Adopted("d", 4, (info("d", 4),))) == []
    assert driven.supervisor.members() == (info("d", 4),)
    assert driven(Tick()) == []
    driven(Died("d", 4, "x"))
    driven(Gone("d", 4))
    assert driven(Tick()) == [Start("d", 5)]


def test_epochs_go_on_where_the_last_orchestrator_stopped() -> None:
    driven = Driven(epochs={"d": 7})
    driven(Tick())
    assert driven(Reserved("d")) == [Start("d", 8)]


def test_stopping_drains_what_serves_and_releases_everything() -> None:
    driven = Driven("a", "b")
    driven.ready("a")
    assert driven(StopAll()) == [Drain("a", 1)]  # b is being reserved
    assert driven.supervisor.members() == (info("a", 1),)  # its streams go on
    assert driven.supervisor.serving() == (("a", 1),)  # and so does its lease
    assert driven(Drained("a", 1)) == [Kill("a", 1)]
    assert driven(Reserved("b")) == [Release("b")]
    assert driven(Gone("a", 1)) == [Release("a")]
    driven(Released("a"))
    assert not driven.supervisor.stopped
    driven(Released("b"))
    assert driven.supervisor.stopped


def test_what_an_older_epoch_says_changes_nothing() -> None:
    driven = Driven()
    driven.ready()
    driven(Died("d", 1, "x"))
    driven(Gone("d", 1))
    driven(Tick())
    published = driven.published
    for late in (Died("d", 1, "late"), Started("d", 1, (info("d", 1),)), Gone("d", 1), Health("d", 1, "late")):
        assert driven(late) == []
    assert driven.published == published


_epochs = st.integers(0, 4)
_workers = st.sampled_from(["a", "b"])
_events = st.one_of(
    st.just(Tick()),
    st.builds(Reserved, _workers),
    st.builds(NotReserved, _workers, st.just("full")),
    st.builds(GroupLost, _workers, st.just("lost")),
    st.builds(Progress, _workers, _epochs, st.just("loading")),
    st.builds(lambda w, e: Started(w, e, (info(w, e),)), _workers, _epochs),
    st.builds(lambda w, e: Adopted(w, e, (info(w, e),)), _workers, _epochs),
    st.builds(Died, _workers, _epochs, st.just("dead")),
    st.builds(Health, _workers, _epochs, st.sampled_from([None, "mute"]), st.sampled_from([None, "is paused"])),
    st.builds(Drained, _workers, _epochs),
    st.builds(Released, _workers),
)


class World:
    """What really runs, and what really is reserved, as the instructions make it."""

    def __init__(self) -> None:
        self.live: dict[str, set[int]] = {"a": set(), "b": set()}
        self.started: dict[str, list[int]] = {"a": [], "b": []}
        self.killing: list[tuple[str, int]] = []

    def obey(self, instructions: tuple[Instruction, ...]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Start):
                assert not self.live[instruction.worker], "two incarnations would be alive"
                assert instruction.epoch > max(self.started[instruction.worker], default=0), "epochs must grow"
                self.live[instruction.worker].add(instruction.epoch)
                self.started[instruction.worker].append(instruction.epoch)
            elif isinstance(instruction, Kill):
                self.killing.append((instruction.worker, instruction.epoch))
            elif isinstance(instruction, Release):
                assert not self.live[instruction.worker], "released under a live gang"


@settings(max_examples=400)
@given(st.lists(st.one_of(_events, st.just("confirm"), st.just("later")), max_size=60), st.booleans())
def test_no_sequence_of_events_leaves_two_incarnations_alive(events: list[Event | str], stop: bool) -> None:
    supervisor = Supervisor(dict.fromkeys(["a", "b"], Role.DECODE), {})
    world, now_s = World(), 0.0

    def tell(event: Event) -> None:
        if isinstance(event, Adopted):
            if world.started[event.worker] or supervisor.statuses()[0].phase is not Phase.PENDING:
                return  # adoption comes before anything else
            if not any(s.worker == event.worker and s.phase is Phase.PENDING for s in supervisor.statuses()):
                return
            world.live[event.worker].add(event.epoch)
            world.started[event.worker].append(event.epoch)
        world.obey(supervisor.handle(event, now_s))

    def confirm() -> None:
        while world.killing:
            worker, epoch = world.killing.pop()
            world.live[worker].discard(epoch)
            tell(Gone(worker, epoch))

    for event in events:
        if event == "confirm":
            confirm()
        elif event == "later":
            now_s += 10.0
        else:
            assert not isinstance(event, str)
            tell(event)
    if not stop:
        return
    tell(StopAll())
    for _ in range(8):  # every answer that is still owed
        for status in supervisor.statuses():
            for answer in (Drained(status.worker, status.epoch), Reserved(status.worker), Released(status.worker)):
                tell(answer)
        confirm()
    assert supervisor.stopped
    assert world.live == {"a": set(), "b": set()}
