"""SGLang, in this process's event loop: its TokenizerManager in front of one scheduler process per GPU.

Processes: ours (front: request bookkeeping only), one scheduler per GPU, which runs the model, with attention DP a
controller that feeds them, and a detokenizer, idle unless structured output was asked for. Nodes beside the leader run
their schedulers only.

Sockets: on the node's address and on the ports that `backends.sglang_args` lays out. Two listen on every address:
torch's TCPStore of the rendezvous, and what NIXL's backend opens for its own handshakes.

Under `launcher: ray` the schedulers are Ray actors of the leader's, on all nodes, and the other nodes' share is empty.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import dataclasses
import logging
import multiprocessing
import signal
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import psutil

from backends import admission, arguments, failures, sglang_args, sglang_requests
from backends.cancel_scope import CancelScope, ScopeCancelled
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    KVEventSource,
    LaunchSpec,
    NodePlace,
    RankLoad,
    Role,
    TokenChunk,
)
from backends.output import OutputCapture
from backends.processes import DeathWatch, Launcher, WatchedPid, free_consecutive_ports, interface_of
from backends.sglang_control import Control
from backends.sglang_processes import (
    ADDRESS_VARIABLE,
    ignore_failure_signal,
    pack_in_actors,
    run_controller,
    run_detokenizer,
    run_scheduler,
)
from backends.startup import Startup, check_model

T = TypeVar("T")

log = logging.getLogger(__name__)

STOP_TIMEOUT_S = 10.0
MAX_LOGPROBS = 20
"""SGLang has no limit of its own; this is OpenAI's."""
WARM_UP_TOKENS = [10, 11, 12, 13]


@dataclass(eq=False)
class _Inside:
    """A request that SGLang has.

    Until its first output it may wait where SGLang neither aborts nor loses it: for the end of a pause, or of loading
    weights. So that step is awaited in a scope that is cancelled when the request is aborted or lost.
    """

    first: CancelScope = field(default_factory=CancelScope)
    has_output: bool = False
    lost: str | None = None


class SGLangEngine:
    """See `backends.engine.Engine`."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self._version = ""
        self._engine: Any = None
        self._vocab_size = 0
        self._block_size = 1
        self._inside: dict[str, _Inside] = {}
        self._startup = Startup()
        self._control: Control | None = None
        self._over: asyncio.Future[str] | None = None
        """Done, with the reason, when it has died or is stopped."""
        self._watch: DeathWatch | None = None
        self._launcher = Launcher(f"sglang-{spec.worker}")
        self._output: OutputCapture | None = None

    async def start(self) -> EngineInfo | None:
        return await self._startup.run(self._start())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        admission.check(request, self._check_serving(), self._vocab_size)
        admission.check_new(request, self._inside)
        inside = self._inside[request.request_id] = _Inside()
        finished = False
        try:
            async with aclosing(self._steps(request, inside)) as chunks:
                async for chunk in chunks:
                    finished = chunk.finish_reason is not None
                    yield chunk
        finally:
            if not finished:
                await self.abort(request.request_id)
            del self._inside[request.request_id]

    async def abort(self, request_id: str) -> None:
        inside = self._inside.get(request_id)
        if inside is None or self._engine is None or self._is_dead:
            return
        manager, rid = self._engine.tokenizer_manager, sglang_requests.rid_of(request_id)
        manager.abort_request(rid=rid)
        if not inside.has_output:
            if self._version == "0.5.16" and manager.is_pause:  # no scheduler may know of it, and none then answers
                manager.rid_to_state.pop(rid, None)
            inside.first.cancel()

    async def release(self, request_id: str) -> None:
        """A prefill leg that has ended here has handed its KV over; one that has not is given up."""
        await self.abort(request_id)

    def load(self) -> tuple[RankLoad, ...]:
        if self._engine is None or self.info is None:
            return ()
        snapshots = {each.dp_rank: each for each in self._engine.tokenizer_manager.load_snapshot_reader.read_all()}
        total = self.info.kv_total_blocks
        return tuple(rank_load(rank, snapshots.get(rank), self._block_size, total) for rank in range(self.spec.attn_dp))

    def last_lines(self) -> tuple[str, ...]:
        return () if self._output is None else self._output.last_lines()

    async def check_health(self) -> None:
        if self.spec.node_rank == 0:
            self._check_serving()
        elif not self._is_empty and (self._engine is None or self._is_dead):
            raise EngineError(f"this node's share of {self.spec.worker} is not running")

    async def died(self) -> str:
        assert self._watch is not None, "start() comes first"
        return await asyncio.shield(self._watch.death)

    async def control(self, command: Command) -> None:
        if self.spec.node_rank:
            return  # The leader's schedulers tell those of the other nodes.
        info = self._check_serving()
        if command.__struct_config__.tag not in info.controls:
            raise admission.no_such_control(command, info)
        assert self._control is not None
        await self._while_it_lives(self._control.carry_out(command))

    async def stop(self) -> None:
        await self._startup.end()
        await self._shut_down()

    async def _start(self) -> EngineInfo | None:
        try:
            import sglang
        except ImportError as error:
            raise EngineStartError(f"the sglang backend needs the package {error.name!r}") from error
        self._version = arguments.check_installed("sglang", self.spec.version, sglang.__version__)
        arguments.check("sglang", self._version, self.spec.engine_args, sglang_args.OWNED)
        self.spec = spec = _with_ports(self.spec)
        check_model(spec)
        if self._is_empty:
            self._watch = DeathWatch(())
            return None
        args = sglang_args.engine_args(spec, self._version)
        must, defaults = sglang_args.environment(spec, interface_of(spec.place.address))
        self._output = OutputCapture()
        must |= {ADDRESS_VARIABLE: spec.place.address, **self._output.environment}
        try:
            self._engine = await self._launcher.run(lambda: self._launch(args), _end, must, defaults)
            self._watch = DeathWatch(self.processes())
            if spec.launcher == "ray":
                self._watch_actors(self._watch)
            self._over = asyncio.get_running_loop().create_future()
            self._watch.death.add_done_callback(
                lambda death: self._lose_all(f"the SGLang engine died: {death.result()}")
            )
            if spec.node_rank:
                return None
            self._take_over()
            info = self._describe()
            keeps_weights = bool(spec.engine_args.get("enable_weights_cpu_backup"))
            self._control = Control(self._engine.tokenizer_manager, keeps_weights)
            await self._while_it_lives(self._warm_up())
            # What is there now stays: collecting it again and again would stop a rank for a fraction of a second.
            await self._engine.tokenizer_manager.freeze_gc()
        except BaseException as error:
            await self._shut_down()
            if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                raise
            lines = (*self.last_lines(), f"{type(error).__name__}: {error}")
            raise failures.start_error(lines, "sglang", spec.role) from None
        self.info = info
        return info

    def _launch(self, args: dict[str, Any]) -> Any:
        """Runs in the launcher's thread; returns when every rank of this node has loaded the model."""
        from sglang.srt.entrypoints import engine

        ignore_failure_signal()
        engine.run_data_parallel_controller_process = run_controller
        opened: list[Callable[[], Any]] = []

        def make_manager(server_args: Any, port_args: Any, *others: Any) -> Any:
            opened.append(lambda: _remove_files(port_args))
            made = engine.init_tokenizer_manager(server_args, port_args, *others)
            opened.extend(_opened_by(made[0]))
            return made

        ours = {
            "init_tokenizer_manager_func": staticmethod(make_manager),
            "run_scheduler_process_func": staticmethod(run_scheduler),
            "run_detokenizer_process_func": staticmethod(run_detokenizer),
        }
        if self._launcher.cancelled:
            raise EngineStartError("the start was given up")
        before = [child.pid for child in multiprocessing.active_children()]
        if self.spec.launcher == "ray":
            pack_in_actors()
        kind: Any = type("Engine", (_engine_class(self.spec),), ours)
        started = kind.__new__(kind)
        try:
            started.__init__(**args)
        except BaseException:
            atexit.unregister(started.shutdown)
            # Left to the garbage collector, a context can wait for ever for sockets that are collected after it.
            _close_each(opened)
            raise
        pids = started.get_all_child_pids()  # not quite: what some arguments start beside the ranks is not among them
        pids.extend(child.pid for child in multiprocessing.active_children() if child.pid not in (*before, *pids))
        if started.tokenizer_manager is not None:
            started.tokenizer_manager._subprocess_watchdog.stop()  # It would end this process; we watch ourselves.
        return started

    def _watch_actors(self, watch: DeathWatch) -> None:
        """Have SGLang wait for its actors, as long as this process lives; the first that ends is a death."""
        result, loop = self._engine._scheduler_init_result, asyncio.get_running_loop()
        wait = result.wait_for_completion if self._version == "0.5.16" else result.block_until_scheduler_exits

        def main() -> None:
            wait()
            with contextlib.suppress(RuntimeError):  # the loop has ended before
                loop.call_soon_threadsafe(watch.report, "a scheduler actor ended")

        threading.Thread(target=main, name="sglang-actors", daemon=True).start()

    def _take_over(self) -> None:
        """Have SGLang's front run in this loop, with the signal handlers of this process as they are."""
        on_main = threading.current_thread() is threading.main_thread()
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGQUIT)}
        self._engine.tokenizer_manager.auto_create_handle_loop()
        if on_main:
            for number, handler in before.items():
                asyncio.get_running_loop().remove_signal_handler(number)
                signal.signal(number, handler)
            ignore_failure_signal()  # Python does not know of it, and so has just undone it.

    def processes(self) -> list[WatchedPid]:
        """SGLang's on this node."""
        return [WatchedPid(pid) for pid in self._engine.get_all_child_pids()]

    def _describe(self) -> EngineInfo:
        spec, manager = self.spec, self._engine.tokenizer_manager
        scheduler = self._engine._scheduler_init_result.scheduler_infos[0]
        self._vocab_size = manager.model_config.vocab_size
        self._block_size, has_cache = _settled(self._engine, self._version)
        has_cache = has_cache and sglang_args.caches_prefixes(spec)
        return EngineInfo(
            backend="sglang",
            version=self._version,
            model=spec.model,
            role=spec.role,
            attn_dp_size=spec.attn_dp,
            block_size=self._block_size,
            max_model_len=scheduler["max_req_input_len"],
            kv_total_blocks=scheduler["max_total_num_tokens"] // self._block_size,
            handoff="none" if spec.role is Role.AGGREGATED else "concurrent",
            caches_prefixes=has_cache,
            kv_event_sources=self._event_sources() if has_cache else (),
            bootstrap_address=f"{spec.place.address}:{spec.place.ports[sglang_args.BOOTSTRAP]}"
            if spec.role is Role.PREFILL
            else None,
            max_logprobs=MAX_LOGPROBS,
            features=sglang_args.features(spec),
            loras=tuple(spec.loras),
            controls=sglang_args.controls(spec),
        )

    def _event_sources(self) -> tuple[KVEventSource, ...]:
        if not sglang_args.publishes_events(self.spec):
            return ()
        sources = []
        for rank in range(self.spec.attn_dp):
            ports = sglang_args.rank_ports(self.spec, sglang_args.node_of_rank(self.spec, rank))
            sources.append(
                KVEventSource(rank, ports.endpoint(0, rank), ports.endpoint(1, rank), f"sglang-{self._version}")
            )
        return tuple(sources)

    async def _warm_up(self) -> None:
        """Send every rank a request, as SGLang's own server does, so that no client waits for kernels to compile.

        A worker of two roles gets it without a counterpart: under that address nothing is transferred
        (disaggregation/utils.py, FAKE_BOOTSTRAP_HOST).
        """
        from sglang.srt.managers.io_struct import GenerateReqInput

        fields: dict[str, Any] = {}
        if self.spec.role is not Role.AGGREGATED:
            from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST

            fields["bootstrap_host"] = FAKE_BOOTSTRAP_HOST
        await asyncio.gather(
            *(
                self._warm_up_rank(
                    GenerateReqInput(
                        input_ids=WARM_UP_TOKENS,
                        sampling_params={"temperature": 0.0, "max_new_tokens": 8, "ignore_eos": True},
                        routed_dp_rank=rank if self.spec.attn_dp > 1 else None,
                        **fields | ({"bootstrap_room": rank} if fields else {}),
                    )
                )
                for rank in range(self.spec.attn_dp)
            )
        )

    async def _warm_up_rank(self, made: Any) -> None:
        async for _ in self._engine.tokenizer_manager.generate_request(made, None):
            pass

    @property
    def _is_empty(self) -> bool:
        return self.spec.launcher == "ray" and self.spec.node_rank > 0

    @property
    def _is_dead(self) -> bool:
        return self._watch is not None and self._watch.death.done()

    def _check_serving(self) -> EngineInfo:
        if self._engine is None or self.info is None:
            raise EngineError("the SGLang engine is not running")
        if self._watch is not None and self._watch.death.done():
            raise EngineError(f"the SGLang engine died: {self._watch.death.result()}")
        return self.info

    async def _steps(self, request: GenerateRequest, inside: _Inside) -> AsyncGenerator[TokenChunk]:
        """SGLang's outputs as chunks, its errors as ours."""
        from fastapi import HTTPException
        from sglang.srt.managers.io_struct import GenerateReqInput

        order = sglang_args.priority_order(self.spec)
        made = GenerateReqInput(**sglang_requests.arguments(request, self._version, order))
        local_cache, first = self._check_serving().caches_prefixes, True
        try:
            async with aclosing(self._engine.tokenizer_manager.generate_request(made, None)) as outputs:
                try:
                    with inside.first:
                        output = await anext(outputs)
                except ScopeCancelled:
                    if inside.lost is not None:
                        raise EngineError(inside.lost) from None
                    yield TokenChunk(request.request_id, [], "abort")
                    return
                inside.has_output = True
                while True:
                    if request.leg is not Role.PREFILL:
                        yield sglang_requests.chunk(request, output, first, local_cache)
                        first = False
                    elif output["meta_info"]["finish_reason"] is not None:
                        yield sglang_requests.prefill_chunk(request, output)
                    output = await anext(outputs)
        except StopAsyncIteration:
            return
        except ValueError as error:
            raise EngineError(f"SGLang refused the request: {error}", retryable=False) from None
        except HTTPException as error:
            retryable = error.status_code != HTTPStatus.BAD_REQUEST
            raise EngineError(f"SGLang lost the request: {error.detail}", retryable=retryable) from None

    async def _while_it_lives(self, work: Awaitable[T]) -> T:
        """What it returns; its processes may end, and then nobody answers it."""
        assert self._over is not None
        task = asyncio.ensure_future(work)
        try:
            waiting: list[asyncio.Future[Any]] = [task, self._over]
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineError(self._over.result())
            return task.result()
        finally:
            task.cancel()

    def _lose_all(self, reason: str) -> None:
        """End every request and command inside with an error: what would end it has ended."""
        if self._over is not None and not self._over.done():
            self._over.set_result(reason)
        for inside in self._inside.values():
            inside.lost = reason
            inside.first.cancel()
        if self._engine is None or self._engine.tokenizer_manager is None:
            return
        for state in list(self._engine.tokenizer_manager.rid_to_state.values()):
            finish = {"type": "abort", "message": reason, "status_code": HTTPStatus.SERVICE_UNAVAILABLE}
            state.out_list.append({"output_ids": [], "meta_info": {"finish_reason": finish}})
            state.finished = True
            state.event.set()

    async def _shut_down(self) -> None:
        if self._watch is not None:
            self._watch.close()
        self._lose_all("the SGLang engine was stopped")
        engine, self._engine = self._engine, None
        if engine is not None:
            manager = engine.tokenizer_manager
            if manager is not None:
                await asyncio.sleep(0)  # the requests inside learn of it
                for task in manager.asyncio_tasks:
                    task.cancel()
                await asyncio.gather(*manager.asyncio_tasks, return_exceptions=True)
            if self.spec.launcher == "ray":
                await asyncio.to_thread(engine.shutdown)  # Ends its actors, and then what ours would.
            await asyncio.to_thread(_end, engine)
        await self._launcher.finish()
        if self._output is not None:
            self._output.close()


def rank_load(rank: int, snapshot: Any, block_size: int, total_blocks: int) -> RankLoad:
    """A rank's load from SGLang's LoadSnapshot; zeros before it has made its first."""
    if snapshot is None:
        return RankLoad(rank, 0, 0, 0, total_blocks)
    waiting = snapshot.num_waiting_reqs  # those of all queues but one (load_inquirer.py)
    if snapshot.disaggregation is not None:
        waiting += snapshot.disaggregation.prefill_inflight_queue_reqs
    return RankLoad(rank, snapshot.num_running_reqs, waiting, -(-snapshot.num_used_tokens // block_size), total_blocks)


def _engine_class(spec: LaunchSpec) -> Any:
    if spec.launcher == "ray":
        from sglang.srt.ray.engine import RayEngine

        return RayEngine
    from sglang.srt.entrypoints.engine import Engine

    return Engine


def _with_ports(spec: LaunchSpec) -> LaunchSpec:
    """As it is, or for an engine on one node that was given no ports, with free ones."""
    if spec.num_nodes > 1 or spec.place.ports:
        return spec
    count = sglang_args.num_ports(spec)
    first = free_consecutive_ports(spec.place.address, count)
    return dataclasses.replace(spec, nodes=(NodePlace(spec.place.address, tuple(range(first, first + count))),))


def _settled(engine: Any, version: str) -> tuple[int, bool]:
    """The page size and whether there is a prefix cache, which SGLang decides by model and attention backend too."""
    if version == "0.5.16":
        return int(engine.server_args.page_size), not engine.server_args.disable_radix_cache
    from sglang.srt.runtime_context import get_memory, get_schedule

    return int(get_schedule().page_size), not get_memory().disable_radix_cache


def _end(engine: Any) -> None:
    """End an engine's processes and close what it opened here. SGLang's own shutdown ends every child of this process,
    another engine's too, and leaves its sockets and files."""
    atexit.unregister(engine.shutdown)
    processes = [process for pid in engine.get_all_child_pids() for process in _family(pid)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S)
    multiprocessing.active_children()  # Reaps those that have ended.
    if engine.tokenizer_manager is not None:
        _close_each([*_opened_by(engine.tokenizer_manager), lambda: engine.send_to_rpc.context.destroy(linger=0)])
    _close_each([engine.loop.close, lambda: _remove_files(engine.port_args)])


def _remove_files(port_args: Any) -> None:
    """Of its sockets, and where its ranks write their load, which SGLang leaves."""
    from sglang.srt.managers.load_snapshot import shm_path_for

    names = [name for name in dataclasses.asdict(port_args).values() if isinstance(name, str)]
    for path in (shm_path_for(port_args.instance_id), *(name for name in names if name.startswith("ipc://"))):
        Path(path.removeprefix("ipc://")).unlink(missing_ok=True)


def _opened_by(manager: Any) -> list[Callable[[], Any]]:
    """What closes what SGLang's TokenizerManager has open in this process."""
    bootstrap = getattr(manager, "bootstrap_server", None)
    return [
        *([] if bootstrap is None else [bootstrap.close]),
        lambda: manager.recv_from_detokenizer.context.destroy(linger=0),
        manager.load_snapshot_reader.close,
    ]


def _close_each(closing: Sequence[Callable[[], Any]]) -> None:
    for close in closing:
        try:
            close()
        except Exception as error:  # noqa: BLE001 - whatever a closed socket says, the next one is closed too
            log.info("SGLang left something open: %r", error)


def _family(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
