"""srt/entrypoints/engine.py: starts the processes, and waits until all ranks are ready."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any

import psutil
import zmq
from sglang.srt import runtime_context
from sglang.srt.managers.data_parallel_controller import (
    SCHEDULER_PIDS_ARG,
    run_data_parallel_controller_process,
    run_scheduler_process_with_init_pipe,
)
from sglang.srt.managers.detokenizer_manager import run_detokenizer_process
from sglang.srt.managers.scheduler import run_scheduler_process, start_schedulers
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import PortArgs, ServerArgs


@dataclass
class SchedulerInitResult:
    scheduler_infos: list[dict[str, Any]] = field(default_factory=list)
    all_child_pids: list[int] = field(default_factory=list)


class SubprocessWatchdog:
    """srt/utils/watchdog.py: ends this process by SIGQUIT when one of SGLang's ends."""

    def __init__(self, processes: list[Any]) -> None:
        self._processes = processes
        self._stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        sentinels = [process.sentinel for process in self._processes]
        while not self._stopped.is_set():
            if wait(sentinels, timeout=0.5) and not self._stopped.is_set():
                os.kill(os.getpid(), signal.SIGQUIT)
                return


def init_tokenizer_manager(
    server_args: ServerArgs, port_args: PortArgs, TokenizerManagerClass: Any = None
) -> tuple[TokenizerManager, None]:
    """The manager, and templates, which nobody uses here."""
    return (TokenizerManagerClass or TokenizerManager)(server_args, port_args), None


class Engine:
    init_tokenizer_manager_func: Callable[..., Any] = staticmethod(init_tokenizer_manager)
    run_scheduler_process_func: Callable[..., None] = staticmethod(run_scheduler_process)
    run_detokenizer_process_func: Callable[..., None] = staticmethod(run_detokenizer_process)

    def __init__(self, **kwargs: Any) -> None:
        self.server_args = ServerArgs(**kwargs)
        self.tokenizer_manager: TokenizerManager | None = None
        self.send_to_rpc: Any = None
        atexit.register(self.shutdown)
        runtime_context.publish(self.server_args)
        self.port_args = PortArgs.init_new(self.server_args)
        self._scheduler_init_result = SchedulerInitResult()
        processes, readers = self._start_schedulers()
        manager = None
        if self.server_args.node_rank == 0:
            detokenizer = multiprocessing.get_context("spawn").Process(
                target=self.run_detokenizer_process_func, args=(self.server_args, self.port_args)
            )
            detokenizer.start()
            processes.append(detokenizer)
            manager, _ = self.init_tokenizer_manager_func(self.server_args, self.port_args)
        self._wait_until_ready(readers, processes)
        if manager is not None:
            self.get_all_child_pids().append(processes[-1].pid)
            self._wait_for_ranks(manager, processes)
            manager._subprocess_watchdog = SubprocessWatchdog(processes)
            manager._subprocess_watchdog.start()
            self.send_to_rpc = zmq.Context().socket(zmq.DEALER)
            self.tokenizer_manager = manager
        self.loop = _event_loop()

    def get_all_child_pids(self) -> list[int]:
        return self._scheduler_init_result.all_child_pids

    def shutdown(self) -> None:
        """Ends every child of this process, as the real one does."""
        for process in psutil.Process().children(recursive=True):
            process.kill()

    def _start_schedulers(self) -> tuple[list[Any], list[Any]]:
        args, ports, main = self.server_args, self.port_args, self.run_scheduler_process_func
        pids = self._scheduler_init_result.all_child_pids
        if args.num_dp_ranks == 1:
            processes, readers = start_schedulers(args, ports, main)
            pids.extend(process.pid for process in processes)
            return processes, readers
        context = multiprocessing.get_context("spawn")
        reader, writer = context.Pipe(duplex=False)
        given = {
            "server_args": args,
            "port_args": ports,
            "pipe_writer": writer,
            "run_scheduler_process_func": main,
        }
        processes = []
        if args.version != "0.5.16":
            processes, readers = start_schedulers(args, ports, main, run_scheduler_process_with_init_pipe)
            given["prelaunched_schedulers"] = dict(enumerate(readers))
        controller = context.Process(target=run_data_parallel_controller_process, kwargs=given)
        controller.start()
        writer.close()
        processes.insert(0, controller)
        pids.extend(process.pid for process in processes)
        return processes, [reader]

    def _wait_until_ready(self, readers: list[Any], processes: list[Any]) -> None:
        for i, reader in enumerate(readers):
            while not reader.poll(timeout=0.2):
                self._check_alive(processes)
            try:
                info = reader.recv()
            except EOFError:
                raise _died(i, processes[i]) from None
            self._scheduler_init_result.scheduler_infos.append(info)
            self.get_all_child_pids().extend(info.get(SCHEDULER_PIDS_ARG, ()))

    def _wait_for_ranks(self, manager: TokenizerManager, processes: list[Any]) -> None:
        """Those of other nodes too."""
        missing = set(range(self.server_args.num_dp_ranks))
        while missing:
            while not manager.send_to_scheduler.poll(200):
                self._check_alive(processes)
            name, _ = manager.send_to_scheduler.recv_multipart()
            missing.discard(int(name))

    def _check_alive(self, processes: list[Any]) -> None:
        for i, process in enumerate(processes):
            if not process.is_alive():
                raise _died(i, process)


def _died(rank: int, process: Any) -> RuntimeError:
    process.join(timeout=10)
    return RuntimeError(
        f"Rank {rank} scheduler died during initialization (exit code: {process.exitcode}). "
        "If exit code is -9 (SIGKILL), a common cause is the OS OOM killer."
    )


def _event_loop() -> asyncio.AbstractEventLoop:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        loop = asyncio.new_event_loop()
        asyncio.set_event_loop(loop)
        return loop
