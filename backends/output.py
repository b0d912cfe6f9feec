"""What an engine's processes write, passed on to our own log, and its last lines kept for whoever must explain an end.

A named pipe: every process of the engine that calls `redirect_output`, and every one that those start, writes into it
in place of what it had as stdout and stderr. Nothing is kept on disk, and what is kept in memory is bounded.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from io import TextIOWrapper
from pathlib import Path

VARIABLE = "DYNAMO_RAY_ENGINE_OUTPUT"
"""Where an engine's process finds the pipe."""
NUM_KEPT = 200
MAX_LINE_BYTES = 4096
"""Of a longer line the beginning is kept, or all of it in parts while it has no end."""
PIPE_BYTES = 1 << 20
"""A process that writes more than this while ours computes waits for it."""
F_SETPIPE_SZ = 1031
CHUNK_BYTES = 1 << 16

_CONTROL = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


class OutputCapture:
    """Reads what an engine's processes write until it is closed; close it when they have ended.

    Args:
        out: the file descriptor that everything is passed on to.
    """

    def __init__(self, out: int = 2) -> None:
        self._out = out
        self._folder = tempfile.mkdtemp(prefix="engine-output-")
        self._path = Path(self._folder, "pipe")
        os.mkfifo(self._path, 0o600)
        # Read and write: there is no end of file while a process has not yet opened it, or none is left.
        self._pipe = os.open(self._path, os.O_RDWR | os.O_NONBLOCK)
        with contextlib.suppress(OSError):  # a user may have used up what is allowed: the default then has to do
            fcntl.fcntl(self._pipe, F_SETPIPE_SZ, PIPE_BYTES)
        self._wake, self._waker = os.pipe()
        self._lines: deque[str] = deque(maxlen=NUM_KEPT)
        self._rest = b""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._pump, name="engine-output", daemon=True)
        self._thread.start()

    @property
    def environment(self) -> Mapping[str, str]:
        """What the engine's processes must find in their environment."""
        return {VARIABLE: str(self._path)}

    def last_lines(self, count: int = NUM_KEPT) -> tuple[str, ...]:
        """The newest lines, oldest first, with everything that has been written by now; also after `close`."""
        with self._lock:
            self._read()
            lines = [*self._lines, *([_text(self._rest)] if self._rest else [])]
        return tuple([line for line in lines if line][-count:])

    def close(self) -> None:
        """Stop reading; safe to call twice. A process that still writes gets a broken pipe."""
        if self._waker < 0:
            return
        os.write(self._waker, b"x")
        self._thread.join()
        with self._lock:
            self._read()
            for descriptor in (self._pipe, self._wake, self._waker):
                os.close(descriptor)
            self._pipe = self._waker = -1
        shutil.rmtree(self._folder, ignore_errors=True)

    def _pump(self) -> None:
        while True:
            ready, _, _ = select.select([self._pipe, self._wake], [], [])
            if self._wake in ready:
                return
            with self._lock:
                self._read()

    def _read(self) -> None:
        """Take what there is, without waiting for more."""
        while self._pipe >= 0:
            try:
                chunk = os.read(self._pipe, CHUNK_BYTES)
            except BlockingIOError:
                return
            with contextlib.suppress(OSError):  # our own log may be gone; the engine's end is still explained
                os.write(self._out, chunk)
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            self._lines.extend(_text(line[:MAX_LINE_BYTES]) for line in whole)
            while len(self._rest) > MAX_LINE_BYTES:
                self._lines.append(_text(self._rest[:MAX_LINE_BYTES]))
                self._rest = self._rest[MAX_LINE_BYTES:]


def redirect_output() -> None:
    """Write this process's stdout and stderr where its environment says; what it starts later inherits that.

    The first statement of an engine's process. Without a reader, or started otherwise, it changes nothing.
    """
    path = os.environ.get(VARIABLE)
    if path is None:
        return
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return
    os.set_blocking(pipe, True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # its last words must not stay in a buffer when it is killed
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    os.close(pipe)


def _text(line: bytes) -> str:
    """A line as a terminal would have shown it in the end: without colours, and of a progress bar its last state."""
    shown = line.decode("utf-8", "replace").rstrip("\r").rsplit("\r", 1)[-1]
    return _CONTROL.sub("", shown).rstrip()
