"""Which ingress replicas the orchestrator tells the others of."""

from __future__ import annotations

from dynamo_ray.cluster.replicas import Replicas
from dynamo_ray.events.bookings import Peer


def peer(replica: str, port: int) -> Peer:
    return Peer(replica, f"tcp://10.0.0.1:{port}", f"tcp://10.0.0.1:{port + 1}")


def test_a_replica_is_listed_for_as_long_as_it_asks() -> None:
    replicas = Replicas(lease_s=30.0)
    assert replicas.seen(peer("b", 4), 0.0)
    assert replicas.seen(peer("a", 2), 10.0)
    assert replicas.peers == (peer("a", 2), peer("b", 4))
    assert not replicas.seen(peer("a", 2), 20.0)
    assert not replicas.expire(29.9)
    assert replicas.expire(30.0)
    assert replicas.peers == (peer("a", 2),)
    assert not replicas.expire(49.9)
    assert replicas.expire(50.0)
    assert replicas.peers == ()


def test_one_that_comes_back_on_another_port_is_listed_beside_its_predecessor_until_that_ends() -> None:
    replicas = Replicas(lease_s=30.0)
    replicas.seen(peer("old", 2), 0.0)
    assert replicas.seen(peer("new", 4), 1.0)
    assert replicas.expire(30.0)
    assert replicas.peers == (peer("new", 4),)


def test_a_port_belongs_to_the_one_that_has_it_now() -> None:
    replicas = Replicas(lease_s=30.0)
    replicas.seen(peer("old", 2), 0.0)
    assert replicas.seen(peer("new", 3), 1.0)
    assert replicas.peers == (peer("new", 3),)
