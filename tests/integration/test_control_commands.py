"""Pause, sleep and new weights from dynamo_ray.control() down to the engines of every node, on a real Ray."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from control import APP, Deployed, config, deployed, fake_cluster, kill_orchestrator, run
from ray.cluster_utils import Cluster

import dynamo_ray
from backends.engine import Role, Sampling
from dynamo_ray import Pause, Resume, Sleep, UpdateWeights, Wake
from dynamo_ray.cluster import gang
from dynamo_ray.config import DeploymentConfig
from dynamo_ray.errors import ControlError, NotReady
from dynamo_ray.request.dispatch import Dispatch
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.membership import Membership

pytestmark = pytest.mark.filterwarnings("ignore")

PROMPT = list(range(200))
WIDE = {"nodes": 2, "parallelism": {"attn_dp": 2, "moe_ep": 2}}
"""One worker over both nodes."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head for Serve and two nodes of 4 CPUs each."""
    with fake_cluster([{"num_cpus": 4}] * 2) as made:
        yield made


@asynccontextmanager
async def ingress(it: Deployed, checked: DeploymentConfig, count: int) -> AsyncIterator[Dispatch]:
    """The data path of an ingress, in this process, connected to so many endpoints."""

    async def watch(version: int) -> Membership:
        membership: Membership = await it.handle.watch.remote(version)
        return membership

    dispatch = Dispatch(checked, watch)
    await dispatch.start()
    try:
        await until(lambda: sum(len(dispatch.workers.of_role(role)) for role in checked.roles) == count)
        yield dispatch
    finally:
        await dispatch.close()


async def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.02)


async def control(*arguments: Any) -> tuple[str, ...]:
    """As a researcher's program, beside our event loop."""
    return await asyncio.to_thread(dynamo_ray.control, APP, *arguments)


_numbers = iter(range(10**6))


async def ask(dispatch: Dispatch, max_tokens: int = 10) -> list[int]:
    request = Generation(f"r{next(_numbers)}", PROMPT, Sampling(max_tokens, temperature=0.0))
    async with aclosing(dispatch.generate(request)) as chunks:
        return [token async for chunk in chunks for token in chunk.token_ids]


def shown(dispatch: Dispatch) -> str:
    """What an operator is told of the first worker."""
    assert dispatch.membership is not None
    return dispatch.membership.statuses[0].detail


def connected(checked: DeploymentConfig, endpoints: int, work: Callable[[Dispatch], Awaitable[None]]) -> None:
    async def main(it: Deployed) -> None:
        async with ingress(it, checked, endpoints) as dispatch:
            await work(dispatch)

    with deployed(checked) as it:
        it.ready(endpoints)
        run(lambda: main(it))


@pytest.mark.parametrize(("serving", "endpoints"), [("leader", 1), ("every_node", 2)])
def test_a_worker_over_two_nodes_is_paused_put_to_sleep_and_given_weights_as_one(
    cluster: Cluster, tmp_path: Path, serving: str, endpoints: int
) -> None:
    checked = config(aggregated={**WIDE, "engine_args": {"serving": serving}})

    async def work(dispatch: Dispatch) -> None:
        old = await ask(dispatch)
        await until(lambda: dispatch.router.index.num_blocks > 0)
        for halt, undo, words in ((Pause(), Resume(), "is paused"), (Sleep(), Wake(), "is asleep")):
            assert await control(halt) == ("aggregated-0",)
            await until(lambda: dispatch.ready() is not None)
            assert len(dispatch.workers.paused(*checked.roles)) == endpoints
            with pytest.raises(NotReady, match=words):
                await ask(dispatch)
            assert await control(undo) == ("aggregated-0",)
            await until(lambda: dispatch.ready() is None)
            assert await ask(dispatch) == old
        await until(lambda: dispatch.router.index.num_blocks > 0)
        await control(UpdateWeights(str(tmp_path)), "aggregated-0")
        await until(lambda: dispatch.router.index.num_blocks == 0)
        await until(lambda: len(dispatch.workers.of_role(*checked.roles)) == endpoints)
        answers = [await ask(dispatch) for _ in range(4)]
        assert answers == [answers[0]] * 4, "every node has the same weights"
        assert answers[0] != old

    connected(checked, endpoints, work)


def test_a_pause_holds_what_is_inside_until_it_is_resumed(cluster: Cluster) -> None:
    checked = config(aggregated={"replicas": 1, "engine_args": {"step_s": 0.02}})

    async def work(dispatch: Dispatch) -> None:
        expected = await ask(dispatch, 100)
        task = asyncio.create_task(ask(dispatch, 100))
        await until(lambda: dispatch.router.table.num_bookings == 1)
        await control(Pause())
        await asyncio.sleep(3.0)  # the answer takes 2 s
        assert not task.done()
        await control(Resume())
        assert await task == expected

    connected(checked, 1, work)


def test_a_role_or_a_worker_may_be_told_alone_and_a_failure_says_who_and_why(cluster: Cluster, tmp_path: Path) -> None:
    role = {"resources": {"cpus": 1.0}}
    checked = config(aggregated=None, prefill=role, decode={**role, "replicas": 2})

    async def work(dispatch: Dispatch) -> None:
        old = await ask(dispatch)
        assert await control(Pause(), "decode") == ("decode-0", "decode-1")
        assert await control(Resume(), "decode-1") == ("decode-1",)
        await until(lambda: dispatch.ready() is None)
        assert await ask(dispatch) == old
        assert list(dispatch.workers.paused(Role.DECODE)) == ["decode-0"]
        await control(Resume())
        missing = str(tmp_path / "missing")
        with pytest.raises(ControlError) as failed:
            await control(UpdateWeights(missing), "decode")
        reason = f"node 0: there is no folder {missing}"
        assert failed.value.failures == {"decode-0": reason, "decode-1": reason}
        await until(lambda: not dispatch.workers.paused(Role.DECODE))
        assert await ask(dispatch) == old
        for nobody in ("decode-7", "aggregated"):
            with pytest.raises(ControlError, match=f"{nobody}: control has no worker and no role of that name"):
                await control(Pause(), nobody)
        with pytest.raises(ControlError, match="nothing"):
            await asyncio.to_thread(dynamo_ray.control, "nothing", Pause())

    connected(checked, 3, work)


def test_a_worker_stays_halted_under_another_orchestrator_and_the_one_that_replaces_it_is_not(cluster: Cluster) -> None:
    checked = config()

    async def work(dispatch: Dispatch) -> None:
        expected = await ask(dispatch)
        await control(Pause())
        await until(lambda: dispatch.ready() is not None)
        assert dispatch.membership is not None
        await until(lambda: shown(dispatch) == "takes no requests: aggregated-0 is paused")
        before = dispatch.membership.version
        await asyncio.to_thread(kill_orchestrator)
        await until(lambda: dispatch.membership is not None and dispatch.membership.version > before + 1000)
        await until(lambda: dispatch.workers.paused(Role.AGGREGATED) == {"aggregated-0": "is paused"})
        with pytest.raises(NotReady, match="aggregated-0 is paused"):
            await ask(dispatch)
        await until(lambda: shown(dispatch) == "takes no requests: aggregated-0 is paused")
        await control(Resume())
        await until(lambda: dispatch.ready() is None)
        assert await ask(dispatch) == expected
        await until(lambda: shown(dispatch) == "adopted")
        await control(Pause())
        await until(lambda: dispatch.ready() is not None)
        ((_, described),) = (await gang.find(APP))["aggregated-0"]
        assert described is not None
        os.kill(described.pid, signal.SIGKILL)
        await until(lambda: dispatch.ready() is None)
        assert await ask(dispatch) == expected

    connected(checked, 1, work)


def test_a_worker_that_does_not_run_is_said_to(cluster: Cluster) -> None:
    with deployed(config(aggregated={"engine_args": {"start_s": 60.0}})) as it:
        it.until(lambda seen: "loading" in seen.statuses[0].detail, "it starts")
        with pytest.raises(ControlError, match="aggregated-0: it does not run"):
            dynamo_ray.control(APP, Pause())
