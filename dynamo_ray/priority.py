"""The priority at which the machine computes for us; Ray's own default puts it behind everything else there."""

from __future__ import annotations

import contextlib
import logging
import os

import psutil

log = logging.getLogger(__name__)

PRIORITY_ENVIRONMENT = {"RAY_worker_niceness": "0"}
"""Read by `ray start`, on every node. Without it all that Ray starts runs at nice 15: an engine's scheduler is one
thread that every token of its rank waits for, and the kernel lets anything else on its core go first."""


def restore_priority() -> None:
    """Have this process, and what it starts from now on, compute at the usual priority, where Ray has lowered it.

    For a Ray that was started without `PRIORITY_ENVIRONMENT`. Where the system does not let us, a warning says what to
    set.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, 0)
    if niceness <= 0:
        return
    try:
        for thread in psutil.Process().threads():  # each has its own on Linux, whatever the call's name says
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, thread.id, 0)
    except PermissionError:
        needed = " ".join(f"{name}={value}" for name, value in PRIORITY_ENVIRONMENT.items())
        log.warning("this process runs behind all others (nice %d): start Ray with %s", niceness, needed)
