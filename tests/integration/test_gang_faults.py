"""A worker over three nodes that fails: on a real Ray of fake nodes, with simulated engines."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import psutil
import pytest
from control import APP, TIMEOUT_S, config, deployed, fake_cluster, run
from ray.cluster_utils import Cluster

from backends.engine import Sampling
from dynamo_ray.cluster import gang
from dynamo_ray.cluster.fleet import Fleet
from dynamo_ray.cluster.lifecycle import Died, Drained, Gone, Started
from dynamo_ray.cluster.memory import Memory
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.request.dispatch import Dispatch
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.membership import Membership
from dynamo_ray.request.wire import worker_of
from placement import reserve

pytestmark = pytest.mark.filterwarnings("ignore")

WORKER = "aggregated-0"
FULL = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head for Serve and three nodes of 4 CPUs each."""
    with fake_cluster([{"num_cpus": 4}] * 3) as made:
        yield made


def wide(replicas: int = 1, limits: dict[str, Any] | None = None, **engine_args: Any) -> DeploymentConfig:
    """Workers of three nodes, each of which takes requests."""
    return config(
        aggregated={
            "replicas": replicas,
            "nodes": 3,
            "parallelism": {"attn_dp": 3, "moe_ep": 3},
            "engine_args": {"serving": "every_node", **engine_args},
        },
        limits=limits or {},
    )


async def described() -> list[gang.Description]:
    nodes = (await gang.find(APP)).get(WORKER, [])
    found = [description for _, description in nodes if description is not None]
    assert len(found) == len(nodes)
    return found


@contextlib.asynccontextmanager
async def fleet_of(checked: DeploymentConfig) -> AsyncIterator[Fleet]:
    """A fleet without an orchestrator, whose one worker has its place."""
    made = Fleet(APP, checked, Memory(APP), b"secret")
    await made.reserve(WORKER)
    try:
        yield made
    finally:
        await made.kill(WORKER, 1)
        await made.release(WORKER)


async def test_a_node_that_does_not_start_ends_the_others_and_gives_the_nodes_back(cluster: Cluster) -> None:
    async with fleet_of(wide(failing_node=2, last_line=FULL, start_s=1.0)) as fleet:
        died = await fleet.start(WORKER, 1, lambda _: None)
        assert isinstance(died, Died)
        assert died.reason.startswith(
            "node 2: The simulated engine did not start: the GPU's memory does not hold 2.00 "
        )
        assert died.reason.endswith(f"Its last lines: {FULL}")
        pids = [description.pid for description in await described()]
        assert len(pids) == 3
        assert await fleet.kill(WORKER, 1) == Gone(WORKER, 1)
        assert gang.actor_names(APP) == []
        await fleet.release(WORKER)
        assert await reserve.find(f"{APP}/") == {}
        await eventually(lambda: not any(map(psutil.pid_exists, pids)), "their processes are gone")


async def test_a_start_that_takes_too_long_ends_with_what_was_said_last(cluster: Cluster) -> None:
    limits = {"start_timeout_s": 8.0}
    async with fleet_of(wide(limits=limits, failing_node=1, last_line=FULL, start_s=600.0)) as fleet:
        began_s = time.monotonic()
        died = await fleet.start(WORKER, 1, lambda _: None)
        assert time.monotonic() - began_s < 20.0
        assert isinstance(died, Died)
        assert died.reason.startswith(
            "node 1: The simulated engine was not ready within 8 s (limits.start_timeout_s), nor on nodes 0, 2: the GPU"
        )
        assert died.reason.endswith(f"Its last lines: {FULL}")


async def test_a_node_that_does_not_even_answer_is_named(cluster: Cluster) -> None:
    async with fleet_of(wide(limits={"start_timeout_s": 8.0}, start_s=600.0)) as fleet:
        starting = asyncio.create_task(fleet.start(WORKER, 1, lambda _: None))
        found: list[gang.Description] = []
        while len(found) < 3:
            found = await described()
        os.kill(found[0].pid, signal.SIGSTOP)
        died = await starting
        assert isinstance(died, Died)
        assert died.reason.startswith("node 0: The simulated engine was not ready within 8 s")
        assert died.reason.endswith("nor on nodes 1, 2, and the node does not answer")


async def test_every_node_that_takes_requests_is_drained_and_adopted_with_the_others(cluster: Cluster) -> None:
    async with fleet_of(wide(limits={"drain_timeout_s": 0.2})) as fleet:
        started = await fleet.start(WORKER, 1, lambda _: None)
        assert isinstance(started, Started)
        assert [info.worker for info in started.endpoints] == [WORKER, f"{WORKER}.1", f"{WORKER}.2"]
        assert [info.engine.first_dp_rank for info in started.endpoints] == [0, 1, 2]
        assert len({info.address for info in started.endpoints}) == 3
        (adopted,) = await Fleet(APP, wide(), Memory(APP), b"secret").adopt()
        assert (adopted.epoch, adopted.endpoints) == (1, started.endpoints)
        assert await fleet.drain(WORKER, 1) == Drained(WORKER, 1)
        assert [description.started for description in await described()] == [False] * 3


def test_a_worker_that_never_starts_says_why_and_holds_nothing_while_it_waits(cluster: Cluster) -> None:
    with deployed(wide(failing_node=1, last_line=FULL)) as it:
        seen = it.until(lambda seen: seen.statuses[0].restarts >= 3, "it failed three times")
        assert f"Its last lines: {FULL}" in seen.statuses[0].detail
        assert [status.worker for status in seen.statuses] == [WORKER]
        assert seen.workers == ()

        def holds_nothing() -> bool:
            return gang.actor_names(APP) == [] and run(lambda: reserve.find(f"{APP}/")) == {}

        run(lambda: eventually(holds_nothing, "no actor and no group is left", in_thread=True))


def test_the_requests_of_a_gang_that_lost_a_node_go_on_and_it_comes_back(cluster: Cluster) -> None:
    with deployed(wide(replicas=2, step_s=0.05)) as it:
        it.ready(6)
        broken = asyncio.run(stream_through_a_death(it.handle.watch.remote))
        back = it.until(
            lambda seen: len(seen.workers) == 6 and any(w.epoch > 1 for w in seen.workers), "it serves again"
        )
        assert {(worker_of(info.worker), info.epoch) for info in back.workers} == {
            (name, 2 if name == broken else 1) for name in (WORKER, "aggregated-1")
        }
        assert [status.restarts for status in back.statuses if status.worker == broken] == [1]


async def stream_through_a_death(watch: Callable[[int], Any]) -> str:
    """Kill a node beside the one that answers a request, whose tokens must not change; returns the worker."""

    async def watched(version: int) -> Membership:
        seen: Membership = await watch(version)
        return seen

    dispatch = Dispatch(wide(replicas=2), watched)
    await dispatch.start()
    try:
        await eventually(lambda: len(dispatch.router.table.reported()) == 6, "every rank of both workers is connected")
        undisturbed = [token async for chunk in dispatch.generate(generation("a")) for token in chunk.token_ids]
        tokens: list[int] = []
        broken = ""
        async for chunk in dispatch.generate(generation("b")):
            tokens += chunk.token_ids
            serving = [holder for holder, load in dispatch.router.table.reported().items() if load.num_running]
            if not broken and serving:
                broken = worker_of(serving[0].worker)
                nodes = [d for _, d in (await gang.find(APP))[broken] if d is not None and d.info is not None]
                other = next(d for d in nodes if d.info is not None and d.info.worker != serving[0].worker)
                os.kill(other.pid, signal.SIGKILL)
        assert tokens == undisturbed
        assert broken
        assert dispatch.router.tally.retries == 1
    finally:
        await dispatch.close()
    return broken


def generation(request_id: str) -> Generation:
    return Generation(request_id, list(range(40)), Sampling(120, temperature=0.0, ignore_eos=True))


async def eventually(condition: Callable[[], bool], what: str, in_thread: bool = False) -> None:
    deadline_s = time.monotonic() + TIMEOUT_S
    while not (await asyncio.to_thread(condition) if in_thread else condition()):
        assert time.monotonic() < deadline_s, f"not within {TIMEOUT_S} s: {what}"
        await asyncio.sleep(0.05)
