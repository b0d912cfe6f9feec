"""One node of a worker: whatever its engine raises, the orchestrator can read it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Awaitable, Callable

import pytest
import ray

import backends
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    LaunchSpec,
    NodePlace,
    Pause,
    RankLoad,
    Role,
    TokenChunk,
)
from backends.failures import Failure
from dynamo_ray.cluster import gang
from dynamo_ray.cluster import node as nodes
from dynamo_ray.cluster.node import Assignment, EngineNode
from dynamo_ray.config import LimitsConfig
from dynamo_ray.simulator import clock
from placement.plan import Bundle
from placement.topology import Resources

INFO = EngineInfo("sglang", "1", "m", Role.DECODE, 1, 16, 1024, 64, "sequential")
SPEC = LaunchSpec("d0", Role.DECODE, "m", "/m", node_rank=1, nodes=(NodePlace(), NodePlace()))


class Unpicklable(RuntimeError):
    """As many of engines' libraries: made from something else than its words, and it holds what cannot travel."""

    def __init__(self, status: int, *, detail: str) -> None:
        super().__init__(detail)
        self.status, self.callback = status, lambda: detail


class UnpicklableRefusal(EngineError):
    def __init__(self, *, why: str) -> None:
        super().__init__(why, retryable=False, field="lora")
        self.callback = lambda: why


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words either")


class BrokenEngine:
    """Fails, where it is told to, with what it is told to."""

    def __init__(self, where: str, error: BaseException, lines: tuple[str, ...] = ()) -> None:
        self.where, self.error, self.lines = where, error, lines
        self.num_stops = 0
        self.ending = "exited with code 1"

    def _fail(self, where: str) -> None:
        if where == self.where:
            raise self.error

    async def start(self) -> EngineInfo | None:
        self._fail("start")
        return INFO

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        raise NotImplementedError

    async def abort(self, request_id: str) -> None: ...

    async def release(self, request_id: str) -> None: ...

    def load(self) -> tuple[RankLoad, ...]:
        self._fail("load")
        return ()

    def last_lines(self) -> tuple[str, ...]:
        self._fail("last_lines")
        return self.lines

    async def check_health(self) -> None:
        self._fail("check_health")

    async def died(self) -> str:
        self._fail("died")
        return f"scheduler 1 (pid 7) {self.ending}"

    async def control(self, command: Command) -> None:
        self._fail("control")

    async def stop(self) -> None:
        self.num_stops += 1
        self._fail("stop")


def assignment() -> Assignment:
    return Assignment("app", "d0", 1, "hash", "app/d0", Bundle(1, "n", "127.0.0.1", Resources(1.0), (0,)), 60.0)


def node_of(engine: BrokenEngine, monkeypatch: pytest.MonkeyPatch) -> EngineNode:
    monkeypatch.setattr(backends, "create", lambda backend, spec: engine)
    return EngineNode(assignment())


def start(node: EngineNode) -> Awaitable[object]:
    return node.start("sglang", SPEC, b"secret", LimitsConfig())


async def raised_by(call: Awaitable[object]) -> BaseException:
    """What the call raised, as another process gets it."""
    with pytest.raises((EngineError, EngineStartError)) as caught:
        await call
    error = caught.value
    travelled: BaseException = pickle.loads(pickle.dumps(error))
    assert type(travelled) is type(error)
    assert str(travelled) == str(error)
    return travelled


CALLS: dict[str, Callable[[EngineNode], Awaitable[object]]] = {
    "died": lambda node: node.sentinel(),
    "check_health": lambda node: node.renew(),
    "control": lambda node: node.control(Pause()),
    "load": lambda node: node.drain(1.0),
    "stop": lambda node: node.stop(),
}


@pytest.mark.parametrize("where", CALLS)
def test_what_an_engine_raises_travels_whatever_it_is(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(error: BaseException) -> BaseException:
        engine = BrokenEngine("", error)
        node = node_of(engine, monkeypatch)
        await start(node)
        await asyncio.sleep(0.1)  # the first heartbeat, which asks for the load too
        engine.where = where
        try:
            return await raised_by(CALLS[where](node))
        finally:
            engine.where = ""
            await node.stop()

    assert str(clock.run(main(Unpicklable(503, detail="the scheduler is gone")))) == "the scheduler is gone"
    assert str(clock.run(main(SystemExit(3)))) == "3"
    assert str(clock.run(main(Wordless()))) == "Wordless"
    refusal = clock.run(main(UnpicklableRefusal(why="no such adapter")))
    assert isinstance(refusal, EngineError)
    assert (refusal.message, refusal.retryable, refusal.field) == ("no such adapter", False, "lora")


def test_a_start_that_fails_in_the_engine_s_own_words_is_explained_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",)
    engine = BrokenEngine("start", Unpicklable(500, detail="Initialization failed."), lines)
    error = clock.run(raised_by(start(node_of(engine, monkeypatch))))
    assert isinstance(error, EngineStartError)
    assert str(error).startswith("SGLang did not start: the GPU's memory does not hold 2.00 GiB more; lower decode.")
    assert str(error).endswith(f"Its last lines: {lines[0]} | Initialization failed.")
    assert engine.num_stops == 1


def test_a_start_that_the_adapter_explained_keeps_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = BrokenEngine("start", EngineStartError("engine_args.tp_size: set by `parallelism`"), ("a line",))
    error = clock.run(raised_by(start(node_of(engine, monkeypatch))))
    assert str(error) == "engine_args.tp_size: set by `parallelism`"


def test_a_failure_while_the_failed_start_is_cleaned_up_hides_no_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Worse(BrokenEngine):
        def _fail(self, where: str) -> None:
            raise Unpicklable(500, detail=f"{where} failed")

    error = clock.run(raised_by(start(node_of(Worse("", RuntimeError()), monkeypatch))))
    assert str(error) == "start failed"


def test_what_cannot_be_prepared_travels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise Unpicklable(1, detail="processes [7] of the last incarnation do not end")

    monkeypatch.setattr(nodes, "kill_predecessors", fails)

    async def main() -> BaseException:
        return await raised_by(EngineNode(assignment()).prepare(3))

    assert "do not end" in str(asyncio.run(main()))


def test_a_start_that_takes_too_long_is_told_by_its_last_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(BrokenEngine):
        async def start(self) -> EngineInfo | None:
            await asyncio.sleep(10.0)
            return None

    async def main() -> tuple[object, object, object]:
        engine = Slow("", RuntimeError(), ("NCCL WARN Bootstrap : no socket interface found",))
        node = node_of(engine, monkeypatch)
        before = await node.unready()
        starting = asyncio.ensure_future(start(node))
        await asyncio.sleep(1.0)
        during = await node.unready()
        assert await starting is None
        return before, during, await node.unready()

    before, during, after = clock.run(main())
    assert before == Failure("", "", ())
    assert isinstance(during, Failure)
    assert "decode.env.NCCL_SOCKET_IFNAME" in during.fix
    assert after is None


def test_a_death_is_told_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(lines: tuple[str, ...], ending: str = "exited with code 1") -> str:
        engine = BrokenEngine("", RuntimeError(), lines)
        engine.ending = ending
        node = node_of(engine, monkeypatch)
        await start(node)
        return await node.sentinel()

    assert clock.run(main(())) == "scheduler 1 (pid 7) exited with code 1"
    told = clock.run(main(("torch.AcceleratorError: CUDA error: out of memory",)))
    assert told.startswith("scheduler 1 (pid 7) exited with code 1: the GPU's memory is full; lower decode.")
    assert told.endswith("Its last lines: torch.AcceleratorError: CUDA error: out of memory")
    killed = clock.run(main(("a step took 20 ms",), "was killed by SIGKILL"))
    assert "decode.resources.memory_gib" in killed
    assert killed.endswith("Its last lines: a step took 20 ms")


def test_why_an_actor_ended_is_one_line_without_ray_s_advice() -> None:
    evicted = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nRefer to ...")
    assert gang.reason_of(evicted) == (
        "Ray ended its process: its node was nearly out of memory; see resources.memory_gib"
    )
    assert gang.reason_of(ray.exceptions.ActorDiedError()) == "its process died"


def test_a_node_beside_the_first_serves_under_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        node = node_of(BrokenEngine("", RuntimeError()), monkeypatch)
        info = await node.start("sglang", SPEC, b"secret", LimitsConfig())
        assert info is not None
        assert (info.worker, info.epoch, info.engine) == ("d0.1", 1, INFO)
        assert (await node.describe()).info == info
        await node.stop()

    clock.run(main())
