"""A process in place of one of Ray's actors, and what stands for its handle."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from backends.processes import die_with_parent


class Worker:
    def __init__(self, rank: int, behaviour: Mapping[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, writer = context.Pipe(duplex=False)
        self._process = context.Process(target=_main, args=(rank, dict(behaviour), writer), daemon=True)
        self._process.start()
        writer.close()
        self.__ray_ready__ = SimpleNamespace(remote=self._is_there)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.is_alive()

    def wait_until_ready(self) -> None:
        try:
            said = self._ready.recv()
        except EOFError:
            raise RuntimeError("RayGPUWorker died during initialization") from None
        if said is not None:
            raise RuntimeError(said)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    async def _is_there(self) -> bool:
        await asyncio.sleep(0)
        if not self.is_alive:
            raise RuntimeError(f"The actor died unexpectedly before finishing this task (pid {self.pid}).")
        return True


def _main(rank: int, behaviour: dict[str, Any], ready: Any) -> None:
    die_with_parent()
    time.sleep(behaviour.get("start_s", 0.0))
    if "failure" in behaviour:
        print(behaviour["failure"], file=sys.stderr)
        ready.send(behaviour["failure"])
        return
    ready.send(None)
    while True:
        time.sleep(60.0)
