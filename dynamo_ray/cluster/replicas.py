"""The ingress replicas there are, as each says itself whenever it asks for the membership. Pure."""

from __future__ import annotations

from dynamo_ray.events.bookings import Peer


class Replicas:
    """Those that asked within the lease; the newest has its endpoints to itself, whoever had them before."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._seen: dict[Peer, float] = {}

    @property
    def peers(self) -> tuple[Peer, ...]:
        return tuple(sorted(self._seen, key=lambda peer: peer.replica))

    def seen(self, peer: Peer, now_s: float) -> bool:
        """Renew its lease; whether that changes `peers`."""
        if peer in self._seen:
            self._seen[peer] = now_s
            return False
        for other in [other for other in self._seen if _collide(other, peer)]:
            del self._seen[other]
        self._seen[peer] = now_s
        return True

    def expire(self, now_s: float) -> bool:
        """Let go of those that no longer ask; whether there were any."""
        gone = [peer for peer, seen_s in self._seen.items() if now_s >= seen_s + self._lease_s]
        for peer in gone:
            del self._seen[peer]
        return bool(gone)


def _collide(one: Peer, other: Peer) -> bool:
    return one.replica == other.replica or bool({one.bookings, one.snapshots} & {other.bookings, other.snapshots})
