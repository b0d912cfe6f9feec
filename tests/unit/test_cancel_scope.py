"""A scope ends what is awaited in it, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from backends.cancel_scope import CancelScope, ScopeCancelled


async def hold(scope: CancelScope, reached: list[str]) -> None:
    with scope:
        reached.append("inside")
        await asyncio.Event().wait()


async def test_whoever_ends_it_ends_what_is_awaited_and_the_task_lives_on() -> None:
    scope, task = CancelScope(), asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(scope.cancel)
    with pytest.raises(ScopeCancelled):
        await hold(scope, [])
    assert not task.cancelling()
    await asyncio.sleep(0)


async def test_it_ends_before_what_was_awaited_can_go_on() -> None:
    scope, free, reached = CancelScope(), asyncio.Event(), list[str]()

    async def wait() -> None:
        with scope:
            await free.wait()
            reached.append("beyond")

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    free.set()  # in the same moment
    scope.cancel()
    with pytest.raises(ScopeCancelled):
        await waiting
    assert reached == []


async def test_one_block_after_another_can_be_ended() -> None:
    scope = CancelScope()
    for _ in range(2):
        asyncio.get_running_loop().call_soon(scope.cancel)
        with pytest.raises(ScopeCancelled):
            await hold(scope, [])


async def test_beside_its_block_and_twice_it_does_nothing() -> None:
    scope = CancelScope()
    scope.cancel()
    with scope:
        await asyncio.sleep(0)
    scope.cancel()
    await asyncio.sleep(0)
    again = CancelScope()
    waiting = asyncio.create_task(hold(again, []))
    await asyncio.sleep(0)
    again.cancel()
    again.cancel()
    with pytest.raises(ScopeCancelled):
        await waiting
    assert not waiting.cancelling()


@pytest.mark.parametrize("ended_first", [True, False])
async def test_a_task_that_is_cancelled_too_is_cancelled(ended_first: bool) -> None:
    scope, reached = CancelScope(), list[str]()
    waiting = asyncio.create_task(hold(scope, reached))
    await asyncio.sleep(0)
    for end in (scope.cancel, waiting.cancel) if ended_first else (waiting.cancel, scope.cancel):
        end()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert reached == ["inside"]
    assert waiting.cancelling() == 1


async def test_an_error_of_its_own_passes() -> None:
    scope = CancelScope()
    with pytest.raises(ValueError, match="own"), scope:
        raise ValueError("its own")
