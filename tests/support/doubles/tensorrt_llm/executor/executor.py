"""executor/ray_executor.py of 1.2, executor/ray/executor.py of 1.3: starts the workers, and passes requests on."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

from tensorrt_llm.executor.result import GenerationResult, RequestError
from tensorrt_llm.executor.simulation import Simulation, request
from tensorrt_llm.executor.worker import Worker

from backends.engine import EngineError, LaunchSpec, Role


class RpcClient:
    """executor/rpc: a call's `remote` waits for what the first worker returns."""

    def __init__(self, executor: RayExecutor) -> None:
        self._executor = executor

    def fetch_stats_async(self, timeout: float | None = None) -> Any:
        return self._call(self._executor.simulation.statistics)

    def fetch_kv_cache_events_async(self, timeout: float | None = None) -> Any:
        return self._call(self._executor.simulation.events)

    def _call(self, method: Callable[[], list[str]]) -> Any:
        async def call() -> list[str]:
            return method()

        return SimpleNamespace(remote=lambda: self._executor.run(call()))


class RayExecutor:
    def __init__(
        self,
        worker_kwargs: dict[str, Any],
        model_world_size: int,
        postproc_worker_config: Any,
        is_llm_executor: bool,
        tp_size: int = 1,
    ) -> None:
        self.world_size = model_world_size
        self._args = args = worker_kwargs["llm_args"]
        self.workers: list[Worker] | None = []
        self.create_workers(Worker, worker_kwargs)
        for worker in self.workers:
            worker.wait_until_ready()
        spec = LaunchSpec(
            "doubled",
            args.role,
            "doubled",
            args.model,
            attn_dp=args.tensor_parallel_size if args.enable_attention_dp else 1,
            kv_events=False,
            engine_args={
                "block_size": args.kv_cache_config.tokens_per_block,
                "kv_blocks": 512,
                "max_model_len": args.max_position_embeddings,
                "step_s": 0.001,
            },
        )
        events = bool(getattr(args.kv_cache_config, "event_buffer_max_size", 0))
        self.simulation = Simulation(spec, events, args.version)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.run(self.simulation.start())
        self.rpc_client = RpcClient(self)
        self._numbers = itertools.count(1)
        self._legs: dict[int, Role] = {}
        self._tasks: set[Any] = set()

    def create_workers(self, worker_cls: Any, worker_kwargs: dict[str, Any]) -> None:
        behaviour = worker_kwargs["llm_args"].behaviour
        self.workers = [worker_cls(rank, behaviour) for rank in range(self.world_size)]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    def generate_async(self, prompt: list[int], sampling: Any, given: dict[str, Any]) -> GenerationResult:
        number = next(self._numbers)
        result = GenerationResult(self, number)
        made = request(number, prompt, given, sampling, self._args.version)
        self._legs[number] = made.leg
        work = self._answer(result, made, dataclasses.asdict(sampling))
        self._tasks.add(asyncio.run_coroutine_threadsafe(work, self._loop))
        return result

    def abort_request(self, request_id: int) -> None:
        self.run(self._abort(str(request_id)))

    def shutdown(self) -> None:
        workers, self.workers = self.workers, None
        for worker in workers or ():
            worker.kill()
        if self._loop.is_running():
            self.run(self.simulation.stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    async def _abort(self, number: str) -> None:
        await self.simulation.abort(number)
        await self.simulation.release(number)

    async def _answer(self, result: GenerationResult, made: Any, args: dict[str, Any]) -> None:
        """Nothing comes any more when a worker is gone, and nobody says so."""
        try:
            async for response in self.simulation.responses(made, args):
                if all(worker.is_alive for worker in self.workers or ()):
                    result.put(response)
        except EngineError as error:
            result.put(RequestError(str(error)))
