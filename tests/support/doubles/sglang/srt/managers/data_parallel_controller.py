"""srt/managers/data_parallel_controller.py: with attention DP, the process between the manager and the schedulers.

Here the manager routes by itself. In 0.5.16 this process starts its node's schedulers; in 0.5.23 they are there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.scheduler import start_schedulers

SCHEDULER_PIDS_ARG = "scheduler_pids"


def run_data_parallel_controller_process(
    server_args: Any,
    port_args: Any,
    pipe_writer: Any,
    run_scheduler_process_func: Callable[..., None],
    prelaunched_schedulers: dict[int, Any] | None = None,
) -> None:
    if prelaunched_schedulers is None:
        processes, readers = start_schedulers(server_args, port_args, run_scheduler_process_func)
    else:
        processes, readers = [], list(prelaunched_schedulers.values())
    info, *_ = [reader.recv() for reader in readers]  # EOFError of one that failed ends this process too
    pipe_writer.send(info | {SCHEDULER_PIDS_ARG: [process.pid for process in processes]})
    threading.Event().wait()


def run_scheduler_process_with_init_pipe(
    run_scheduler_process_func: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """0.5.23: what the engine starts in place of the scheduler's own main."""
    run_scheduler_process_func(*arguments)
