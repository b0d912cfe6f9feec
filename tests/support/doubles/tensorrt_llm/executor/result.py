"""executor/result.py: what a request answers with, step by step, on the loop that asked."""

from __future__ import annotations

import asyncio
from typing import Any

from tensorrt_llm.recorded import data_class

Logprob = data_class("Logprob", kw_only=False)
CompletionOutput = data_class("CompletionOutput", kw_only=False)


class RequestError(Exception):
    """executor/utils.py: one request's failure."""


class GenerationResult:
    def __init__(self, executor: Any, request_id: int) -> None:
        self._executor = executor
        self.request_id = request_id
        self.outputs = [CompletionOutput(0)]
        self.cached_tokens = 0
        self._done = False
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

    def put(self, response: Any) -> None:
        """From the executor's thread."""
        self._loop.call_soon_threadsafe(self._queue.put_nowait, response)

    @property
    def finished(self) -> bool:
        return self._done

    def abort(self) -> None:
        self._executor.abort_request(self.request_id)

    async def aresult(self) -> GenerationResult:
        while not self._done:
            await self._aresult_step()
        return self

    def __aiter__(self) -> GenerationResult:
        return self

    async def __anext__(self) -> GenerationResult:
        if self._done:
            raise StopAsyncIteration
        await self._aresult_step()
        return self

    async def _aresult_step(self) -> None:
        response = await self._queue.get()
        if isinstance(response, Exception):
            self._done = True
            raise response
        (output,) = self.outputs
        output.token_ids = output.token_ids + response["token_ids"]
        output.logprobs = output.logprobs + response["logprobs"]
        output.disaggregated_params = response["disaggregated_params"]
        output.finish_reason = response["finish_reason"]
        self._done = output.finish_reason is not None
        self.cached_tokens = response["cached_tokens"]
