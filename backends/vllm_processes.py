"""The mains of vLLM's processes: tied to our life, pinned to their cores, quoted when they fail, and soon gone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from backends.kv_publisher import pack_tokens
from backends.output import redirect_output
from backends.processes import die_with_parent
from backends.vllm_args import CORES_VARIABLE


@dataclass(frozen=True)
class Main:
    """A process's main. A new process reads it before the arguments, which import vLLM: 12 s of CPU, of which it would
    look for garbage for 2."""

    function: Callable[..., None]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        gc.enable()
        self.function(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., Main], tuple[Callable[..., None]]]:
        return _read_in_a_new_process, (self.function,)


def _read_in_a_new_process(function: Callable[..., None]) -> Main:
    gc.disable()
    return Main(function)


@contextmanager
def imported_for_good() -> Iterator[None]:
    """What is imported meanwhile is never looked through for garbage, which would take half a second of the event loop
    each time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def without_garbage(shutdown: Callable[..., None]) -> Callable[..., None]:
    """An engine core's, which looks for garbage in all it ever made, for 3 s; it all ends with the process anyhow."""

    def end(core: Any) -> None:
        gc.unfreeze = gc.freeze
        shutdown(core)

    return end


def pin_to_cores(rank: int) -> None:
    """Pin this thread, and the threads it will start, to the rank's cores."""
    shares = [share for share in os.environ.get(CORES_VARIABLE, "").split(";") if share]
    if shares:
        os.sched_setaffinity(0, [int(core) for core in shares[rank].split(",")])


def run_engine_core(*args: Any, dp_rank: int = 0, local_dp_rank: int = 0, **kwargs: Any) -> None:
    """Main of an engine core's process, in place of EngineCoreProc.run_engine_core."""
    die_with_parent()
    redirect_output()
    pin_to_cores(local_dp_rank)
    from vllm.distributed import kv_events
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    EngineCoreProc.shutdown = without_garbage(EngineCoreProc.shutdown)
    WorkerProc.worker_main = staticmethod(Main(run_worker))
    pack_tokens(kv_events)
    EngineCoreProc.run_engine_core(*args, dp_rank=dp_rank, local_dp_rank=local_dp_rank, **kwargs)


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """Main of the process that keeps data-parallel ranks in step, in place of DPCoordinatorProc.run_coordinator."""
    die_with_parent()
    redirect_output()
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    DPCoordinatorProc.run_coordinator(*args, **kwargs)


def run_worker(*args: Any, **kwargs: Any) -> None:
    """Main of one device's process, where a rank is several devices; in place of WorkerProc.worker_main.

    The thread that starts one may end before it (vLLM 0.33 starts them from a pool), so it is tied to the process
    alone: an engine core, or ours on a node that lends its devices to the leader. vLLM ties it too, but not while it
    waits for the other nodes.
    """
    redirect_output()
    threading.Thread(target=_exit_with_parent, name="exit-with-parent", daemon=True).start()
    from vllm.v1.executor.multiproc_executor import WorkerProc

    WorkerProc.worker_main(*args, **kwargs)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "run as the main of a child process"
    wait([parent.sentinel])
    os._exit(1)


def launch_with_our_mains() -> None:
    """Have vLLM start its processes with the functions above, from this process."""
    from vllm.v1.engine.coordinator import DPCoordinatorProc
    from vllm.v1.engine.core import EngineCoreProc
    from vllm.v1.executor.multiproc_executor import WorkerProc

    EngineCoreProc.run_engine_core = staticmethod(Main(run_engine_core))
    WorkerProc.worker_main = staticmethod(Main(run_worker))
    DPCoordinatorProc.run_coordinator = staticmethod(Main(run_coordinator))
