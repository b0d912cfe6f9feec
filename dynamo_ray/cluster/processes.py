"""Finds the processes that belong together, by a variable that every child inherits."""

from __future__ import annotations

import contextlib
import os

import psutil

VARIABLE = "DYNAMO_RAY_NODE"
"""Set in a node actor's environment: Ray session, application, worker and node rank."""
KILL_TIMEOUT_S = 10.0


def carrying(variable: str, value: str) -> list[psutil.Process]:
    """The live processes of this machine with that in their environment; of this user's only, unless that is root."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(variable) == value:
                found.append(process)
    return found


def kill_predecessors() -> None:
    """Kill what an earlier incarnation of this node actor left on this machine, and wait until it is gone.

    An actor that was killed cannot stop its engine's processes; most end with it, but not all at once.
    """
    mine = os.environ.get(VARIABLE)
    if not mine:
        return
    own = _family()
    left = [process for process in carrying(VARIABLE, mine) if process.pid not in own]
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    _, alive = psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)
    if alive:
        raise OSError(f"processes {[process.pid for process in alive]} of the last incarnation do not end")


def _family() -> set[int]:
    """This process, its ancestors and its descendants."""
    me = psutil.Process()
    return {me.pid, *(parent.pid for parent in me.parents()), *(child.pid for child in me.children(recursive=True))}
