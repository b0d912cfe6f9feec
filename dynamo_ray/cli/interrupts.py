"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second for an immediate one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

FORCED_EXIT_CODE = 130


class Interrupts:
    """While the start runs, the first signal raises KeyboardInterrupt in the main thread; `wait` returns on it.

    During the end, a signal calls `force` and leaves the process at once.
    """

    def __init__(self) -> None:
        self.force: Callable[[], None] = lambda: None
        self._asked = threading.Event()
        self._waiting = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._receive)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait(self, seconds: float) -> bool:
        """Whether an end was asked for, at the latest after `seconds`."""
        self._waiting = True
        try:
            return self._asked.wait(seconds)
        finally:
            self._waiting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            os.write(2, b"ending at once\n")
            try:
                self.force()
            finally:
                os._exit(FORCED_EXIT_CODE)
        self._asked.set()
        if not self._waiting:
            raise KeyboardInterrupt
