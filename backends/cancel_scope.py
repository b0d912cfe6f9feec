"""What a task awaits, for others to cancel: as asyncio.timeout does it at a time, but by hand and at once."""

from __future__ import annotations

import asyncio
from types import TracebackType


class ScopeCancelled(Exception):
    """Somebody has cancelled the scope."""


class CancelScope:
    """`with scope:` around awaits of one task, one block after another; `cancel` ends them, and the block raises
    ScopeCancelled.

    A task that is itself cancelled meanwhile raises CancelledError. Before and after the block `cancel` does nothing.
    It costs no task: work that were one would begin only behind all that arrived with it.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._num_cancels = 0
        self._cancelled = False

    def __enter__(self) -> CancelScope:
        self._task = asyncio.current_task()
        assert self._task is not None, "a scope is of a task"
        self._num_cancels, self._cancelled = self._task.cancelling(), False
        return self

    def cancel(self) -> None:
        if self._task is not None and not self._cancelled:
            self._cancelled = True
            self._task.cancel()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self._task = self._task, None
        assert task is not None
        if self._cancelled and task.uncancel() <= self._num_cancels and kind is asyncio.CancelledError:
            raise ScopeCancelled from error
