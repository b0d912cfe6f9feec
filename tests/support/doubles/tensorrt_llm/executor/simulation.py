"""All ranks' model, requests and KV: the simulated engine, telling in TensorRT-LLM's words."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec
from tensorrt_llm.disaggregated_params import DisaggregatedParams
from tensorrt_llm.executor.result import Logprob

from backends.engine import GenerateRequest, KVHandoff, LaunchSpec, Role, Sampling
from backends.kv_events import BlockRemoved, BlockStored
from backends.simulated import SimulatedEngine
from backends.simulated_tokens import first_state, fold, logprob, next_token

FINISHED = {"stop": "stop", "length": "length", "abort": "cancelled"}


class Simulation(SimulatedEngine):
    def __init__(self, spec: LaunchSpec, events: bool, version: str) -> None:
        super().__init__(spec)
        self._tells_events, self._version = events, version
        self._told_events: list[str] = []
        self._told_load: dict[int, str] = {}
        self._event_ids = [0] * spec.attn_dp

    def events(self) -> list[str]:
        told, self._told_events = self._told_events, []
        return told

    def statistics(self) -> list[str]:
        """Of every rank in 1.3, of the first in 1.2."""
        ranks = self.load() if self._version != "1.2" else self.load()[:1]
        found = []
        for rank in ranks:
            cache = {"maxNumBlocks": rank.kv_total_blocks, "usedNumBlocks": rank.kv_used_blocks}
            row: dict[str, Any] = {"iter": 1, "kvCacheStats": cache}
            found.append(json.dumps(row if self._version == "1.2" else row | {"attentionDpRank": rank.dp_rank}))
        return found

    async def responses(self, made: GenerateRequest, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What one request answers with; `args` are the fields of its SamplingParams."""
        if made.leg is Role.PREFILL:
            async for response in self._prefill(made, args):
                yield response
            return
        waiting: list[tuple[int, Any]] = []
        count = 0
        async with aclosing(self.generate(made)) as chunks:
            async for chunk in chunks:
                cached = chunk.cached_tokens or 0
                for token, entry in zip(chunk.token_ids, chunk.logprobs or [None] * len(chunk.token_ids), strict=True):
                    waiting.append((token, entry))
                reason = chunk.finish_reason
                if made.leg is Role.DECODE and count == 0 and len(waiting) < 2 and reason is None:
                    continue  # prefill's token comes with the first of its own
                count += len(waiting)
                if reason != "abort":
                    reason = self._ends(made, args, waiting, count) or reason
                yield _response(waiting, reason, cached)
                waiting = []
                if reason is not None:
                    return

    def _admit(self, made: GenerateRequest) -> Any:
        """TensorRT-LLM has no roles: one with a cache transceiver takes either leg. Adapters come with requests."""
        if self.info is not None:
            loras = () if made.lora is None else (made.lora,)
            self.info = msgspec.structs.replace(self.info, role=made.leg, loras=loras)
        return super()._admit(made)

    def _ends(self, made: GenerateRequest, args: dict[str, Any], new: list[tuple[int, Any]], count: int) -> Any:
        stops = {*(args["stop_token_ids"] or ()), args["end_id"]} - {-1}
        own = [token for i, (token, _) in enumerate(new, count - len(new)) if made.leg is not Role.DECODE or i > 0]
        if count >= (args["min_tokens"] or 0) and own and own[-1] in stops:
            return "stop"
        return "length" if count >= args["max_tokens"] else None

    async def _prefill(self, made: GenerateRequest, args: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async for chunk in self.generate(made):
            if chunk.handoff is None:
                yield _response([], "abort", 0)
                return
            state = fold(made.token_ids, first_state("", made.lora))
            seed = None if made.sampling.temperature == 0.0 else made.sampling.seed or 0
            token = next_token(state, seed, len(made.token_ids), self.args)
            entry = None if made.sampling.logprobs is None else logprob(token, made.sampling.logprobs, self.args)
            response = _response([(token, entry)], "length", chunk.cached_tokens or 0)
            response["finish_reason"] = "not_finished"
            response["disaggregated_params"] = DisaggregatedParams(
                request_type="context_only",
                first_gen_tokens=[token],
                ctx_request_id=int(made.request_id),
                opaque_state=msgspec.msgpack.encode(chunk.handoff.params),
            )
            yield response

    def _publish(self) -> None:
        for rank, pool in enumerate(self._ranks):
            events, pool.events = pool.events, []
            if self._tells_events:
                self._told_events += [json.dumps(self._event(rank, event)) for event in events]

    def _event(self, rank: int, event: Any) -> dict[str, Any]:
        self._event_ids[rank] += 1
        row: dict[str, Any] = {"event_id": self._event_ids[rank], "window_size": 4096}
        if len(self._ranks) > 1:
            row["attention_dp_rank"] = rank
        if isinstance(event, BlockRemoved):
            return row | {"data": {"type": "removed", "block_hashes": event.block_hashes}}
        assert isinstance(event, BlockStored)
        size = event.block_size
        blocks = [
            {
                "type": "stored_block",
                "block_hash": block,
                "tokens": [
                    {"type": "unique_token", "token_id": token, "token_extra_id": 0}
                    for token in event.token_ids[i * size : (i + 1) * size]
                ],
                "cache_level": 0,
                "priority": 35,
            }
            for i, block in enumerate(event.block_hashes)
        ]
        data: dict[str, Any] = {"type": "stored", "parent_hash": event.parent_block_hash, "blocks": blocks}
        if self._version != "1.2":
            data |= {"lora_name": event.lora_name, "cache_salt": event.cache_salt}
        return row | {"data": data}


def _response(new: list[tuple[int, Any]], reason: str | None, cached: int) -> dict[str, Any]:
    return {
        "token_ids": [token for token, _ in new],
        "logprobs": [_entry(told) for _, told in new if told is not None],
        "finish_reason": None if reason is None else FINISHED[reason],
        "cached_tokens": cached,
        "disaggregated_params": None,
    }


def _entry(told: Any) -> dict[int, Any]:
    return {told.token_id: Logprob(told.logprob, 1)} | {
        token: Logprob(value, i) for i, (token, value) in enumerate(told.top, 1)
    }


def request(number: int, prompt: list[int], given: dict[str, Any], sampling: Any, version: str) -> GenerateRequest:
    """As the simulated engine takes it. It knows no stop tokens: `responses` looks for them as TensorRT-LLM does."""
    legs, scheduling, lora = given["disaggregated_params"], given["scheduling_params"], given["lora_request"]
    leg, handoff = Role.AGGREGATED, None
    if legs is not None and legs.request_type == "context_only":
        leg = Role.PREFILL
    elif legs is not None:
        leg = Role.DECODE
        handoff = KVHandoff(msgspec.msgpack.decode(legs.opaque_state))
        if version != "1.2" and sampling.logprobs is not None and legs.first_gen_log_probs is None:
            raise ValueError("the logprobs of the first token are not given")
    return GenerateRequest(
        str(number),
        list(prompt),
        Sampling(
            max(sampling.max_tokens, 2 if leg is Role.DECODE else 1),
            temperature=sampling.temperature,
            seed=sampling.seed,
            logprobs=sampling.logprobs,
        ),
        leg,
        dp_rank=None if scheduling is None else scheduling.attention_dp_rank,
        handoff=handoff,
        cache_salt=given["cache_salt"],
        lora=None if lora is None else lora.lora_name,
    )
