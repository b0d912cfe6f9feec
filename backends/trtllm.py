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
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from backends import admission, arguments, failures, trtllm_args, trtllm_ray, trtllm_requests
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    GenerateRequest,
    KVEventSource,
    LaunchSpec,
    RankLoad,
    Role,
    TokenChunk,
)
from backends.kv_events import KVEventBatch
from backends.kv_publisher import KVEventPublisher
from backends.processes import Launcher
from backends.startup import Startup
from backends.trtllm_events import EventReader

log = logging.getLogger(__name__)

POLL_S = 0.05
"""Between two looks at statistics and KV events."""
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
    step: asyncio.Future[Any] | None = None
    num_tokens: int = 0
    lost: str | None = None


@dataclass
class _Rank:
    """What TensorRT-LLM told last of one attention DP rank."""

    kv_used_blocks: int | None = None
    sequence: int = 0
    publisher: KVEventPublisher | None = None


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
        self._ranks: list[_Rank] = [_Rank() for _ in range(spec.attn_dp)]
        self._kv_total_blocks: int | None = None
        self._reader: EventReader | None = None
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
        if request.request_id in self._inside:
            raise EngineError(f"request {request.request_id} is already here", retryable=False, field="request_id")
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
        try:
            self._model = _model_of(spec)
            self._llm = await self._launched(self._launcher.run(lambda: self._launch(group), _end, must, defaults))
            self._death = asyncio.get_running_loop().create_future()
            self._spawn(self._watch())
            await self._warm_up()
            self.info = info = await self._describe()
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
            original(made, *args, **kwargs)
            self._workers = tuple(made.workers)

        executor.create_workers = create_workers
        try:
            yield
        finally:
            executor.create_workers = original

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
        self._reader = EventReader(block_size)
        await self._first_statistics()
        assert self._kv_total_blocks is not None
        limit = llm.args.max_seq_len or self._model.max_positions
        return EngineInfo(
            backend="trtllm",
            version=version,
            model=spec.model,
            role=spec.role,
            attn_dp_size=spec.attn_dp,
            block_size=block_size,
            max_model_len=min(limit, self._kv_total_blocks * block_size),
            kv_total_blocks=self._kv_total_blocks,
            handoff="none" if spec.role is Role.AGGREGATED else "sequential",
            caches_prefixes=trtllm_args.caches_prefixes(spec),
            kv_event_sources=self._open_publishers(),
            max_logprobs=trtllm_args.MAX_LOGPROBS,
            features=trtllm_args.features(spec, version),
            loras=tuple(spec.loras),
        )

    async def _first_statistics(self) -> None:
        """Wait for the size of the KV cache, which TensorRT-LLM tells with its first iterations."""
        deadline = asyncio.get_running_loop().time() + STATS_TIMEOUT_S
        while self._kv_total_blocks is None:
            if asyncio.get_running_loop().time() > deadline:
                raise EngineStartError(f"TensorRT-LLM told no statistics within {STATS_TIMEOUT_S:.0f} s of its start")
            self._take_statistics(await asyncio.to_thread(self._fetch, "fetch_stats_async"))
            await asyncio.sleep(POLL_S)

    def _open_publishers(self) -> tuple[KVEventSource, ...]:
        """One a rank, on the leader: TensorRT-LLM gathers every rank's events there."""
        if not trtllm_args.publishes_events(self.spec):
            return ()
        sources = []
        for number, rank in enumerate(self._ranks):
            try:
                rank.publisher = publisher = KVEventPublisher(self.spec.place.address)
            except OSError as error:
                raise EngineStartError(f"cannot listen on {self.spec.place.address}: {error}") from error
            sources.append(KVEventSource(number, publisher.endpoint, publisher.replay_endpoint, "simulated-1"))
        return tuple(sources)

    async def _watch(self) -> None:
        """Its executor does not see a worker die, and would wait for ever for what that one does not send."""
        assert self._death is not None
        while True:
            try:
                await asyncio.gather(*(worker.__ray_ready__.remote() for worker in self._workers))
                if self._llm._executor is None or self._llm._executor.workers is None:
                    raise RuntimeError("TensorRT-LLM shut its executor down")
            except Exception as error:  # noqa: BLE001 - whatever Ray says of an actor that is gone
                self._die(f"one of its ranks is gone: {_first_line(error)}")
                return
            await asyncio.sleep(WATCH_S)

    def _die(self, reason: str) -> None:
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        self._lose_all(f"the TensorRT-LLM engine died: {reason}")

    async def _poll(self) -> None:
        while True:
            try:
                self._take_statistics(await asyncio.to_thread(self._fetch, "fetch_stats_async"))
                if trtllm_args.publishes_events(self.spec):
                    self._publish(await asyncio.to_thread(self._fetch, "fetch_kv_cache_events_async"))
            except Exception as error:  # noqa: BLE001 - the engine may be dying; who watches it says so
                log.info("TensorRT-LLM tells nothing of itself: %s", _first_line(error))
                await asyncio.sleep(1.0)
            await asyncio.sleep(POLL_S)

    def _fetch(self, method: str) -> list[Any]:
        """From its first worker. The LLM's own get_stats and get_kv_cache_events wait on queues that its Ray executor
        does not fill, in 1.2 and 1.3 (RpcExecutorMixin.setup_mainloop fetches responses alone)."""
        told = getattr(self._llm._executor.rpc_client, method)().remote()
        return [json.loads(each) if isinstance(each, str) else each for each in told]

    def _take_statistics(self, told: list[Any]) -> None:
        for each in told:
            cache = each.get("kvCacheStats")
            if cache is None:
                continue
            self._kv_total_blocks = self._kv_total_blocks or cache["maxNumBlocks"]
            rank = each.get("attentionDpRank") or 0
            if rank < len(self._ranks):
                self._ranks[rank].kv_used_blocks = cache["usedNumBlocks"]

    def _publish(self, told: list[Any]) -> None:
        assert self._reader is not None
        for number, events in self._reader.read(told).items():
            rank = self._ranks[number]
            if rank.publisher is not None and events:
                rank.publisher.publish(KVEventBatch(rank.sequence, number, events))
                rank.sequence += 1

    def _rank_load(self, rank: int) -> RankLoad:
        """TensorRT-LLM tells of an iteration, and nothing when the last request has left."""
        assert self.info is not None
        inside = [each for each in self._inside.values() if each.rank == rank]
        running = sum(each.num_tokens > 0 for each in inside)
        used = self._ranks[rank].kv_used_blocks
        if used is None:  # 1.2 tells of the first rank only
            size = self.info.block_size
            used = sum(-(-(len(each.request.token_ids) + each.num_tokens) // size) for each in inside)
        elif not inside and self.spec.role is not Role.PREFILL:
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
        """Its RequestOutput. On our loop: it makes the queue of answers for the loop that it is called on."""
        from tensorrt_llm import llmapi as api
        from tensorrt_llm.scheduling_params import SchedulingParams

        sampling = trtllm_requests.sampling_arguments(request.sampling, request.leg, self._version)
        guide = trtllm_requests.guide_arguments(request.sampling)
        if guide is not None:
            sampling["guided_decoding"] = api.GuidedDecodingParams(**guide)
        args = trtllm_requests.call_arguments(request, self._version)
        if self.spec.attn_dp > 1:
            args["scheduling_params"] = SchedulingParams(**trtllm_requests.scheduling_arguments(rank))
        legs = trtllm_requests.disaggregation_arguments(request, self._version)
        if legs is not None:
            args["disaggregated_params"] = api.DisaggregatedParams(**legs, **self._first_logprobs(request))
        if request.lora is not None:
            args["lora_request"] = self._lora_request(request.lora)
        try:
            return self._llm.generate_async(sampling_params=api.SamplingParams(**sampling), **args)
        except Exception as error:  # noqa: BLE001 - its classes differ by version; they are told apart by name
            if type(error).__name__ == "RequestError" or isinstance(error, ValueError | TypeError):
                raise EngineError(f"TensorRT-LLM refused the request: {_first_line(error)}", False, "prompt") from None
            raise EngineError(f"TensorRT-LLM took no request: {_first_line(error)}") from None

    def _first_logprobs(self, request: GenerateRequest) -> dict[str, Any]:
        """Prefill's, for the decode side to go on from."""
        told = None if request.handoff is None else request.handoff.params.get(trtllm_requests.FIRST_LOGPROBS)
        if told is None:
            return {}
        from tensorrt_llm.executor.result import Logprob

        return {"first_gen_log_probs": [trtllm_requests.entries(told, Logprob)]}

    def _lora_request(self, name: str) -> Any:
        from tensorrt_llm.executor.request import LoRARequest

        return LoRARequest(name, list(self.spec.loras).index(name) + 1, self.spec.loras[name])

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
        inside.step = asyncio.ensure_future(anext(inside.output))
        try:
            await inside.step
        except asyncio.CancelledError:
            if inside.lost is None:
                raise
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
        words = _first_line(error)
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
            self._spawn(_quietly(asyncio.to_thread(output.abort)))

    def _lose_all(self, reason: str) -> None:
        for inside in self._inside.values():
            inside.lost = reason
            if inside.step is not None:
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
        if llm is not None and not (self._death is not None and self._death.done()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.to_thread(_end, llm), STOP_TIMEOUT_S)
        self._kill_workers()  # 1.2 only lets go of them
        self._workers = ()
        for rank in self._ranks:
            publisher, rank.publisher = rank.publisher, None
            if publisher is not None:
                await publisher.close()
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
        log.info("TensorRT-LLM did not shut down: %s", _first_line(error))


async def _quietly(work: Any) -> None:
    try:
        await work
    except Exception as error:  # noqa: BLE001 - a request that cannot be aborted has ended, or its engine has
        log.info("TensorRT-LLM did not abort a request: %s", _first_line(error))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
