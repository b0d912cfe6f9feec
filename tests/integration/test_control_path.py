"""Placement, gangs and the orchestrator on a real Ray of several fake nodes, with simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest
import ray
from control import APP, config, deployed, fake_cluster, kill_orchestrator, run
from ray import serve
from ray.cluster_utils import Cluster

from dynamo_ray.cluster import gang, orchestrator
from dynamo_ray.cluster.fleet import Fleet
from dynamo_ray.cluster.lifecycle import Died, Drained, Gone, Started
from dynamo_ray.cluster.memory import Memory
from dynamo_ray.cluster.presence import Presence, presence
from dynamo_ray.events.bookings import Peer
from dynamo_ray.request.membership import Phase
from placement import reserve
from placement.parallelism import Parallelism
from placement.plan import PlacementError, WorkerGroup, WorkerPlacement, place
from placement.reserve import ReservationError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head for Serve and two nodes of 4 CPUs each."""
    with fake_cluster([{"num_cpus": 4}] * 2) as made:
        yield made


REPLICAS = tuple(Peer(name, f"tcp://127.0.0.1:{name}1", f"tcp://127.0.0.1:{name}2") for name in ("1", "2"))


def pids() -> dict[str, list[int]]:
    nodes = run(lambda: gang.find(APP))
    return {worker: [description.pid for _, description in found] for worker, found in nodes.items()}


def group_ids() -> dict[str, str]:
    return {name: held.group.id.hex() for name, held in run(lambda: reserve.find(f"{APP}/")).items()}


def two_nodes(cpus: float = 3.0) -> WorkerGroup:
    return WorkerGroup("wide", 1, 2, Parallelism(attn_dp=2, moe_ep=2), cpus=cpus)


async def planned() -> WorkerPlacement:
    """A place on both nodes, as soon as there is one: for a moment Ray still reports what was released before."""
    deadline_s = time.monotonic() + 30.0
    while True:
        try:
            return place(reserve.observe(), two_nodes(), "wide-0")
        except PlacementError:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.1)


async def test_a_plan_is_reserved_as_planned_and_released(cluster: Cluster) -> None:
    placement = await planned()
    reservation = await reserve.reserve("t/wide-0", placement)
    assert reservation.node_ids == tuple(bundle.node_id for bundle in placement.bundles)
    assert len(set(reservation.node_ids)) == 2
    with pytest.raises(PlacementError, match="the largest free slot is 1 CPU"):
        place(reserve.observe(), two_nodes(), "wide-1")
    await reserve.release("t/wide-0")
    assert await reserve.find("t/") == {}


async def test_what_is_infeasible_is_said_at_once_and_leaves_nothing(cluster: Cluster) -> None:
    gone = [dataclass_replace(bundle, node_id="f" * 56) for bundle in (await planned()).bundles]
    began_s = time.monotonic()
    with pytest.raises(ReservationError, match="infeasible"):
        await reserve.reserve("t/wide-0", WorkerPlacement("wide-0", "wide", tuple(gone)), timeout_s=30.0)
    assert time.monotonic() - began_s < 5.0
    assert await reserve.find("t/") == {}


async def test_what_another_tenant_holds_is_said_and_leaves_nothing(cluster: Cluster) -> None:
    placement = await planned()
    await reserve.reserve("other", placement)
    with pytest.raises(ReservationError, match="something else holds it"):
        await reserve.reserve("t/wide-0", placement, timeout_s=0.5)
    await reserve.release("other")
    assert await reserve.find("t/") == {}


async def test_a_cancelled_reservation_leaves_nothing(cluster: Cluster) -> None:
    placement = await planned()
    await reserve.reserve("other", placement)
    task = asyncio.create_task(reserve.reserve("t/wide-0", placement, timeout_s=60.0))
    while not await reserve.find("t/"):
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await reserve.find("t/") == {}
    await reserve.release("other")


def dataclass_replace(bundle: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(bundle, **changes)


def test_a_killed_worker_is_rebuilt_with_a_new_epoch_in_the_same_group(cluster: Cluster) -> None:
    with deployed(config(aggregated={"replicas": 2})) as it:
        it.ready(2)
        groups, before = group_ids(), pids()
        os.kill(before["aggregated-0"][0], signal.SIGKILL)
        it.until(lambda seen: len(seen.workers) == 1, "the dead worker is no member")
        after = {worker.worker: worker.epoch for worker in it.ready(2).workers}
        assert after == {"aggregated-0": 2, "aggregated-1": 1}
        assert group_ids() == groups
        assert pids()["aggregated-1"] == before["aggregated-1"]


def test_one_dead_rank_ends_its_whole_gang(cluster: Cluster) -> None:
    wide = {"nodes": 2, "parallelism": {"attn_dp": 2, "moe_ep": 2}}
    with deployed(config(aggregated=wide)) as it:
        it.ready(1)
        before = pids()["aggregated-0"]
        assert len(before) == 2
        os.kill(before[1], signal.SIGKILL)  # not the leader
        it.until(lambda seen: seen.workers == (), "the gang is no member")
        assert it.ready(1).workers[0].epoch == 2
        assert set(pids()["aggregated-0"]).isdisjoint(before)
        assert not psutil.pid_exists(before[0])


def test_a_restarted_orchestrator_adopts_the_same_processes(cluster: Cluster) -> None:
    with deployed(config(aggregated={"replicas": 2})) as it:
        first = it.ready(2)
        before = pids()
        assert it.replicas(REPLICAS[0], first.version) == REPLICAS[:1]
        assert it.replicas(REPLICAS[1], first.version) == REPLICAS
        kill_orchestrator()
        again = it.until(lambda seen: seen.version > first.version + 1000 and len(seen.workers) == 2, "adopted")
        assert {worker.epoch for worker in again.workers} == {1}
        assert again.secret == first.secret
        assert pids() == before
        assert it.replicas(REPLICAS[1], first.version) == REPLICAS[1:]
        assert it.replicas(REPLICAS[0], first.version) == REPLICAS


def test_a_changed_role_is_replaced_and_an_unchanged_one_kept(cluster: Cluster) -> None:
    split = {"aggregated": None, "prefill": {"replicas": 1}, "decode": {"replicas": 1}}
    with deployed(config(**split)) as it:
        it.ready(2)
        before = pids()
        split["decode"] = {"replicas": 1, "engine_args": {"block_size": 32}}
        serve.run(orchestrator.application(config(**split)), name=APP, route_prefix=None)
        changed = it.until(
            lambda seen: {w.engine.block_size for w in seen.workers} == {16, 32}, "decode has the new block size"
        )
        assert {worker.worker: worker.epoch for worker in changed.workers} == {"prefill-0": 1, "decode-0": 2}
        assert pids()["prefill-0"] == before["prefill-0"]


def test_what_does_not_fit_is_explained_and_placed_when_a_node_comes(cluster: Cluster) -> None:
    with deployed(config(aggregated={"resources": {"cpus": 6.0}})) as it:
        seen = it.until(lambda seen: seen.statuses[0].phase is Phase.BACKOFF, "explained")
        assert "aggregated-0 needs a node with 6 CPUs free" in seen.statuses[0].detail
        assert "the largest free slot is 4 CPUs" in seen.statuses[0].detail
        node = cluster.add_node(num_cpus=8)
        it.ready(1)
    cluster.remove_node(node)


def test_an_engine_that_cannot_start_is_explained_and_leaves_nothing(cluster: Cluster) -> None:
    with deployed(config(aggregated={"engine_args": {"block_size": "x"}})) as it:
        seen = it.until(lambda seen: seen.statuses[0].restarts >= 2, "it failed twice")
        assert "engine_args.block_size" in seen.statuses[0].detail
        assert seen.workers == ()


def test_deleting_the_application_while_a_worker_starts_leaves_nothing(cluster: Cluster) -> None:
    with deployed(config(aggregated={"replicas": 2, "engine_args": {"start_s": 60.0}})) as it:
        it.until(lambda seen: all(s.phase is Phase.STARTING for s in seen.statuses), "both are starting")


@contextlib.asynccontextmanager
async def fleet_of_one(**limits: Any) -> AsyncIterator[Fleet]:
    """A fleet without an orchestrator, whose one worker has its place."""
    made = Fleet(APP, config(limits=limits), Memory(APP), b"secret")
    assert await made.adopt() == []
    await made.reserve("aggregated-0")
    try:
        yield made
    finally:
        await made.kill("aggregated-0", 1)
        await made.release("aggregated-0")
        assert gang.actor_names(APP) == []
        assert await reserve.find(f"{APP}/") == {}


async def test_a_start_called_off_in_its_first_moment_creates_nothing_later(cluster: Cluster) -> None:
    async with fleet_of_one() as fleet:
        starting = asyncio.create_task(fleet.start("aggregated-0", 1, lambda progress: None))
        await asyncio.sleep(0)
        assert await fleet.kill("aggregated-0", 1) == Gone("aggregated-0", 1)
        assert isinstance(await starting, Died)
        assert gang.actor_names(APP) == []


async def test_a_draining_gang_is_not_adopted(cluster: Cluster) -> None:
    async with fleet_of_one(drain_timeout_s=0.2) as fleet:
        assert isinstance(await fleet.start("aggregated-0", 1, lambda progress: None), Started)
        assert await fleet.drain("aggregated-0", 1) == Drained("aggregated-0", 1)
        assert await Fleet(APP, config(), Memory(APP), b"secret").adopt() == []
        assert gang.actor_names(APP) == []


async def test_a_leader_that_hangs_holds_up_no_drain(cluster: Cluster) -> None:
    async with fleet_of_one(drain_timeout_s=0.2) as fleet:
        await fleet.start("aggregated-0", 1, lambda progress: None)
        ((_, description),) = (await gang.find(APP))["aggregated-0"]
        assert description is not None
        os.kill(description.pid, signal.SIGSTOP)
        async with asyncio.timeout(10.0):
            assert await fleet.drain("aggregated-0", 1) == Drained("aggregated-0", 1)


def test_a_serve_that_was_shut_down_is_absent_for_who_knew_it(cluster: Cluster) -> None:
    class Asker:
        def ask(self) -> str:
            return presence(APP)

    asker = ray.remote(Asker).options(num_cpus=0).remote()
    assert ray.get(asker.ask.remote()) == Presence.ABSENT
    serve.shutdown()
    assert ray.get(asker.ask.remote()) == Presence.ABSENT
    serve.start(proxy_location="Disabled")


def test_a_worker_of_a_lost_node_moves_to_another(cluster: Cluster) -> None:
    """The last test of this module: it leaves the cluster one node short."""
    with deployed(config(aggregated={"resources": {"cpus": 3.0}})) as it:
        it.ready(1)
        groups = run(lambda: reserve.find(f"{APP}/"))
        (held,) = groups.values()
        lost = next(node for node in cluster.worker_nodes if node.node_id == held.node_ids[0])
        cluster.remove_node(lost, allow_graceful=False)
        moved = it.until(lambda seen: any(w.epoch > 1 for w in seen.workers), "it serves elsewhere")
        assert len(moved.workers) == 1
        assert group_ids() != {name: reservation.group.id.hex() for name, reservation in groups.items()}
