"""The data plane end to end, ingress side and worker side, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import msgspec
import pytest

from backends.engine import (
    EngineInfo,
    GenerateRequest,
    KVEventSource,
    LaunchSpec,
    RankLoad,
    Role,
    Sampling,
    TokenChunk,
)
from backends.simulated import SimulatedEngine
from dynamo_ray.cluster.worker import WorkerServer
from dynamo_ray.request import wire
from dynamo_ray.request.connection import LegFailed, WorkerConnection
from dynamo_ray.simulator import clock

SECRET = b"s" * 32


class Ingress:
    """What an ingress hears on its connections."""

    def __init__(self) -> None:
        self.loads: list[tuple[RankLoad, ...]] = []
        self.flushed: list[wire.WorkerInfo] = []
        self.lost: list[WorkerConnection] = []

    async def connect(self, info: wire.WorkerInfo, secret: bytes = SECRET) -> WorkerConnection:
        connection = WorkerConnection(
            info,
            secret,
            5.0,
            lambda _info, loads: self.loads.append(loads),
            lambda: None,
            self.flushed.append,
            self.lost.append,
        )
        await connection.connect()
        return connection


@asynccontextmanager
async def worker(**options: Any) -> AsyncIterator[tuple[WorkerServer, SimulatedEngine, Ingress]]:
    max_queued = options.pop("max_queued_requests", 256)
    spec = LaunchSpec("d0", Role.AGGREGATED, "m", "", kv_events=False, engine_args={"step_s": 0.02, **options})
    engine = SimulatedEngine(spec)
    info: EngineInfo = await engine.start()
    server = WorkerServer(engine, worker="d0", epoch=1, secret=SECRET, host="127.0.0.1", max_queued_requests=max_queued)
    await server.start(info)
    try:
        yield server, engine, Ingress()
    finally:
        await server.stop()
        await engine.stop()


def request(request_id: str = "r", prompt: int = 20, max_tokens: int = 5) -> GenerateRequest:
    return GenerateRequest(request_id, list(range(prompt)), Sampling(max_tokens, temperature=0.0))


async def read_all(connection: WorkerConnection, leg: GenerateRequest) -> list[int]:
    stream = connection.submit(leg)
    tokens: list[int] = []
    try:
        while not stream.finished or stream.pending:
            tokens += (await stream.next()).token_ids
    finally:
        stream.close()
    return tokens


def test_tokens_arrive_in_order_and_the_engine_is_empty_afterwards() -> None:
    async def main() -> None:
        async with worker() as (server, engine, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            first = await read_all(connection, request())
            again = await read_all(connection, request("other"))
            assert len(first) == 5
            assert first == again
            assert engine.load()[0].kv_used_blocks == 0

    clock.run(main())


def test_all_requests_of_a_step_share_one_frame() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            frames: list[int] = []
            receive = connection._receive

            def count(message: Any) -> None:
                if isinstance(message, wire.Step):
                    frames.append(len(message.chunks))
                receive(message)

            connection._receive = count  # type: ignore[method-assign]
            await asyncio.gather(*(read_all(connection, request(f"r{i}")) for i in range(64)))
            assert frames == [64] * 5

    clock.run(main())


def test_a_wrong_secret_is_refused_and_learns_nothing() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            with pytest.raises(OSError, match="handshake"):
                await ingress.connect(server.info, b"x" * 32)
            assert server.peers == set()

    clock.run(main())


def test_a_server_that_does_not_know_the_secret_is_refused() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None

            class Impostor(asyncio.Protocol):
                def connection_made(self, transport: Any) -> None:
                    self.transport = transport
                    transport.write(wire.encode(wire.Challenge(wire.PROTOCOL_VERSION, b"n" * 32)))

                def data_received(self, data: bytes) -> None:
                    assert server.info is not None
                    self.transport.write(wire.encode(wire.Welcome(b"p" * 32, server.info)))

            loop = asyncio.get_running_loop()
            await loop.create_server(Impostor, "127.0.0.1", 9)
            info = wire.WorkerInfo("d0", 1, "127.0.0.1:9", server.info.engine)
            with pytest.raises(OSError, match="does not know the secret"):
                await ingress.connect(info)

    clock.run(main())


def test_leaving_a_stream_frees_its_kv_within_a_step() -> None:
    async def main() -> None:
        async with worker() as (server, engine, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            stream = connection.submit(request(max_tokens=1000))
            await stream.next()
            assert engine.load()[0].kv_used_blocks > 0
            stream.close()
            await asyncio.sleep(0.02)
            assert engine.load() == (RankLoad(0, 0, 0, 0, 8192),)
            assert server.num_requests == 0

    clock.run(main())


def test_leaving_ends_a_request_whose_engine_swallows_the_cancelling() -> None:
    async def main() -> None:
        async with worker() as (server, engine, ingress):
            assert server.info is not None
            closed = asyncio.Event()

            async def generate(leg: GenerateRequest) -> AsyncGenerator[TokenChunk]:
                try:
                    for token in range(leg.sampling.max_tokens):
                        with suppress(asyncio.CancelledError):
                            await asyncio.sleep(0.02)
                        yield TokenChunk(leg.request_id, [token])
                finally:
                    closed.set()

            engine.generate = generate  # type: ignore[method-assign]
            stream = (await ingress.connect(server.info)).submit(request(max_tokens=1000))
            await stream.next()
            stream.close()
            async with asyncio.timeout(0.1):
                await closed.wait()
            await asyncio.sleep(0.01)
            assert server.num_requests == 0

    clock.run(main())


def test_a_silent_worker_is_dead_after_the_heartbeat_timeout() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            stream = connection.submit(request(max_tokens=100_000, prompt=5))
            await stream.next()
            for peer in server.peers:
                peer.write = lambda frame: None  # type: ignore[method-assign]  # as a stopped process does
            began_s = asyncio.get_running_loop().time()
            with pytest.raises(LegFailed) as failure:
                while True:
                    await stream.next()
            assert failure.value.retryable
            assert 4.9 < asyncio.get_running_loop().time() - began_s < 5.2
            assert ingress.lost == [connection]

    clock.run(main())


def test_a_full_worker_refuses_at_once_as_overloaded() -> None:
    async def main() -> None:
        async with worker(max_queued_requests=2) as (server, _, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            held = [connection.submit(request(f"r{i}", max_tokens=1000)) for i in range(2)]
            third = connection.submit(request("r2"))
            with pytest.raises(LegFailed) as failure:
                await third.next()
            assert failure.value.overloaded
            for stream in held:
                stream.close()

    clock.run(main())


def test_a_draining_worker_finishes_what_it_has() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            running = asyncio.create_task(read_all(connection, request(max_tokens=50)))
            await asyncio.sleep(0.1)
            drained = asyncio.create_task(server.drain(10.0))
            await asyncio.sleep(0.01)
            assert connection.draining
            with pytest.raises(LegFailed, match="draining"):
                await read_all(connection, request("late"))
            assert len(await running) == 50
            assert await drained

    clock.run(main())


def test_an_engine_that_dies_fails_its_requests_as_retryable() -> None:
    async def main() -> None:
        async with worker() as (server, engine, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            stream = connection.submit(request(max_tokens=1000))
            await stream.next()
            engine.kill("out of memory")
            with pytest.raises(LegFailed, match="out of memory") as failure:
                while True:
                    await stream.next()
            assert failure.value.retryable
            assert await engine.died() == "out of memory"

    clock.run(main())


def test_what_arrives_between_two_pulls_is_one_chunk() -> None:
    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            connection = await ingress.connect(server.info)
            stream = connection.submit(request(max_tokens=10))
            await asyncio.sleep(1.0)
            chunk = await stream.next()
            assert len(chunk.token_ids) == 10
            assert chunk.finish_reason == "length"
            stream.close()

    clock.run(main())


def test_a_worker_of_104_ranks_can_say_who_it_is() -> None:
    sources = tuple(
        KVEventSource(
            rank, f"tcp://10.0.{rank // 8}.1:{20000 + rank}", f"tcp://10.0.{rank // 8}.1:{30000 + rank}", "s-1"
        )
        for rank in range(104)
    )

    async def main() -> None:
        async with worker() as (server, _, ingress):
            assert server.info is not None
            engine = msgspec.structs.replace(server.info.engine, attn_dp_size=104, kv_event_sources=sources)
            server.info = msgspec.structs.replace(server.info, engine=engine)
            assert len(wire.encode(wire.Welcome(b"", server.info))) > wire.MAX_HELLO_BYTES
            connection = await ingress.connect(server.info)
            assert connection.alive

    clock.run(main())


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x09\x81\xa4type\xa2\xff\xfe",  # a frame of msgpack whose text is no UTF-8
        b"\x00\x00\x00\x01\xc1",
    ],
)
def test_garbage_closes_the_connection(garbage: bytes, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with worker() as (server, _, _ingress):
            assert server.info is not None
            loop = asyncio.get_running_loop()
            host, _, port = server.info.address.rpartition(":")
            closed = loop.create_future()

            class Stranger(asyncio.Protocol):
                def connection_lost(self, exc: Exception | None) -> None:
                    closed.set_result(None)

            transport, _ = await loop.create_connection(Stranger, host, int(port))
            transport.write(garbage)
            await asyncio.wait_for(closed, 1.0)

    clock.run(main())
    assert "closing a connection that sent what no ingress sends" in caplog.text
