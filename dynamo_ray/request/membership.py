"""Who serves right now: what the control path tells every ingress."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from backends.engine import Role
from dynamo_ray.events.bookings import Peer
from dynamo_ray.request.wire import WorkerInfo


class Phase(StrEnum):
    """Where one worker is between nothing and serving."""

    PENDING = "pending"
    RESERVING = "reserving"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    BACKOFF = "backoff"
    STOPPED = "stopped"


class WorkerStatus(msgspec.Struct, frozen=True):
    worker: str
    role: Role
    phase: Phase
    epoch: int
    detail: str
    """For a person: what it waits for, or why it failed last."""
    since_unix_s: float
    restarts: int = 0


class Membership(msgspec.Struct, frozen=True):
    """One consistent view; a higher `version` replaces a lower one."""

    version: int
    secret: bytes
    """The data plane's shared secret."""
    workers: tuple[WorkerInfo, ...]
    """Those that take requests."""
    statuses: tuple[WorkerStatus, ...]
    """All of them."""
    peers: tuple[Peer, ...] = ()
    """The ingress replicas, the asking one among them; a new orchestrator hears of them within a second or two."""
