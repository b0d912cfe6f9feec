"""vLLM's processes: they end with the one that started them, and no launch touches another's."""

from __future__ import annotations

import asyncio
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from engines import TINY_DEEPSEEK

from backends.processes import Launcher
from dynamo_ray import models

START_AND_WAIT = """
import asyncio, signal, sys
sys.path.insert(0, {support!r})
from engines import TINY_DEEPSEEK, spec
from backends.vllm import VLLMEngine

async def main():
    engine = VLLMEngine(spec("vllm", model=TINY_DEEPSEEK, attn_dp=2, moe_ep=2, cores=(0, 1)))
    await engine.start()
    print("pids", *(process.pid for process in engine.processes()), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_outlives_a_killed_process() -> None:
    """SIGKILL for the process that started a two-rank engine: both ranks and their coordinator end at once."""
    models.prepare(TINY_DEEPSEEK)
    support = str(Path(__file__).parents[1] / "support")
    command = [sys.executable, "-c", START_AND_WAIT.format(support=support)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as starter:
        try:
            assert starter.stdout is not None
            words = next(line for line in starter.stdout if line.startswith("pids")).split()[1:]
            processes = [psutil.Process(int(pid)) for pid in words]
            assert len(processes) == 3
        finally:
            starter.send_signal(signal.SIGKILL)
    assert psutil.wait_procs(processes, timeout=10.0)[1] == []


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
