"""vLLM, in this process's event loop: AsyncLLM in front of one engine-core process per data-parallel rank.

Processes: ours (front: request bookkeeping only), one engine core per attention DP rank, which also runs the model
where a rank is one device, and with more than one rank, on the first node, a coordinator that keeps them in step.

Several nodes, in the two ways that vLLM 0.32 and 0.33 have:

* Each runs its share of the attention DP ranks, with a front of its own that requests go to ("hybrid load balancing";
  with one rank a node, "external"). They meet at the leader's address. `start` returns when all nodes' ranks are ready.
* One attention DP rank on the devices of all of them (TP or PP over nodes): the leader serves it, the others only run
  their devices' processes.

A rank that dies ends its own node's engine at once; the others' fail in their next step, which needs it.

Sockets: on the node's address, NIXL's handshakes and the nodes' meeting point on ports of ours and everything else on
free ones that vLLM takes. One listens on every address: with more than one rank, torch's TCPStore in the first, to
which vLLM gives no address.

Blocks that a finished prefill leg holds are freed by the first of these: the decode engine has read them, or has
refused the request before it was queued and told so over NIXL (vLLM's notify_kv_transfer_request_rejected; here
`release` does that without the decode engine, which may be gone); `release`; the lease, `kv_lease_duration` in
kv_connector_extra_config, 30 s, which a decode engine that has queued the request extends while it waits.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from backends import admission, arguments, vllm_args, vllm_control, vllm_requests
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    Feature,
    GenerateRequest,
    KVEventSource,
    LaunchSpec,
    RankLoad,
    Role,
    TokenChunk,
)
from backends.failures import start_error
from backends.output import OutputCapture
from backends.processes import (
    DeathWatch,
    Launcher,
    consecutive_ports,
    free_consecutive_ports,
    interface_of,
)
from backends.startup import Startup
from backends.vllm_control import Control
from backends.vllm_cpu_fixes import installed_version
from backends.vllm_processes import imported_for_good, launch_with_our_mains
from backends.vllm_requests import PromptSources
from backends.vllm_stats import EngineCounters, RankRecorder

log = logging.getLogger(__name__)

WIRE_FORMATS = {"0.32.0": "vllm-0.32", "0.33.0": "vllm-0.33"}
"""Of KV events, by the version whose argument table holds."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
STRUCTURES = (Feature.JSON_OBJECT, Feature.JSON_SCHEMA, Feature.REGEX, Feature.GRAMMAR)
STOP_TIMEOUT_S = 3.0
"""After this an engine core is killed; its own teardown takes less than one."""
MAX_REMEMBERED_HANDOFFS = 65_536
"""Prefill legs whose vLLM id is kept for `release`; an older one's lease has long ended."""


class VLLMEngine:
    """See `backends.engine.Engine`."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.counters = EngineCounters()
        self._llm: Any = None
        self._control: Control | None = None
        self._executor: Any = None
        """In place of an AsyncLLM, on a node that is served through the leader."""
        self._version = ""
        self._vocab_size = 0
        self._recorders: list[RankRecorder] = []
        self._sources: dict[str, PromptSources] = {}
        self._running: set[str] = set()
        self._held: OrderedDict[str, str] = OrderedDict()
        """Request id -> vLLM's own, of prefill legs that have finished."""
        self._frees: set[asyncio.Task[Any]] = set()
        self._startup = Startup()
        self._watch: DeathWatch | None = None
        self._launcher = Launcher(f"vllm-{spec.worker}")
        self._socket_folder = ""
        self._output: OutputCapture | None = None

    async def start(self) -> EngineInfo | None:
        return await self._startup.run(self._start())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        admission.check(request, self._check_serving(), self._vocab_size)
        admission.check_new(request, self._running)
        self._running.add(request.request_id)
        handed_over = False
        try:
            async with aclosing(self._steps(request)) as chunks:
                async for chunk in chunks:
                    handed_over = chunk.handoff is not None
                    yield chunk
        finally:
            self._running.discard(request.request_id)
            self._sources.pop(request.request_id, None)
            if not handed_over:
                await self.release(request.request_id)

    async def abort(self, request_id: str) -> None:
        if request_id in self._running and self._llm is not None and not self._llm.errored:
            await self._llm.abort(request_id)

    async def release(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is not None:
            self._free_soon(held)

    def load(self) -> tuple[RankLoad, ...]:
        total = self.info.kv_total_blocks if self.info is not None else 0
        return tuple(recorder.load(total) for recorder in self._recorders)

    def last_lines(self) -> tuple[str, ...]:
        return () if self._output is None else self._output.last_lines()

    async def check_health(self) -> None:
        self._check_alive()
        if self._executor is None:
            self._check_serving()

    async def died(self) -> str:
        assert self._watch is not None, "start() comes first"
        return await asyncio.shield(self._watch.death)

    async def control(self, command: Command) -> None:
        """On a node that is served through its leader there is nothing to do: the leader tells its devices."""
        self._check_alive()
        if self._control is None:
            return
        info = self._check_serving()
        if command.__struct_config__.tag not in info.controls:
            raise admission.no_such_control(command, info)
        await self._control.carry_out(command)

    async def stop(self) -> None:
        await self._startup.end()
        await self._shut_down()

    async def _start(self) -> EngineInfo | None:
        on_cpu = _on_cpu()
        args = vllm_args.engine_args(self.spec, on_cpu, _has_tokenizer(self.spec.model_path))
        self._socket_folder = tempfile.mkdtemp(prefix="vllm-")
        self._output = OutputCapture()
        try:
            must, defaults = self._environment(on_cpu)
            must |= self._output.environment
            if self._serves:
                self._llm = await self._launcher.run(
                    lambda: self._launch(args), lambda llm: llm.shutdown(STOP_TIMEOUT_S), must, defaults
                )
                self._control = Control(self._llm)
                await self._load_adapters()
            else:
                self._executor = await self._launcher.run(
                    lambda: self._launch_devices(args), lambda executor: executor.shutdown(), must, defaults
                )
        except BaseException as error:
            await self._shut_down()
            if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                raise
            # vLLM tells its front end only that something failed; what did stands among the lines.
            lines = (*self.last_lines(), *f"{type(error).__name__}: {error}".splitlines())
            raise start_error(lines, "vllm", self.spec.role) from error
        self._watch = DeathWatch(self.processes())
        if self._serves:
            self.info = self._describe(on_cpu)
        return self.info

    @property
    def _serves(self) -> bool:
        return vllm_args.share(self.spec).num_ranks > 0

    async def _shut_down(self) -> None:
        if self._watch is not None:
            self._watch.close()
        for free in self._frees:
            free.cancel()
        llm, self._llm = self._llm, None
        if llm is not None:
            await _end_requests(llm)
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S)
            llm.shutdown = _already_shut_down
            # vLLM closes its sockets in a later turn of this loop, and leaves their context to the interpreter.
            await self._launcher.finish(llm.engine_core.resources.ctx.term)
        else:
            executor, self._executor = self._executor, None
            if executor is not None:
                await asyncio.to_thread(executor.shutdown)
            await self._launcher.finish()
        multiprocessing.active_children()  # Reaps those that have ended.
        if self._output is not None:
            self._output.close()
        if self._socket_folder:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _environment(self, on_cpu: bool) -> tuple[dict[str, str], dict[str, str]]:
        """What must be so, and what is so unless the process's environment says otherwise."""
        spec = self.spec
        count = vllm_args.num_ports(spec)
        port = consecutive_ports(spec.place.ports, count)
        if port is None and spec.place.ports:
            raise EngineStartError(f"ports: no {count} consecutive ones among {spec.place.ports}")
        if port is None:
            port = free_consecutive_ports(spec.place.address, count)
        return vllm_args.environment(spec, on_cpu, self._socket_folder, port, interface_of(spec.place.address))

    def _configure(self, args: dict[str, Any], **how: Any) -> Any:
        """vLLM's own configuration, checked; the first thing in the launcher's thread."""
        try:
            with imported_for_good():
                import vllm.v1.engine.async_llm  # noqa: F401 - here, for the launch
                from vllm.engine.arg_utils import AsyncEngineArgs
        except ImportError as error:
            raise EngineStartError(f"the vLLM backend needs the package {error.name!r}; run `make setup`") from error
        self._version = arguments.check_installed("vllm", self.spec.version, installed_version() or "unknown")
        arguments.check("vllm", self._version, self.spec.engine_args, vllm_args.OWNED)
        launch_with_our_mains()
        if self._launcher.cancelled:
            raise EngineStartError("the start was given up")
        config = AsyncEngineArgs(**args).create_engine_config(**how)
        vllm_args.check_model(self.spec, config.model_config.get_num_experts())
        return config

    def _launch_devices(self, args: dict[str, Any]) -> Any:
        """As `_launch`, where only the processes of this node's devices are started."""
        config = self._configure(args, headless=True)
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        return MultiprocExecutor(config, monitor_workers=False)

    def _launch(self, args: dict[str, Any]) -> Any:
        """Runs in the launcher's thread; returns when every rank, of all nodes, has loaded the model."""
        config = self._configure(args)
        from vllm.v1.engine.async_llm import AsyncLLM

        mine = vllm_args.share(self.spec)
        self._recorders = [RankRecorder(rank, self.counters) for rank in range(mine.num_ranks)]
        llm = AsyncLLM.from_vllm_config(
            config,
            stat_loggers=[lambda _, rank=0: self._recorders[rank - mine.first_rank]],
            disable_log_stats=True,
        )
        # vLLM adds its Prometheus metrics, which nobody reads here and which cost more than our two totals.
        llm.logger_manager.stat_loggers = llm.logger_manager.stat_loggers[:1]
        self._watch_outputs(llm.output_processor)
        return llm

    def _watch_outputs(self, output_processor: Any) -> None:
        """Note, as vLLM's outputs come in, what its answers do not tell.

        It adds up local and transferred cache hits. It drops what a core says of a request that was aborted here: a
        prefill leg that had finished there by then holds its blocks, and the abort does not free them.
        """
        process = output_processor.process_outputs

        def process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            for output in outputs:
                state = output_processor.request_states.get(output.request_id)
                if state is None:
                    if output.kv_transfer_params:
                        self._free_soon(output.request_id)
                    continue
                if output.kv_transfer_params:
                    self._hold(state.external_req_id, output.request_id)
                if (stats := output.prefill_stats) is not None:
                    self._sources[state.external_req_id] = PromptSources(
                        stats.num_local_cached_tokens, stats.num_external_cached_tokens
                    )
            return process(outputs, *args, **kwargs)

        output_processor.process_outputs = process_outputs

    def _hold(self, request_id: str, vllm_id: str) -> None:
        self._held[request_id] = vllm_id
        if len(self._held) > MAX_REMEMBERED_HANDOFFS:
            self._held.popitem(last=False)

    def _free_soon(self, vllm_id: str) -> None:
        """Free a finished prefill leg's blocks. Nobody waits for it: an engine that dies meanwhile never answers."""
        if self._llm is not None and not self._llm.errored:
            call = self._llm.engine_core.call_utility_all_async
            free = asyncio.create_task(call("collective_rpc", "free_held_blocks", None, ([vllm_id],)))
            self._frees.add(free)
            free.add_done_callback(self._frees.discard)

    def processes(self) -> list[Any]:
        """vLLM's: an engine core a rank, and the coordinator; or one a device, on a node that only lends those."""
        if self._executor is not None:
            return [worker.proc for worker in self._executor.workers]
        resources = self._llm.engine_core.resources
        coordinator = [] if resources.coordinator is None else [resources.coordinator.proc]
        return [*resources.engine_manager.processes, *coordinator]

    async def _load_adapters(self) -> None:
        """All at once now, so that one that cannot be loaded ends the start and not a request."""
        for name, request in self._adapters().items():
            try:
                await self._llm.engine_core.call_utility_all_async("add_lora", request)
            except Exception as error:
                raise EngineStartError(f"model.loras.{name}: vLLM cannot load {request.lora_path}: {error}") from error

    def _adapters(self) -> dict[str, Any]:
        """vLLM's LoRARequests by name; their numbers follow the configuration's order, so all nodes have the same."""
        from vllm.lora.request import LoRARequest

        return {
            name: LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
            for number, (name, path) in enumerate(self.spec.loras.items(), start=1)
        }

    def _describe(self, on_cpu: bool) -> EngineInfo:
        spec, config, mine = self.spec, self._llm.vllm_config, vllm_args.share(self.spec)
        self._vocab_size = config.model_config.get_vocab_size()
        return EngineInfo(
            backend="vllm",
            version=installed_version() or "unknown",
            model=spec.model,
            role=spec.role,
            attn_dp_size=mine.num_ranks,
            block_size=config.cache_config.block_size,
            max_model_len=config.model_config.max_model_len,
            # vLLM sums over ranks; one block of each is the null block that no request gets.
            kv_total_blocks=config.cache_config.num_gpu_blocks // mine.num_ranks - 1,
            handoff="none" if spec.role is Role.AGGREGATED else "sequential",
            caches_prefixes=bool(config.cache_config.enable_prefix_caching),
            kv_event_sources=self._event_sources(),
            max_logprobs=config.model_config.max_logprobs,
            first_dp_rank=mine.first_rank,
            features=self._features(),
            loras=tuple(spec.loras),
            controls=vllm_control.controls(self._llm, on_cpu, self._version),
        )

    def _features(self) -> tuple[Feature, ...]:
        config = self._llm.vllm_config
        features = [Feature.SEED, Feature.MIN_P, Feature.MIN_TOKENS, Feature.CACHE_SALT]
        if config.scheduler_config.policy == "priority":
            features.append(Feature.PRIORITY)
        if self.spec.role is Role.PREFILL or not config.model_config.skip_tokenizer_init:
            features += STRUCTURES  # nobody sees what a prefill engine answers
        return tuple(features)

    def _event_sources(self) -> tuple[KVEventSource, ...]:
        """Empty without a prefix cache, which vLLM turns off for MLA on CPU: there is nothing to tell then."""
        if not self.spec.kv_events:
            return ()
        if not self._llm.vllm_config.cache_config.enable_prefix_caching:
            log.warning("vLLM caches no prefixes of %s here, so it publishes no KV events", self.spec.model)
            return ()
        sources = self._llm.get_kv_event_sources()
        return tuple(
            KVEventSource(rank, sources[number].endpoint, sources[number].replay_endpoint, WIRE_FORMATS[self._version])
            for rank, number in enumerate(sorted(sources))
        )

    def _check_alive(self) -> None:
        if self._llm is None and self._executor is None:
            raise EngineError("the vLLM engine is not running")
        if self._watch is not None and self._watch.death.done():
            raise EngineError(f"the vLLM engine died: {self._watch.death.result()}")

    def _check_serving(self) -> EngineInfo:
        self._check_alive()
        if self.info is None:
            raise EngineError("this node of the vLLM engine is served through its leader")
        if self._llm.errored:
            raise EngineError("the vLLM engine died")
        return self.info

    async def _steps(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        """vLLM's outputs as chunks, its errors as ours."""
        from vllm.exceptions import GenerationError, GracefulHTTPError, RetryableRequestError, VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            kind = RequestOutputKind.FINAL_ONLY if request.leg is Role.PREFILL else RequestOutputKind.DELTA
            words = vllm_requests.sampling_arguments(request)
            if (structure := request.sampling.structure) is not None and request.leg is not Role.PREFILL:
                shape = StructuredOutputsParams(**vllm_requests.structure_arguments(structure))
                words["structured_outputs"] = shape
            params = SamplingParams(**words, output_kind=kind)
            outputs = self._llm.generate(
                tokens_input(request.token_ids, cache_salt=request.cache_salt),
                params,
                request.request_id,
                lora_request=None if request.lora is None else self._adapters()[request.lora],
                priority=-request.priority,  # to vLLM the smaller is the earlier
                data_parallel_rank=request.dp_rank,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    sources = self._sources.pop(request.request_id, None)
                    if request.leg is Role.PREFILL:
                        yield vllm_requests.prefill_chunk(request, output, sources)
                        return
                    yield vllm_requests.chunk(request, output.outputs[0], sources)
        except VLLMClientError as error:
            field = getattr(error, "parameter", None)
            raise EngineError(f"vLLM refused the request: {error}", retryable=False, field=field) from error
        except (GracefulHTTPError, RetryableRequestError) as error:
            raise EngineError(f"vLLM takes no more requests: {error}") from error
        except EngineDeadError as error:
            raise EngineError(f"the vLLM engine {'was stopped' if self._llm is None else 'died'}") from error
        except (EngineGenerateError, GenerationError) as error:
            raise EngineError(f"vLLM lost the request: {error.__cause__ or error!r}") from error


async def _end_requests(llm: Any) -> None:
    """Fail every request that vLLM still has, and end what would report the end of its engine as an error."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if llm.output_handler is not None:
        llm.output_handler.cancel()
        await asyncio.gather(llm.output_handler, return_exceptions=True)
        llm.output_processor.propagate_error(EngineDeadError())


def _already_shut_down(timeout: float | None = None) -> None:
    """In place of AsyncLLM.shutdown, which its finalizer calls again, at interpreter exit with a traceback."""


def _has_tokenizer(folder: str) -> bool:
    return any(Path(folder, name).is_file() for name in TOKENIZER_FILES)


def _on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs; by its distribution, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "cpu" in (installed_version() or "")
