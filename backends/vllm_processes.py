"""The mains of vLLM's processes: tied to our life, pinned to their cores, and quoted when they fail."""

from __future__ import annotations

import os
from typing import Any

from backends.output import redirect_output
from backends.processes import die_with_parent
from backends.vllm_args import CORES_VARIABLE


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
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core(*args, dp_rank=dp_rank, local_dp_rank=local_dp_rank, **kwargs)


def run_coordinator(*args: Any, **kwargs: Any) -> None:
    """Main of the process that keeps data-parallel ranks in step, in place of DPCoordinatorProc.run_coordinator."""
    die_with_parent()
    redirect_output()
    from vllm.v1.engine.coordinator import DPCoordinatorProc

    DPCoordinatorProc.run_coordinator(*args, **kwargs)


def launch_with_our_mains() -> None:
    """Have vLLM start its processes with the two functions above; only in this process, not in those it starts."""
    from vllm.v1.engine.coordinator import DPCoordinatorProc
    from vllm.v1.engine.core import EngineCoreProc

    EngineCoreProc.run_engine_core = staticmethod(run_engine_core)
    DPCoordinatorProc.run_coordinator = staticmethod(run_coordinator)
