"""A request's work beside its connection: when it begins, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from dynamo_ray.request.exchange import ClientGone, Exchange, Message


class Client:
    """Connected until `leave`."""

    def __init__(self) -> None:
        self._left = asyncio.Event()

    async def receive(self) -> Message:
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        raise AssertionError(f"nothing is answered here, not {message}")

    def leave(self) -> None:
        self._left.set()

    async def wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        scope = {"method": "POST", "path": "/", "headers": []}
        await Exchange(scope, self.receive, self.send).while_connected(work)


async def for_ever(ended: list[str]) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(0)
        ended.append("cleaned up")


async def test_of_requests_that_came_together_each_is_begun_before_the_next_is_read() -> None:
    order = []

    async def work(number: int) -> None:
        order.append(f"begun {number}")

    async def handle(number: int) -> None:
        order.append(f"read {number}")
        await Client().wait_for(work(number))

    await asyncio.gather(*map(handle, range(3)))
    assert order == [f"{what} {number}" for number in range(3) for what in ("read", "begun")]


async def test_a_client_that_leaves_ends_the_work_which_cleans_up_first() -> None:
    client, ended = Client(), list[str]()
    waiting = asyncio.create_task(client.wait_for(for_ever(ended)))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    client.leave()
    with pytest.raises(ClientGone):
        await waiting
    assert ended == ["cleaned up"]
    assert not waiting.cancelling()


async def test_whoever_cancels_is_told_so_and_not_that_the_client_has_left() -> None:
    client, ended = Client(), list[str]()
    waiting = asyncio.create_task(client.wait_for(for_ever(ended)))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert ended == ["cleaned up"]


async def test_a_deadline_of_the_work_s_own_is_not_a_client_that_has_left() -> None:
    async def work() -> None:
        async with asyncio.timeout(0.01):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await Client().wait_for(work())


async def test_work_that_is_done_has_ended_well_though_its_client_leaves_in_the_same_moment() -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    for client_first in (True, False):
        client, done, ended = Client(), asyncio.Event(), list[str]()

        async def work(done: asyncio.Event = done, ended: list[str] = ended) -> None:
            await done.wait()
            ended.append("answered")

        waiting = asyncio.create_task(client.wait_for(work()))
        await asyncio.sleep(0.01)
        for happen in (client.leave, done.set) if client_first else (done.set, client.leave):
            happen()
        await waiting
        assert ended == ["answered"]
    await asyncio.sleep(0.01)
    assert errors == []
