"""What is to happen to every worker: events in, instructions out. Pure; time is an argument.

Life of a worker:

    PENDING -> RESERVING -> STARTING -> READY -> DRAINING -> KILLING -> RELEASING -> STOPPED
                  |            |          |
                  |            +----------+--> KILLING -> BACKOFF -> STARTING (its group is kept)
                  |                               |
                  |                               +-> RELEASING -> BACKOFF -> RESERVING (its group is lost)
                  +--> BACKOFF -> RESERVING

An engine is a gang: one dead rank means that all of it is killed. A gang of epoch n+1 is started only after
`Gone(n)` has confirmed that nothing of epoch n is left. What an older epoch still says is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from backends.engine import Role
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
from dynamo_ray.request.membership import Phase, WorkerStatus
from dynamo_ray.request.wire import WorkerInfo


@dataclass(frozen=True, slots=True)
class Timings:
    first_backoff_s: float = 1.0
    """Doubles with each failure in a row. A gang that failed once is rebuilt at once, its second time after this."""
    max_backoff_s: float = 60.0
    reserve_retry_s: float = 5.0
    """The most between two attempts to reserve: nodes may come any time."""
    start_timeout_s: float = 1800.0
    """A start that nobody has ended by then is ended."""
    stable_after_s: float = 60.0
    """Ready for this long: earlier failures no longer count."""
    max_missed_health: int = 3
    keep_group_failures: int = 3
    """From this many failures in a row on, a gang's nodes are given up while it waits for its next start, which may
    get others."""


class Step(StrEnum):
    PENDING = "pending"
    RESERVING = "reserving"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    KILLING = "killing"
    RELEASING = "releasing"
    BACKOFF = "backoff"
    STOPPED = "stopped"


_PHASES: dict[Step, Phase] = {step: Phase(step) for step in Step if step not in (Step.KILLING, Step.RELEASING)}


@dataclass(slots=True)
class _Worker:
    name: str
    role: Role
    epoch: int
    step: Step = Step.PENDING
    detail: str = ""
    since_s: float = 0.0
    ready_since_s: float = 0.0
    wake_s: float | None = None
    has_group: bool = False
    drop_group: bool = False
    failures: int = 0
    """Of its gangs, in a row."""
    failed_reservations: int = 0
    """In a row."""
    last_failure: str = ""
    restarts: int = 0
    missed_health: int = 0
    paused: str | None = None
    endpoints: tuple[WorkerInfo, ...] = ()
    out: list[Instruction] = field(default_factory=list)

    def enter(self, step: Step, detail: str, now_s: float) -> None:
        self.step, self.detail, self.since_s, self.wake_s = step, detail, now_s, None
        self.missed_health, self.paused = 0, None

    @property
    def shown(self) -> str:
        """For a person."""
        return self.detail if self.paused is None else f"takes no requests: {self.name} {self.paused}"


class Supervisor:
    """All workers of one deployment.

    Args:
        workers: their names and roles; reservations are asked for in this order.
        epochs: the last epoch each worker ever had, where it had one; new ones are greater.
    """

    def __init__(
        self, workers: Mapping[str, Role], epochs: Mapping[str, int], timings: Timings | None = None, now_s: float = 0.0
    ) -> None:
        self._timings = timings or Timings()
        self._workers = {
            name: _Worker(name, role, epochs.get(name, 0), since_s=now_s) for name, role in workers.items()
        }
        self.stopping = False

    @property
    def stopped(self) -> bool:
        """After StopAll: nothing is left."""
        return self.stopping and all(worker.step is Step.STOPPED for worker in self._workers.values())

    @property
    def next_wake_s(self) -> float | None:
        """When a Tick is due if nothing else happens; None: never."""
        due = [worker.wake_s for worker in self._workers.values() if worker.wake_s is not None]
        return min(due, default=None)

    def members(self) -> tuple[WorkerInfo, ...]:
        """Endpoints that ingresses stay connected to. A draining worker's are among them: it finishes what it has,
        and its own heartbeats say that it takes no more."""
        serving = (Step.READY, Step.DRAINING)
        return tuple(endpoint for w in self._workers.values() if w.step in serving for endpoint in w.endpoints)

    def statuses(self) -> tuple[WorkerStatus, ...]:
        return tuple(
            WorkerStatus(w.name, w.role, self._phase(w), w.epoch, w.shown, w.since_s, w.restarts)
            for w in self._workers.values()
        )

    def serving(self) -> tuple[tuple[str, int], ...]:
        """(worker, epoch) of the gangs whose health is to be checked, which also renews their leases."""
        return tuple((w.name, w.epoch) for w in self._workers.values() if w.step in (Step.READY, Step.DRAINING))

    def handle(self, event: Event, now_s: float) -> tuple[Instruction, ...]:
        """Take one event; returns what to do now, in order, `Publish` last and at most once."""
        workers = list(self._workers.values())
        before = [(w.step, w.shown, w.epoch) for w in workers]
        if isinstance(event, StopAll):
            self.stopping = True
            for worker in workers:
                self._stop(worker, now_s)
        elif isinstance(event, Tick):
            for worker in workers:
                self._tick(worker, now_s)
        elif event.worker in self._workers:
            self._take(self._workers[event.worker], event, now_s)
        instructions: list[Instruction] = []
        for worker in workers:
            instructions += worker.out
            worker.out.clear()
        if before != [(w.step, w.shown, w.epoch) for w in workers]:
            instructions.append(Publish())
        return tuple(instructions)

    def _phase(self, worker: _Worker) -> Phase:
        return _PHASES.get(worker.step) or (Phase.DRAINING if self.stopping else Phase.BACKOFF)

    def _take(self, worker: _Worker, event: Event, now_s: float) -> None:
        match event:
            case Adopted(_, epoch, endpoints) if worker.step is Step.PENDING and not self.stopping:
                worker.epoch = max(worker.epoch, epoch)
                worker.has_group = True
                self._ready(worker, endpoints, "adopted", now_s)
            case Reserved() if worker.step is Step.RESERVING:
                worker.has_group, worker.drop_group = True, False
                worker.failed_reservations = 0
                self._release(worker, now_s) if self.stopping else self._start(worker, now_s)
            case NotReserved(_, reason) if worker.step is Step.RESERVING:
                worker.failed_reservations += 1
                delay_s = min(self._doubled_s(worker.failed_reservations - 1), self._timings.reserve_retry_s)
                self._wait(worker, reason, now_s, delay_s)
            case GroupLost(_, reason) if worker.has_group:
                self._lose_group(worker, reason, now_s)
            case Progress(_, epoch, detail) if worker.step is Step.STARTING and epoch == worker.epoch:
                worker.detail = detail
            case Started(_, epoch, endpoints) if worker.step is Step.STARTING and epoch == worker.epoch:
                self._ready(worker, endpoints, f"ready in {now_s - worker.since_s:.1f} s", now_s)
            case Died(_, epoch, reason) if epoch == worker.epoch:
                self._fail(worker, reason, now_s)
            case Health(_, epoch, failure, paused) if worker.step is Step.READY and epoch == worker.epoch:
                worker.paused = paused if failure is None else worker.paused
                self._check(worker, failure, now_s)
            case Drained(_, epoch) if worker.step is Step.DRAINING and epoch == worker.epoch:
                self._kill(worker, "stopping", now_s)
            case Gone(_, epoch) if worker.step is Step.KILLING and epoch == worker.epoch:
                self._after_kill(worker, now_s)
            case Released() if worker.step is Step.RELEASING:
                worker.has_group = worker.drop_group = False
                self._rest(worker, now_s)
            case _:
                pass  # of an older epoch, or overtaken by what happened since

    def _tick(self, worker: _Worker, now_s: float) -> None:
        if worker.step is Step.PENDING:
            self._reserve(worker, now_s)
        elif worker.wake_s is None or now_s < worker.wake_s:
            return
        elif worker.step is Step.BACKOFF:
            self._start(worker, now_s) if worker.has_group else self._reserve(worker, now_s)
        elif worker.step is Step.STARTING:
            self._fail(worker, f"not ready within {self._timings.start_timeout_s:g} s", now_s)

    def _stop(self, worker: _Worker, now_s: float) -> None:
        if worker.step in (Step.PENDING, Step.BACKOFF):
            self._release(worker, now_s) if worker.has_group else worker.enter(Step.STOPPED, "", now_s)
        elif worker.step is Step.STARTING:
            self._kill(worker, "stopping", now_s)
        elif worker.step is Step.READY:
            worker.enter(Step.DRAINING, "finishing its requests", now_s)
            worker.out.append(Drain(worker.name, worker.epoch))

    def _reserve(self, worker: _Worker, now_s: float) -> None:
        worker.enter(Step.RESERVING, worker.detail or "waiting for nodes", now_s)
        worker.out.append(Reserve(worker.name))

    def _start(self, worker: _Worker, now_s: float) -> None:
        worker.epoch += 1
        again = f"; the last one failed: {worker.last_failure}" if worker.failures else ""
        worker.enter(Step.STARTING, f"starting its processes{again}", now_s)
        worker.wake_s = now_s + self._timings.start_timeout_s
        worker.out.append(Start(worker.name, worker.epoch))

    def _ready(self, worker: _Worker, endpoints: tuple[WorkerInfo, ...], detail: str, now_s: float) -> None:
        worker.endpoints = endpoints
        worker.ready_since_s = now_s
        worker.enter(Step.READY, detail, now_s)

    def _check(self, worker: _Worker, failure: str | None, now_s: float) -> None:
        worker.missed_health = 0 if failure is None else worker.missed_health + 1
        if worker.missed_health >= self._timings.max_missed_health:
            self._fail(worker, f"unhealthy: {failure}", now_s)

    def _fail(self, worker: _Worker, reason: str, now_s: float) -> None:
        """A gang that may have live parts has failed."""
        if worker.step not in (Step.STARTING, Step.READY, Step.DRAINING):
            return
        if worker.step is Step.READY and now_s - worker.ready_since_s >= self._timings.stable_after_s:
            worker.failures = 0
        worker.failures += 1
        worker.restarts += 1
        worker.last_failure = reason
        if worker.failures >= self._timings.keep_group_failures:
            worker.drop_group = True
        self._kill(worker, reason, now_s)

    def _lose_group(self, worker: _Worker, reason: str, now_s: float) -> None:
        worker.drop_group = True
        if worker.step is Step.BACKOFF:
            worker.last_failure = reason
            self._release(worker, now_s)
        else:
            self._fail(worker, reason, now_s)

    def _kill(self, worker: _Worker, detail: str, now_s: float) -> None:
        worker.endpoints = ()
        worker.enter(Step.KILLING, detail, now_s)
        worker.out.append(Kill(worker.name, worker.epoch))

    def _after_kill(self, worker: _Worker, now_s: float) -> None:
        if self.stopping or worker.drop_group:
            self._release(worker, now_s)
        else:
            self._rest(worker, now_s)

    def _release(self, worker: _Worker, now_s: float) -> None:
        worker.enter(Step.RELEASING, "stopping" if self.stopping else worker.last_failure, now_s)
        worker.out.append(Release(worker.name))

    def _rest(self, worker: _Worker, now_s: float) -> None:
        """Nothing of the failed gang is left: how long until the next one."""
        delay_s = 0.0 if worker.failures <= 1 else self._doubled_s(worker.failures - 2)
        self._wait(worker, worker.last_failure, now_s, delay_s)

    def _wait(self, worker: _Worker, reason: str, now_s: float, delay_s: float) -> None:
        """Try again after a while, or never when all is being stopped."""
        if self.stopping:
            worker.enter(Step.STOPPED, "", now_s)
            return
        worker.enter(Step.BACKOFF, reason, now_s)
        worker.wake_s = now_s + delay_s

    def _doubled_s(self, times: int) -> float:
        return min(self._timings.first_backoff_s * 2.0 ** min(times, 30), self._timings.max_backoff_s)
