"""The event planes an ingress can be on: sources of its ranks' KV events, and what its replicas say to each other.

Whatever happens to a plane, whoever routes goes on with what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from backends.engine import KVEventSource, RankLoad
from backends.kv_events import KVEventBatch
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.events.bookings import Peer
from dynamo_ray.events.peers import Peers
from dynamo_ray.events.snapshots import SnapshotOf
from dynamo_ray.events.zmq import KVEventSubscriber, Resync
from dynamo_ray.routing.anomalies import Anomalies
from dynamo_ray.routing.kv_index import Snapshot
from dynamo_ray.routing.load import LoadTable
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.telemetry import Reading


class Listener(Protocol):
    """Who is told."""

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        """One rank's events, in order."""
        ...

    def uncertain(self, holder: Holder) -> None:
        """Events were lost for good: what the rank said before must be forgotten."""
        ...

    def restoring(self, holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        """All that a rank held before batch `snapshot.sequence`; ends any doubt.

        In steps, between which others have their turn; nothing of that rank is told meanwhile.
        """
        ...

    def load(self, holder: Holder, load: RankLoad) -> None:
        """How busy a rank is now; only from planes that carry it."""
        ...


class EventPlane(Protocol):
    """Follows any number of workers."""

    num_gaps: int
    """Times that events did not come in turn; each was healed, or made its rank uncertain."""

    def subscribe(self, worker: str, epoch: int, sources: Sequence[KVEventSource]) -> None:
        """Follow a worker's ranks, beginning with all that they hold; needs a running loop."""
        ...

    def unsubscribe(self, worker: str, epoch: int) -> None:
        """Stop; nothing of it is told any more."""
        ...

    def next_sequence(self, holder: Holder) -> int | None:
        """The batch that a rank's state here lacks first; None: not followed, or not known."""
        ...

    def readings(self) -> Iterator[Reading]: ...

    async def close(self) -> None: ...


class PeerPlane(Protocol):
    """What this replica has booked, said to the others, and theirs to it."""

    me: Peer | None
    """How the others find it, where they must be told."""

    async def reconcile(self, secret: bytes, listed: Iterable[Peer]) -> None:
        """The deployment's secret, and the replicas there are."""
        ...

    async def resync(self, holder: Holder) -> Snapshot | None:
        """What another replica knows for certain of a rank."""
        ...

    def readings(self) -> Iterator[Reading]: ...

    def check_health(self) -> None:
        """Raises RuntimeError when it has stopped speaking or listening, as it never should."""
        ...

    async def close(self) -> None:
        """Say goodbye."""
        ...


def event_plane(
    config: DeploymentConfig, app: str, listener: Listener, resync: Resync, anomalies: Anomalies
) -> EventPlane:
    """The one the configuration names.

    Raises:
        ConfigError: What it takes to reach NATS is not there; names the field.
    """
    if config.nats_events is None:
        return KVEventSubscriber(listener.apply, listener.uncertain, listener.restoring, resync, anomalies)
    from dynamo_ray.events.nats.subscriber import NatsSubscriber  # late: most need no nats-py

    return NatsSubscriber(config.nats_events, app, listener)


def peer_plane(
    config: DeploymentConfig,
    app: str,
    host: str,
    table: LoadTable,
    changed: Callable[[], None],
    snapshot_of: SnapshotOf,
) -> PeerPlane:
    """As `event_plane`. `changed` is called when others have booked or freed."""
    if config.nats_events is None:
        return Peers(host, table, changed, snapshot_of)
    from dynamo_ray.events.nats.peers import NatsPeers

    return NatsPeers(config.nats_events, app, table, changed)
