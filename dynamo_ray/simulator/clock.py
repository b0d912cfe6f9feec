"""Virtual time and a network in memory: an event loop on which waiting costs nothing and every run is the same."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_FIRST_PORT = 20_000


class Deadlock(RuntimeError):
    """Every task waits for another and no timer is set: on a real clock this would hang for ever."""


class _Selector(selectors.DefaultSelector):
    """Instead of waiting, moves the clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Deadlock("every task waits and no timer is set")
            self.now_s += max(0.0, timeout)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only when nothing is left to do at the present moment.

    TCP servers and connections made on it live in memory: bytes arrive in order, in the next iteration.
    """

    def __init__(self) -> None:
        self._clock = _Selector()
        self._servers: dict[tuple[str, int], _Server] = {}
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call it here and now: a thread's end is nothing that virtual time could wait for."""
        done: asyncio.Future[T] = self.create_future()
        try:
            done.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            done.set_exception(error)
        return done

    async def create_server(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        """Listen in memory; port 0 takes the next free one."""
        bound = port or next(p for p in range(_FIRST_PORT, 1 << 16) if (host, p) not in self._servers)
        if (host, bound) in self._servers:
            raise OSError(f"{host}:{bound} is already in use")
        self._servers[host, bound] = _Server(self, (host, bound), protocol_factory)
        return self._servers[host, bound]

    async def create_connection(self, protocol_factory: Any, host: Any = None, port: Any = None, **_: Any) -> Any:
        """Connect in memory.

        Raises:
            ConnectionRefusedError: Nobody listens there.
        """
        server = self._servers.get((host, port))
        if server is None:
            raise ConnectionRefusedError(f"nobody listens on {host}:{port}")
        near, far = MemoryTransport(self, protocol_factory()), MemoryTransport(self, server.factory())
        near.peer, far.peer = far, near
        far.protocol.connection_made(far)
        near.protocol.connection_made(near)
        return near, near.protocol


class _Socket:
    def __init__(self, address: tuple[str, int]) -> None:
        self._address = address

    def getsockname(self) -> tuple[str, int]:
        return self._address


class _Server:
    """What `create_server` returns: as much of asyncio.Server as servers use."""

    def __init__(
        self, loop: VirtualTimeLoop, address: tuple[str, int], factory: Callable[[], asyncio.Protocol]
    ) -> None:
        self._loop, self._address = loop, address
        self.factory = factory
        self.sockets = [_Socket(address)]

    def close(self) -> None:
        self._loop._servers.pop(self._address, None)

    async def wait_closed(self) -> None:
        pass


class MemoryTransport(asyncio.Transport):
    """One end of a connection in memory; closing either end closes both, as a killed process does."""

    def __init__(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol) -> None:
        super().__init__()
        self._loop = loop
        self.protocol: Any = protocol
        self.peer: MemoryTransport | None = None
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing and self.peer is not None:
            self._loop.call_soon(self.peer._arrive, bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def is_closing(self) -> bool:
        return self._closing

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        protocol: asyncio.BaseProtocol = self.protocol
        return protocol

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self._end()
        if self.peer is not None:
            self._loop.call_soon(self.peer._end)

    abort = close

    def _arrive(self, data: bytes) -> None:
        if not self._closing:
            self.protocol.data_received(data)

    def _end(self) -> None:
        if not self._closing:
            self._closing = True
            self._loop.call_soon(self.protocol.connection_lost, None)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to completion in virtual time, starting at 0.

    Raises:
        Deadlock: The coroutine can never finish.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
