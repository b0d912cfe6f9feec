"""vLLM, in this process's event loop: AsyncLLM in front of one engine-core process per data-parallel rank.

Processes: ours (front: request bookkeeping only), one engine core per attention DP rank, which also runs the model
where a rank is one device, and with more than one rank a coordinator that keeps them in step.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import multiprocessing
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any

from backends import vllm_args, vllm_requests
from backends.engine import (
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
from backends.vllm_cpu_fixes import installed_version
from backends.vllm_processes import (
    CORES_VARIABLE,
    FAILURE_FILE,
    DeathWatch,
    Launcher,
    consecutive_ports,
    free_consecutive_ports,
    interface_of,
    launch_environment,
    launch_with_our_mains,
)
from backends.vllm_requests import PromptSources
from backends.vllm_stats import EngineCounters, RankRecorder

log = logging.getLogger(__name__)

TESTED_VERSION = "0.32.0"
WIRE_FORMAT = "vllm-0.32"
STOP_TIMEOUT_S = 3.0
"""After this an engine core is killed; its own teardown takes 2 s, and then it idles for 3 more."""
OWNED_VARIABLES = ("VLLM_NIXL", "VLLM_HOST_IP", "VLLM_RPC", "VLLM_CPU_OMP", "OMP_NUM_THREADS")
"""Environment variables that differ from engine to engine, whatever the process's environment says."""
MAX_REMEMBERED_HANDOFFS = 65_536
"""Prefill legs whose vLLM id is kept for `release`; an older one's lease has long ended."""


class VLLMEngine:
    """See `backends.engine.Engine`."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self.counters = EngineCounters()
        self._llm: Any = None
        self._vocab_size = 0
        self._recorders: list[RankRecorder] = []
        self._sources: dict[str, PromptSources] = {}
        self._running: set[str] = set()
        self._held: OrderedDict[str, str] = OrderedDict()
        self._watch: DeathWatch | None = None
        self._launcher = Launcher(f"vllm-{spec.worker}")
        self._socket_folder = ""

    async def start(self) -> EngineInfo:
        if self.spec.role is not Role.AGGREGATED and self.spec.node_rank != 0:
            raise EngineStartError("nodes: a vLLM worker runs on one node")
        on_cpu = _on_cpu()
        args = vllm_args.engine_args(self.spec, on_cpu)
        self._socket_folder = tempfile.mkdtemp(prefix="vllm-")
        try:
            values, defaults = self._environment(on_cpu)
            self._llm = await self._launcher.run(
                lambda: self._launch(args, values, defaults), lambda llm: llm.shutdown(STOP_TIMEOUT_S)
            )
        except BaseException as error:
            cause = _cause(error, self._socket_folder)
            await self.stop()
            if isinstance(error, EngineStartError) or not isinstance(error, Exception):
                raise
            raise EngineStartError(f"vLLM did not start: {cause}") from error
        self._watch = DeathWatch(self.processes())
        self.info = self._describe()
        return self.info

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        info = self._check_serving()
        vllm_requests.check(request, info, self._vocab_size)
        if request.request_id in self._running:
            raise EngineError(f"request {request.request_id} is already here", retryable=False, field="request_id")
        self._running.add(request.request_id)
        try:
            async with aclosing(self._steps(request)) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            self._running.discard(request.request_id)
            self._sources.pop(request.request_id, None)

    async def abort(self, request_id: str) -> None:
        if request_id in self._running and self._llm is not None and not self._llm.errored:
            await self._llm.abort(request_id)

    async def release(self, request_id: str) -> None:
        held = self._held.pop(request_id, None)
        if held is not None and self._llm is not None and not self._llm.errored:
            await self._llm.engine_core.call_utility_all_async("collective_rpc", "free_held_blocks", None, ([held],))

    def load(self) -> tuple[RankLoad, ...]:
        total = self.info.kv_total_blocks if self.info is not None else 0
        return tuple(recorder.load(total) for recorder in self._recorders)

    async def check_health(self) -> None:
        self._check_serving()

    async def died(self) -> str:
        assert self._watch is not None, "start() comes first"
        return await asyncio.shield(self._watch.death)

    async def stop(self) -> None:
        if self._watch is not None:
            self._watch.close()
        llm, self._llm = self._llm, None
        if llm is not None:
            if llm.output_handler is not None:  # Else it reports the end of its engine as an error.
                llm.output_handler.cancel()
                await asyncio.gather(llm.output_handler, return_exceptions=True)
            await asyncio.to_thread(llm.shutdown, STOP_TIMEOUT_S)
            llm.shutdown = _already_shut_down
            # vLLM closes its sockets in a later turn of this loop, and leaves their context to the interpreter.
            await self._launcher.finish(llm.engine_core.resources.ctx.term)
        else:
            await self._launcher.finish()
        multiprocessing.active_children()  # Reaps those that have ended.
        if self._socket_folder:
            shutil.rmtree(self._socket_folder, ignore_errors=True)

    def _environment(self, on_cpu: bool) -> tuple[dict[str, str], dict[str, str]]:
        """What must be so, and what is so unless the process's environment says otherwise."""
        spec = self.spec
        port = consecutive_ports(spec.ports, spec.attn_dp)
        if port is None and spec.ports:
            raise EngineStartError(f"ports: no {spec.attn_dp} consecutive ones among {spec.ports}")
        if port is None:
            port = free_consecutive_ports(spec.node_address, spec.attn_dp)
        values = vllm_args.environment(spec, on_cpu, self._socket_folder, port, interface_of(spec.node_address))
        owned = {name: values[name] for name in values if name.startswith(OWNED_VARIABLES)}
        ranks = spec.attn_dp if spec.attn_tp * spec.pp == 1 else 0
        shares = [vllm_args.cores_of_rank(spec.cores, ranks, rank) for rank in range(ranks)]
        owned[CORES_VARIABLE] = ";".join(",".join(map(str, share)) for share in shares if share)
        return owned, values

    def _launch(self, args: dict[str, Any], values: dict[str, str], defaults: dict[str, str]) -> Any:
        """Runs in the launcher's thread; returns when every rank has loaded the model."""
        with launch_environment(values, defaults):
            try:
                from vllm.engine.arg_utils import AsyncEngineArgs
                from vllm.v1.engine.async_llm import AsyncLLM
            except ImportError as error:
                raise EngineStartError(
                    f"the vLLM backend needs the package {error.name!r}; run `make setup`"
                ) from error
            if not (installed_version() or "").startswith(TESTED_VERSION):
                log.warning("vLLM %s is installed; tested is %s", installed_version(), TESTED_VERSION)
            vllm_args.check_known(self.spec.engine_args, {f.name for f in dataclasses.fields(AsyncEngineArgs)})
            launch_with_our_mains()
            if self._launcher.cancelled:
                raise EngineStartError("the start was given up")
            config = AsyncEngineArgs(**args).create_engine_config()
            self._recorders = [RankRecorder(rank, self.counters) for rank in range(self.spec.attn_dp)]
            llm = AsyncLLM.from_vllm_config(
                config, stat_loggers=[lambda _, rank=0: self._recorders[rank]], disable_log_stats=True
            )
            # vLLM adds its Prometheus metrics, which nobody reads here and which cost more than our two totals.
            llm.logger_manager.stat_loggers = llm.logger_manager.stat_loggers[:1]
            self._note_prompt_sources(llm.output_processor)
            return llm

    def _note_prompt_sources(self, output_processor: Any) -> None:
        """vLLM adds up local and transferred cache hits before it answers; note them apart on their way in."""
        process = output_processor.process_outputs

        def process_outputs(outputs: list[Any], *args: Any, **kwargs: Any) -> Any:
            for output in outputs:
                stats, state = output.prefill_stats, output_processor.request_states.get(output.request_id)
                if stats is not None and state is not None:
                    self._sources[state.external_req_id] = PromptSources(
                        stats.num_local_cached_tokens, stats.num_external_cached_tokens
                    )
            return process(outputs, *args, **kwargs)

        output_processor.process_outputs = process_outputs

    def processes(self) -> list[Any]:
        """vLLM's: an engine core a rank, and the coordinator."""
        resources = self._llm.engine_core.resources
        coordinator = [] if resources.coordinator is None else [resources.coordinator.proc]
        return [*resources.engine_manager.processes, *coordinator]

    def _describe(self) -> EngineInfo:
        spec, config = self.spec, self._llm.vllm_config
        self._vocab_size = config.model_config.get_vocab_size()
        return EngineInfo(
            backend="vllm",
            version=installed_version() or "unknown",
            model=spec.model,
            role=spec.role,
            attn_dp_size=spec.attn_dp,
            block_size=config.cache_config.block_size,
            max_model_len=config.model_config.max_model_len,
            # vLLM sums over ranks; one block of each is the null block that no request gets.
            kv_total_blocks=config.cache_config.num_gpu_blocks // spec.attn_dp - 1,
            handoff="none" if spec.role is Role.AGGREGATED else "sequential",
            kv_event_sources=self._event_sources(),
            max_logprobs=config.model_config.max_logprobs,
        )

    def _event_sources(self) -> tuple[KVEventSource, ...]:
        """Empty without a prefix cache, which vLLM turns off for MLA on CPU: there is nothing to tell then."""
        if not self.spec.kv_events:
            return ()
        if not self._llm.vllm_config.cache_config.enable_prefix_caching:
            log.warning("vLLM caches no prefixes of %s here, so it publishes no KV events", self.spec.model)
            return ()
        sources = self._llm.get_kv_event_sources()
        return tuple(
            KVEventSource(rank, sources[rank].endpoint, sources[rank].replay_endpoint, WIRE_FORMAT)
            for rank in sorted(sources)
        )

    def _check_serving(self) -> EngineInfo:
        if self._llm is None or self.info is None:
            raise EngineError("the vLLM engine is not running")
        if self._watch is not None and self._watch.death.done():
            raise EngineError(f"the vLLM engine died: {self._watch.death.result()}")
        if self._llm.errored:
            raise EngineError("the vLLM engine died")
        return self.info

    async def _steps(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        """vLLM's outputs as chunks, its errors as ours."""
        from vllm.exceptions import VLLMClientError
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            kind = RequestOutputKind.FINAL_ONLY if request.leg is Role.PREFILL else RequestOutputKind.DELTA
            params = SamplingParams(**vllm_requests.sampling_arguments(request), output_kind=kind)
            outputs = self._llm.generate(
                tokens_input(request.token_ids, cache_salt=request.cache_salt),
                params,
                request.request_id,
                data_parallel_rank=request.dp_rank,
            )
            async with aclosing(outputs):
                async for output in outputs:
                    sources = self._sources.pop(request.request_id, None)
                    if request.leg is Role.PREFILL:
                        yield self._hand_over(request, output, sources)
                        return
                    yield vllm_requests.chunk(request, output.outputs[0], sources)
        except VLLMClientError as error:
            field = getattr(error, "parameter", None)
            raise EngineError(f"vLLM refused the request: {error}", retryable=False, field=field) from error
        except EngineDeadError as error:
            raise EngineError("the vLLM engine died") from error
        except EngineGenerateError as error:
            raise EngineError(f"vLLM lost the request: {error.__cause__ or error!r}") from error

    def _hand_over(self, request: GenerateRequest, output: Any, sources: PromptSources | None) -> TokenChunk:
        if output.outputs[0].finish_reason == "abort":
            return TokenChunk(request.request_id, [], "abort")
        chunk = vllm_requests.prefill_chunk(request, output, sources)
        assert chunk.handoff is not None
        self._held[request.request_id] = chunk.handoff.params["remote_request_id"]
        if len(self._held) > MAX_REMEMBERED_HANDOFFS:
            self._held.popitem(last=False)
        return chunk


def _already_shut_down(timeout: float | None = None) -> None:
    """In place of AsyncLLM.shutdown, which its finalizer calls again, at interpreter exit with a traceback."""


def _cause(error: BaseException, folder: str) -> str:
    """What an engine core said before it ended, else the front end's own error."""
    failure = Path(folder, FAILURE_FILE)
    return failure.read_text() if failure.exists() else str(error)


def _on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs; by its distribution, without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return "cpu" in (installed_version() or "")
