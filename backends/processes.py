"""An engine's processes: started so that they never outlive us, watched, and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import spawn
from typing import Any, Protocol, TypeVar

import psutil

T = TypeVar("T")

PR_SET_PDEATHSIG = 1

_launching = threading.Lock()
"""Engines of one process start one after another: their environments differ, and a process has only one."""

LAST_WORDS_S = 1.0


class Process(Protocol):
    """What we need of multiprocessing's processes."""

    name: str

    @property
    def pid(self) -> int | None: ...
    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...


def die_with_parent() -> None:
    """Have the kernel kill this process when the *thread* that started it ends, however its process ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:  # It ended before the call above.
        os._exit(1)


def preparation_without_main(prepare: Callable[[str], dict[str, Any]], name: str) -> dict[str, Any]:
    """What a spawned process is told, but for our main module: it need not be importable a second time.

    Under Ray that is Ray's worker script, whose import costs each engine process about 0.1 GiB and a second.
    """
    data = prepare(name)
    return {key: data[key] for key in data if key not in ("init_main_from_name", "init_main_from_path")}


@contextmanager
def launch_environment(must: Mapping[str, str], defaults: Mapping[str, str]) -> Iterator[None]:
    """Hold the process's environment at `must`, and at `defaults` where it says nothing, while an engine starts."""
    with _launching:
        before, prepare = dict(os.environ), spawn.get_preparation_data
        spawn.get_preparation_data = partial(preparation_without_main, prepare)
        os.environ.update({name: value for name, value in defaults.items() if name not in before})
        os.environ.update(must)
        try:
            yield
        finally:
            spawn.get_preparation_data = prepare
            os.environ.clear()
            os.environ.update(before)


class Launcher:
    """One thread that starts an engine's processes and then lives as long as they may.

    The kernel ties a child's PR_SET_PDEATHSIG to the thread that started it, so a borrowed thread would not do.
    """

    def __init__(self, name: str) -> None:
        self.cancelled = False
        self._older_children: list[multiprocessing.process.BaseProcess] | None = None
        """Our child processes from before this launch, while it runs."""
        self._started = False
        self._finish = threading.Event()
        self._last_words: Callable[[], None] = lambda: None
        self._ended = asyncio.Event()
        self._name = name

    async def run(
        self, start: Callable[[], T], undo: Callable[[T], None], must: Mapping[str, str], defaults: Mapping[str, str]
    ) -> T:
        """Call `start` in the thread, in that environment, and return what it returns; its exceptions are raised here.

        What a start that fails has started is killed. If this is cancelled, so is what `start` had started or, where
        it was complete, undone.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def main() -> None:
            try:
                with launch_environment(must, defaults), self._killing_children_on_failure():
                    value = start()
            except BaseException as error:  # noqa: BLE001 - it is raised where start was asked for
                loop.call_soon_threadsafe(result.set_exception, error)
                loop.call_soon_threadsafe(self._ended.set)
                return
            loop.call_soon_threadsafe(result.set_result, value)
            del value
            self._finish.wait()
            self._last_words()
            loop.call_soon_threadsafe(self._ended.set)

        self._started = True
        threading.Thread(target=main, name=self._name, daemon=True).start()
        try:
            return await asyncio.shield(result)
        except asyncio.CancelledError:
            self.cancelled = True
            while not result.done():
                self._kill_children()
                await asyncio.sleep(0.05)
            if result.exception() is None:
                await asyncio.to_thread(undo, result.result())
            raise

    @contextmanager
    def _killing_children_on_failure(self) -> Iterator[None]:
        self._older_children = multiprocessing.active_children()
        try:
            yield
        except BaseException:
            self._kill_children()
            raise
        finally:
            self._older_children = None

    def _kill_children(self) -> None:
        """Kill what this launch has started; nothing while it waits for another, whose children those would be."""
        older = self._older_children
        if older is None:
            return
        for child in multiprocessing.active_children():
            if child not in older:
                child.kill()
                child.join()

    async def finish(self, last_words: Callable[[], None] = lambda: None) -> None:
        """End the thread, after `last_words` in it; returns without it when they take longer than a second."""
        self._last_words = last_words
        self._finish.set()
        if self._started:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), LAST_WORDS_S)


class DeathWatch:
    """Completes `death` with a reason as soon as one of the processes ends; by their sentinels, within milliseconds."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes = {process.sentinel: process for process in processes}
        self.death: asyncio.Future[str] = self._loop.create_future()
        for sentinel in self._processes:
            self._loop.add_reader(sentinel, self._ended, sentinel)

    def report(self, reason: str) -> None:
        """A death that somebody else has seen."""
        if not self.death.done():
            self.death.set_result(reason)

    def close(self) -> None:
        for sentinel in self._processes:
            self._loop.remove_reader(sentinel)
        self._processes = {}

    def _ended(self, sentinel: int) -> None:
        process = self._processes.pop(sentinel)
        self._loop.remove_reader(sentinel)
        self.report(f"{process.name} (pid {process.pid}) {exit_words(process.exitcode)}")


class WatchedPid:
    """A process that another of the engine's processes may have started, so that only its number is known."""

    exitcode = None

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.sentinel = -1
        self.sentinel = os.pidfd_open(pid)
        self.name = "its process"
        with contextlib.suppress(psutil.Error):
            self.name = psutil.Process(pid).name()

    def __del__(self) -> None:
        if self.sentinel >= 0:
            os.close(self.sentinel)


def exit_words(code: int | None) -> str:
    """An exit code for a person; None is a process that just ended and has not been waited for."""
    if code is None:
        return "ended"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def interface_of(address: str) -> str | None:
    """The network interface that has this address; None when none has."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return None


def consecutive_ports(ports: tuple[int, ...], count: int) -> int | None:
    """The first of `count` consecutive ports among `ports`; None when there is no such run."""
    given = set(ports)
    return next((port for port in ports if all(port + i in given for i in range(count))), None)


def free_consecutive_ports(address: str, count: int) -> int:
    """The first of `count` consecutive ports that are free now, for an engine that was given none."""
    for _ in range(100):
        with socket.socket() as first:
            first.bind((address, 0))
            port: int = first.getsockname()[1]
        if port + count <= 65536 and all(_is_free(address, port + i) for i in range(count)):
            return port
    raise OSError(f"no {count} consecutive free ports on {address}")


def _is_free(address: str, port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
