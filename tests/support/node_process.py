"""One node of a worker in a process of its own, as it has in reality; driven from a test by lines of JSON."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import pickle
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from backends.engine import Command, EngineError, EngineInfo, GenerateRequest, LaunchSpec, RankLoad, TokenChunk

SUPPORT = Path(__file__).parent


class RemoteNode:
    """What tests need of an Engine, of one that runs elsewhere."""

    def __init__(self, spec: LaunchSpec, process: Process) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.pids: list[int] = []
        self._process = process
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._reader = asyncio.create_task(self._read())

    async def start(self) -> EngineInfo | None:
        started = await self._ask("start")
        self.pids = started["pids"]
        self.info = None if started["info"] is None else msgspec.convert(started["info"], EngineInfo)
        return self.info

    async def chunks(self, request: GenerateRequest) -> list[TokenChunk]:
        return msgspec.convert(await self._ask("generate", msgspec.to_builtins(request)), list[TokenChunk])

    async def load(self) -> tuple[RankLoad, ...]:
        return msgspec.convert(await self._ask("load"), tuple[RankLoad, ...])

    async def control(self, command: Command) -> None:
        await self._ask("control", msgspec.to_builtins(command))

    async def died(self) -> str:
        return str(await self._ask("died"))

    async def stop(self) -> None:
        """Also of a start that still runs."""
        if self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self._process.wait()
        await self._reader

    async def _ask(self, what: str, argument: Any = None) -> Any:
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([number, what, argument]).encode() + b"\n")
        return await self._answers[number]

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            number, answer, error = json.loads(line)
            future = self._answers.pop(number)
            if future.cancelled():
                continue
            if error is None:
                future.set_result(answer)
            else:
                future.set_exception(EngineError(error))
        for future in self._answers.values():
            future.cancel()


@asynccontextmanager
async def node_process(spec: LaunchSpec, backend: str) -> AsyncIterator[RemoteNode]:
    """A node that has not started; it ends with the block."""
    node = base64.b64encode(pickle.dumps((spec, backend))).decode()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__)),
        node,
        stdin=PIPE,
        stdout=PIPE,
        limit=1 << 24,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(SUPPORT), str(SUPPORT.parent.parent), *sys.path])},
    )
    remote = RemoteNode(spec, process)
    try:
        yield remote
    finally:
        await remote.stop()


async def _serve(spec: LaunchSpec, backend: str, answers: int) -> None:
    """Answer until stdin ends."""
    from backends import create

    engine = create(backend, spec)

    async def answer(what: str, argument: Any) -> Any:
        if what == "start":
            info = await engine.start()
            processes = engine.processes()  # type: ignore[attr-defined]
            return {"info": info, "pids": [process.pid for process in processes]}
        if what == "generate":
            return [chunk async for chunk in engine.generate(msgspec.convert(argument, GenerateRequest))]
        if what == "control":
            return await engine.control(msgspec.convert(argument, Command))
        return engine.load() if what == "load" else await engine.died()

    async def do(number: int, what: str, argument: Any) -> None:
        result, error = None, None
        try:
            result = await answer(what, argument)
        except Exception as failure:  # noqa: BLE001 - raised where it was asked for
            error = f"{type(failure).__name__}: {failure}"
        os.write(answers, json.dumps([number, msgspec.to_builtins(result), error]).encode() + b"\n")

    reader = asyncio.StreamReader(limit=1 << 24)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    tasks = set()
    async for line in reader:
        tasks.add(asyncio.create_task(do(*json.loads(line))))
    await engine.stop()
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    answers_fd = os.dup(1)
    os.dup2(2, 1)  # what vLLM prints is no answer
    asyncio.run(_serve(*pickle.loads(base64.b64decode(sys.argv[1])), answers_fd))
