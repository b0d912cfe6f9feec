"""Ctrl-C, SIGTERM and SIGHUP: the first asks for an orderly end, the second for an immediate one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

FORCED_EXIT_CODE = 130


class Interrupts:
    """The first signal raises KeyboardInterrupt in the main thread; after `defer` it only makes `wait` return.

    Any later one calls `force` and leaves the process at once.
    """

    def __init__(self) -> None:
        self.force: Callable[[], None] = lambda: None
        self._asked = threading.Event()
        self._deferred = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            ignored = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
            if not ignored:  # under nohup it outlives its terminal
                signal.signal(number, self._receive)

    def defer(self) -> None:
        """From now on somebody waits."""
        self._deferred = True

    def wait(self, seconds: float) -> bool:
        """Whether an end was asked for, at the latest after `seconds`."""
        return self._asked.wait(seconds)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os.write(2, b"ending at once\n")
            try:
                self.force()
            finally:
                os._exit(FORCED_EXIT_CODE)
        self._asked.set()
        if not self._deferred:
            raise KeyboardInterrupt
