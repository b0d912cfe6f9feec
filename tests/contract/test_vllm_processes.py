"""No launch of an engine's processes touches another's."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from multiprocessing.process import BaseProcess

import pytest

from backends.processes import Launcher


async def test_a_launch_given_up_while_it_waits_for_another_leaves_that_one_alone() -> None:
    proceed = threading.Event()
    started: list[BaseProcess] = []

    def start_and_take_time() -> None:
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60.0,))
        process.start()
        started.append(process)
        proceed.wait()

    first, second = Launcher("first"), Launcher("second")
    running = asyncio.create_task(first.run(start_and_take_time, lambda _: None, {}, {}))
    while not started:
        await asyncio.sleep(0.01)
    waiting = asyncio.create_task(second.run(lambda: None, lambda _: None, {}, {}))
    await asyncio.sleep(0)
    waiting.cancel()
    try:
        await asyncio.sleep(0.2)  # longer than it takes between two looks at what there is to kill
        assert started[0].is_alive()
    finally:
        proceed.set()
        await running
        with pytest.raises(asyncio.CancelledError):
            await waiting
        started[0].kill()
        started[0].join()
        await first.finish()
        await second.finish()
