"""TensorRT-LLM, in this process: its LLM in front of one Ray actor per GPU, in the worker's own placement group.

Those actors are TensorRT-LLM's. They take the GPUs of the group's bundles, on all nodes; the leader's process has none
and takes every request, and the other nodes' share is empty. Their first, on the leader's node, talks to the LLM over a
local socket. Its calls that wait for an answer run in threads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from backends import admission, arguments, failures, trtllm_args, trtllm_objects, trtllm_ray, trtllm_requests
from backends.cancel_scope import CancelScope, ScopeCancelled
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    LaunchSpec,
    RankLoad,
    Role,
    TokenChunk,
)
from backends.processes import Launcher
from backends.startup import Startup
from backends.trtllm_reports import Reports

T = TypeVar("T")

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Between two looks at statistics and KV events."""
SILENT_S = 1.0
WATCH_S = 0.25
"""Between two questions to the ranks whether they live."""
KILL_S = 0.1
STATS_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
TRANSFER_TIMEOUT_MS = 60_000
"""TensorRT-LLM's own: so long prefill keeps KV that nobody fetches."""
WARM_UP_TOKENS = [10, 11, 12, 13]
EXECUTOR = {"1.2": "tensorrt_llm.executor.ray_executor", "1.3": "tensorrt_llm.executor.ray.executor"}
"""Where its Ray executor is."""


@dataclass(eq=False)
class _Inside:
    """A request that TensorRT-LLM has."""

    request: GenerateRequest
    rank: int
    output: Any
    """Its RequestOutput: an asynchronous iterator of itself, a step each."""
    step: CancelScope = field(default_factory=CancelScope)
    """In which each is awaited; cancelled when the request is lost."""
    num_tokens: int = 0
    lost: str | None = None


class _Model(NamedTuple):
    """What its config.json tells."""

    vocab_size: int
    max_positions: int


class TensorRTLLMEngine:
    """See `backends.engine.Engine`."""

    def __init__(self, spec: LaunchSpec, placement_group: Callable[[], Any] = trtllm_ray.current_group) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self._placement_group = placement_group
        self._version = ""
        self._llm: Any = None
        self._model: _Model | None = None
        self._workers: tuple[Any, ...] = ()
        self._reports = Reports(spec.attn_dp)
        self._inside: dict[str, _Inside] = {}
        self._held: dict[str, Any] = {}
        """Outputs of prefill legs that have handed over, until the decode side has their KV."""
        self._startup = Startup()
        self._death: asyncio.Future[str] | None = None
        self._tasks: set[asyncio.Future[Any]] = set()
        self._launcher = Launcher(f"trtllm-{spec.worker}")

    async def start(self) -> EngineInfo | None:
        return await self._startup.run(self._start())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        info = self._check_serving()
        assert self._model is not None
        admission.check(request, info, self._model.vocab_size)
        admission.check_new(request, self._inside)
        rank = self._least_loaded() if request.dp_rank is None else request.dp_rank
        inside = _Inside(request, rank, self._submit(request, rank))
        self._inside[request.request_id] = inside
        handed_over = False
        try:
            async with aclosing(self._chunks(inside)) as chunks:
                async for chunk in chunks:
                    handed_over = chunk.handoff is not None
                    yield chunk
        finally:
            del self._inside[request.request_id]
            if not inside.output.finished or (request.leg is Role.PREFILL and not handed_over):
                self._give_up(inside.output)

    async def abort(self, request_id: str) -> None:
        if (inside := self._inside.get(request_id)) is not None:
            self._give_up(inside.output)

    async def release(self, request_id: str) -> None:
        await self.abort(request_id)
        if (output := self._held.pop(request_id, None)) is not None:
            self._give_up(output)

    def load(self) -> tuple[RankLoad, ...]:
        """Requests as they are here, every one of them being; blocks as TensorRT-LLM told last."""
        return () if self.info is None else tuple(self._rank_load(rank) for rank in range(self.spec.attn_dp))

    def last_lines(self) -> tuple[str, ...]:
        """None: what its actors write, Ray keeps; a start that fails raises what they said."""
        return ()

    async def check_health(self) -> None:
        if self.spec.node_rank == 0:
            self._check_serving()
        elif self._death is None:
            raise EngineError(f"this node's share of {self.spec.worker} is not running")

    async def died(self) -> str:
        assert self._death is not None, "start() comes first"
        return await asyncio.shield(self._death)

    async def control(self, command: Command) -> None:
        """There is none: its workers take new weights as handles to GPU memory only, and wake without forgetting what
        their caches held."""
        if self.spec.node_rank == 0:
            raise admission.no_such_control(command, self._check_serving())

    async def stop(self) -> None:
        await self._startup.end()
        await self._shut_down()

    def workers(self) -> tuple[Any, ...]:
        """Handles of its actors, in rank order."""
        return self._workers

    async def _start(self) -> EngineInfo | None:
        spec = self.spec
        trtllm_args.check_layout(spec)
        if spec.node_rank:
            self._death = asyncio.get_running_loop().create_future()
            return None
        group = self._placement_group() if spec.bundles else None
        must, defaults = trtllm_args.environment(spec)
        os.environ["TLLM_DISABLE_MPI"] = must["TLLM_DISABLE_MPI"]  # it asks for it whenever it runs (mpi_disabled)
        try:
            self._model = _model_of(spec)
            self._llm = await self._launched(self._launcher.run(lambda: self._launch(group), _end, must, defaults))
            self._death = asyncio.get_running_loop().create_future()
            self._spawn(self._watch())
            self.info = info = await self._while_it_lives(self._begun())
        except BaseException as error:
            await self._shut_down()
            if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                raise
            raise failures.start_error(f"{type(error).__name__}: {error}".splitlines(), "trtllm", spec.role) from None
        self._spawn(self._poll())
        return info

    async def _launched(self, running: Any) -> Any:
        """What the launch returns; where this is cancelled meanwhile, its workers are killed until it gives up."""
        launch = asyncio.ensure_future(running)
        try:
            return await asyncio.shield(launch)
        except asyncio.CancelledError:
            launch.cancel()
            while not launch.done():
                self._kill_workers()
                await asyncio.wait([launch], timeout=KILL_S)
            if not launch.cancelled() and launch.exception() is None:
                self._llm = launch.result()
            raise

    def _launch(self, group: Any) -> Any:
        """Runs in the launcher's thread, where no event loop is: TensorRT-LLM 1.2 makes no workers beside one."""
        spec = self.spec
        try:
            with trtllm_ray.without_node_variables():
                import tensorrt_llm
        except ImportError as error:
            raise EngineStartError(f"the trtllm backend needs the package {error.name!r}") from error
        self._version = version = arguments.check_installed("trtllm", spec.version, tensorrt_llm.__version__)
        arguments.check("trtllm", version, spec.engine_args, trtllm_args.OWNED)
        args = trtllm_args.engine_args(spec, version)
        if spec.bundles:
            if group is None:
                raise EngineStartError("launcher: TensorRT-LLM needs the worker's placement group, and this is in none")
            args["ray_placement_config"] = {
                "placement_groups": [group],
                "placement_bundle_indices": [trtllm_args.bundle_indices(spec)],
            }
        if version == "1.2":
            trtllm_ray.restore_old_names()
        with trtllm_ray.without_node_variables(), self._seeing_workers(import_module(EXECUTOR[version]).RayExecutor):
            return tensorrt_llm.LLM(**args)

    @contextmanager
    def _seeing_workers(self, executor: Any) -> Iterator[None]:
        """Know its actors as soon as they are made: a start that is given up must end them."""
        original = executor.create_workers

        def create_workers(made: Any, *args: Any, **kwargs: Any) -> None:
            if self._launcher.cancelled:
                raise EngineStartError("the start was given up")
            try:
                original(made, *args, **kwargs)
            finally:
                self._workers = tuple(getattr(made, "workers", None) or ())  # none where it found no placement

        executor.create_workers = create_workers
        try:
            yield
        finally:
            executor.create_workers = original

    async def _while_it_lives(self, work: Awaitable[T]) -> T:
        """What it returns; a rank may end, and then nobody answers it."""
        assert self._death is not None
        task = asyncio.ensure_future(work)
        waiting: list[asyncio.Future[Any]] = [task, self._death]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise EngineStartError(f"TensorRT-LLM died while it started: {self._death.result()}")
            return task.result()
        finally:
            task.cancel()

    async def _begun(self) -> EngineInfo:
        await self._warm_up()
        return await self._describe()

    async def _warm_up(self) -> None:
        """Send every rank a request, so that no client waits for kernels to compile; statistics begin with it."""
        requests = [
            GenerateRequest(f"warm-up-{rank}", WARM_UP_TOKENS, trtllm_requests.WARM_UP, dp_rank=rank)
            for rank in range(self.spec.attn_dp)
        ]
        await asyncio.gather(*(self._submit(each, each.dp_rank or 0).aresult() for each in requests))

    async def _describe(self) -> EngineInfo:
        spec, llm, version = self.spec, self._llm, self._version
        assert self._model is not None
        block_size = llm.args.kv_cache_config.tokens_per_block
        total = await self._cache_size()
        limit = llm.args.max_seq_len or self._model.max_positions
        publishes = trtllm_args.publishes_events(spec)
        sources = self._reports.open(spec.place.address, block_size) if publishes else ()
        return EngineInfo(
            backend="trtllm",
            version=version,
            model=spec.model,
            role=spec.role,
            attn_dp_size=spec.attn_dp,
            block_size=block_size,
            max_model_len=min(limit, total * block_size),
            kv_total_blocks=total,
            handoff="none" if spec.role is Role.AGGREGATED else "sequential",
            caches_prefixes=trtllm_args.caches_prefixes(spec),
            kv_event_sources=sources,
            max_logprobs=trtllm_args.MAX_LOGPROBS,
            features=trtllm_args.features(spec, version),
            loras=tuple(spec.loras),
        )

    async def _cache_size(self) -> int:
        """In blocks, of one rank; TensorRT-LLM tells it with its first iterations."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + STATS_TIMEOUT_S
        while self._reports.kv_total_blocks is None:
            if loop.time() > deadline:
                raise EngineStartError(f"TensorRT-LLM told no statistics within {STATS_TIMEOUT_S:.0f} s of its start")
            await asyncio.to_thread(self._reports.take_statistics, self._llm._executor)
            await asyncio.sleep(POLL_S)
        return self._reports.kv_total_blocks

    async def _watch(self) -> None:
        """Its executor does not see a worker die, and would wait for ever for what that one does not send."""
        assert self._death is not None
        while True:
            try:
                await asyncio.gather(*(worker.__ray_ready__.remote() for worker in self._workers))
                if self._llm._executor is None or self._llm._executor.workers is None:
                    raise RuntimeError("TensorRT-LLM shut its executor down")
            except Exception as error:  # noqa: BLE001 - whatever Ray says of an actor that is gone
                self._die(f"one of its ranks is gone: {trtllm_objects.first_line(error)}")
                return
            await asyncio.sleep(WATCH_S)

    def _die(self, reason: str) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        self._lose_all(f"the TensorRT-LLM engine died: {reason}")

    async def _poll(self) -> None:
        reports, executor = self._reports, self._llm._executor
        while True:
            try:
                await asyncio.to_thread(reports.take_statistics, executor)
                if reports.publishes:
                    reports.publish(await asyncio.to_thread(reports.fetch_events, executor))
            except Exception as error:  # noqa: BLE001 - the engine may be dying; who watches it says so
                log.info("TensorRT-LLM tells nothing of itself: %s", trtllm_objects.first_line(error))
                await asyncio.sleep(SILENT_S)
            await asyncio.sleep(POLL_S)

    def _rank_load(self, rank: int) -> RankLoad:
        """TensorRT-LLM tells of an iteration, and nothing when the last request has left."""
        assert self.info is not None
        inside = [each for each in self._inside.values() if each.rank == rank]
        running = sum(each.num_tokens > 0 for each in inside)
        used = self._reports.kv_used_blocks(rank)
        if used is None:  # 1.2 tells of the first rank only
            size = self.info.block_size
            used = sum(-(-(len(each.request.token_ids) + each.num_tokens) // size) for each in inside)
        elif not inside and not self._held:
            used = 0
        return RankLoad(rank, running, len(inside) - running, used, self.info.kv_total_blocks)

    def _least_loaded(self) -> int:
        """Chosen here and not by TensorRT-LLM, so that it is known where every request is."""
        counts = [0] * self.spec.attn_dp
        for each in self._inside.values():
            counts[each.rank] += 1
        return counts.index(min(counts))

    def _check_serving(self) -> EngineInfo:
        if self._death is not None and self._death.done():
            raise EngineError(f"the TensorRT-LLM engine died: {self._death.result()}")
        if self._llm is None or self.info is None:
            raise EngineError("the TensorRT-LLM engine is not running")
        return self.info

    def _submit(self, request: GenerateRequest, rank: int) -> Any:
        return trtllm_objects.submit(self._llm, request, rank, self.spec, self._version)

    async def _chunks(self, inside: _Inside) -> AsyncGenerator[TokenChunk]:
        request = inside.request
        reader = trtllm_requests.OutputReader(request, trtllm_args.caches_prefixes(self.spec))
        try:
            while not inside.output.finished:
                await self._step(inside)
                if request.leg is Role.PREFILL:
                    continue
                chunk = reader.chunk(inside.output)
                if chunk is None:
                    continue
                inside.num_tokens += len(chunk.token_ids)
                yield chunk
                if chunk.finish_reason is not None:
                    return
            if request.leg is Role.PREFILL:
                yield self._prefill_chunk(inside)
                return
        except EngineError:
            raise
        except Exception as error:  # noqa: BLE001 - likewise
            raise self._lost(request, error) from None
        raise EngineError("TensorRT-LLM ended a request without a reason")

    async def _step(self, inside: _Inside) -> None:
        """Wait for its next output; ends with what `_lose_all` says when there will be none."""
        if inside.lost is not None:  # while nobody waited for it
            raise EngineError(inside.lost)
        with contextlib.suppress(ScopeCancelled), inside.step:
            await anext(inside.output)
        if inside.lost is not None:
            raise EngineError(inside.lost)

    def _prefill_chunk(self, inside: _Inside) -> TokenChunk:
        request, output = inside.request, inside.output
        (completion,) = output.outputs
        if trtllm_requests.finish_reason(completion.finish_reason) == "abort":
            return TokenChunk(request.request_id, [], "abort")
        logprobs = completion.logprobs if request.sampling.logprobs is not None else []
        made = trtllm_requests.handoff(completion.disaggregated_params, logprobs, self._version)
        self._hold(request.request_id, output)
        return TokenChunk(request.request_id, [], "length", cached_tokens=output.cached_tokens, handoff=made)

    def _hold(self, request_id: str, output: Any) -> None:
        """So that it can be released, for as long as TensorRT-LLM itself keeps it."""
        config = self.spec.engine_args.get("cache_transceiver_config") or {}
        timeout_s = (config.get("kv_transfer_timeout_ms") or TRANSFER_TIMEOUT_MS) / 1000
        self._held[request_id] = output
        asyncio.get_running_loop().call_later(timeout_s, self._held.pop, request_id, None)

    def _lost(self, request: GenerateRequest, error: Exception) -> EngineError:
        """RequestError is one request's; what comes from elsewhere has ended the executor first."""
        words = trtllm_objects.first_line(error)
        executor = None if self._llm is None else self._llm._executor
        if executor is None or executor.workers is None:
            self._die(words)
            return EngineError(f"the TensorRT-LLM engine died: {words}")
        if request.sampling.structure is not None and any(word in words.lower() for word in ("grammar", "guided")):
            return EngineError(f"TensorRT-LLM cannot compile the structure: {words}", False, "structure")
        return EngineError(f"TensorRT-LLM lost the request: {words}")

    def _give_up(self, output: Any) -> None:
        """Its abort waits for the worker, so it is not waited for."""
        if self._llm is not None and not (self._death is not None and self._death.done()):
            self._spawn(_quietly(output.abort))

    def _lose_all(self, reason: str) -> None:
        for inside in self._inside.values():
            inside.lost = reason
            inside.step.cancel()

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _kill_workers(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(Exception):  # whatever Ray says of one that is gone
                trtllm_ray.kill(worker)

    async def _shut_down(self) -> None:
        self._lose_all("the TensorRT-LLM engine was stopped")
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        llm, self._llm = self._llm, None
        if self._death is not None and self._death.done():
            self._kill_workers()  # those that are left wait for the one that is gone, and would not shut down
        if llm is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(_end, llm), STOP_TIMEOUT_S)
        self._kill_workers()  # 1.2 only lets go of them
        self._workers = ()
        self._held.clear()
        await self._reports.close()
        await self._launcher.finish()


def _model_of(spec: LaunchSpec) -> _Model:
    """Raises EngineStartError when there is no such model, or it has other experts than the configuration counts."""
    try:
        config = json.loads((Path(spec.model_path) / "config.json").read_text())
        config = config.get("text_config", config)
        model = _Model(config["vocab_size"], config["max_position_embeddings"])
    except (OSError, ValueError, KeyError) as error:
        raise EngineStartError(f"model.path: no model can be read from {spec.model_path}: {error!r}") from None
    experts = next((config[name] for name in ("n_routed_experts", "num_experts") if name in config), None)
    slots = trtllm_args.num_slots(spec)
    if slots is not None and experts is not None and slots != experts + spec.redundant_experts:
        raise EngineStartError(
            f"engine_args.moe_config.load_balancer.num_slots: {slots} are not the model's {experts} experts and "
            f"parallelism.redundant_experts={spec.redundant_experts}"
        )
    return model


def _end(llm: Any) -> None:
    try:
        llm.shutdown()
    except Exception as error:  # noqa: BLE001 - its workers are killed in any case
        log.info("TensorRT-LLM did not shut down: %s", trtllm_objects.first_line(error))


async def _quietly(abort: Callable[[], None]) -> None:
    try:
        await asyncio.to_thread(abort)
    except Exception as error:  # noqa: BLE001 - a request that cannot be aborted has ended, or its engine has
        log.info("TensorRT-LLM did not abort a request: %s", trtllm_objects.first_line(error))
