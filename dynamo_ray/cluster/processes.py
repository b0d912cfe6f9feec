"""Finds the processes that belong to one node actor, by a variable that every child inherits."""

from __future__ import annotations

import os

import psutil

VARIABLE = "DYNAMO_RAY_NODE"
"""Set in a node actor's environment: Ray session, application, worker and node rank."""
KILL_TIMEOUT_S = 10.0


def kill_predecessors() -> None:
    """Kill what an earlier incarnation of this node actor left on this machine, and wait until it is gone.

    An actor that was killed cannot stop its engine's processes; most end with it, but not all at once.
    """
    mine = os.environ.get(VARIABLE)
    if not mine:
        return
    own = _family()
    left = [process for process in psutil.process_iter() if process.pid not in own and _variable_of(process) == mine]
    for process in left:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    _, alive = psutil.wait_procs(left, timeout=KILL_TIMEOUT_S)
    if alive:
        raise OSError(f"processes {[process.pid for process in alive]} of the last incarnation do not end")


def _family() -> set[int]:
    """This process, its ancestors and its descendants."""
    me = psutil.Process()
    return {me.pid, *(parent.pid for parent in me.parents()), *(child.pid for child in me.children(recursive=True))}


def _variable_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get(VARIABLE)
    except (psutil.Error, OSError):
        return None
