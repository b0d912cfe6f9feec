"""Shows a start as it happens: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dynamo_ray.request.membership import Phase, WorkerStatus

_COLOURS = {Phase.READY: "green", Phase.BACKOFF: "red", Phase.STOPPED: "dim"}


def table(statuses: tuple[WorkerStatus, ...], now_s: float) -> Table:
    """One row a worker; the time is how long it has been in its phase."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("worker", "role", "phase", "for", "epoch", "detail"):
        made.add_column(column, overflow="fold" if column == "detail" else "ellipsis")
    for status in statuses:
        made.add_row(
            status.worker,
            status.role.value,
            Text(status.phase.value, style=_COLOURS.get(status.phase, "yellow")),
            f"{max(0.0, now_s - status.since_unix_s):.0f} s",
            str(status.epoch),
            Text(status.detail),  # an engine's words, whose brackets are not rich's
        )
    return made


class Progress:
    """Use as a context; `step` and `workers` may be called any time inside.

    Args:
        started_s: what elapsed seconds are counted from, in Unix time.
    """

    def __init__(self, started_s: float) -> None:
        self._console = Console(highlight=False)
        self._started_s = started_s
        self._step = ""
        self._statuses: tuple[WorkerStatus, ...] = ()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pause()

    def pause(self) -> None:
        """Leave the terminal to other output."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def step(self, line: str) -> None:
        self._step = line
        if self._live is None:
            self._line(line)

    def workers(self, statuses: tuple[WorkerStatus, ...]) -> None:
        before = {status.worker: (status.phase, status.detail) for status in self._statuses}
        self._statuses = statuses
        if self._live is None:
            for status in statuses:
                if before.get(status.worker) != (status.phase, status.detail):
                    self._line(f"{status.worker}: {status.phase.value}, {status.detail}".rstrip(", "))

    def _line(self, line: str) -> None:
        print(f"[{time.time() - self._started_s:6.1f} s] {line}", file=sys.stdout, flush=True)

    def _render(self) -> Group:
        now_s = time.time()
        head = Text(f"[{now_s - self._started_s:6.1f} s] {self._step}", style="bold")
        return Group(head, table(self._statuses, now_s)) if self._statuses else Group(head)
