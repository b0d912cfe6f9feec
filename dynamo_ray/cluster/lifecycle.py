"""What the supervisor is told (events) and what it orders (instructions), as values."""

from __future__ import annotations

from dataclasses import dataclass

from dynamo_ray.request.wire import WorkerInfo


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; send one at `Supervisor.next_wake_s` at the latest."""


@dataclass(frozen=True, slots=True)
class Adopted:
    """A gang of an earlier orchestrator is alive and serves."""

    worker: str
    epoch: int
    endpoints: tuple[WorkerInfo, ...]


@dataclass(frozen=True, slots=True)
class Reserved:
    worker: str


@dataclass(frozen=True, slots=True)
class NotReserved:
    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class GroupLost:
    """The worker's placement group no longer holds all its nodes."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Progress:
    worker: str
    epoch: int
    detail: str


@dataclass(frozen=True, slots=True)
class Started:
    worker: str
    epoch: int
    endpoints: tuple[WorkerInfo, ...]
    """Where it takes requests: on its first node, or on all of them."""


@dataclass(frozen=True, slots=True)
class Died:
    """A rank is dead, or the gang could not start."""

    worker: str
    epoch: int
    reason: str


@dataclass(frozen=True, slots=True)
class Health:
    """One answer, or none in time, to a health check of the whole gang."""

    worker: str
    epoch: int
    failure: str | None = None
    paused: str | None = None
    """Why it takes no requests, where a command keeps them away; as a predicate of its name."""


@dataclass(frozen=True, slots=True)
class Drained:
    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Gone:
    """Every process of that gang is confirmed dead."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Released:
    worker: str


@dataclass(frozen=True, slots=True)
class StopAll:
    """Drain, kill and release everything; nothing is started again."""


Event = (
    Tick
    | Adopted
    | Reserved
    | NotReserved
    | GroupLost
    | Progress
    | Started
    | Died
    | Health
    | Drained
    | Gone
    | Released
    | StopAll
)


@dataclass(frozen=True, slots=True)
class Reserve:
    """Answered by Reserved or NotReserved."""

    worker: str


@dataclass(frozen=True, slots=True)
class Start:
    """Answered by Started or Died; later Died at any time."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Answered by Drained, in time or not."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Kill:
    """Answered by Gone, and only when it is true."""

    worker: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Release:
    """Answered by Released."""

    worker: str


@dataclass(frozen=True, slots=True)
class Publish:
    """`statuses` or `members` have changed."""


Instruction = Reserve | Start | Drain | Kill | Release | Publish
