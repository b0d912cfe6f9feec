"""One request in TensorRT-LLM's words, and what it answers in ours; pure, TensorRT-LLM is imported by whoever calls."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from backends.engine import (
    EngineError,
    FinishReason,
    GenerateRequest,
    KVHandoff,
    Role,
    Sampling,
    TokenChunk,
    TokenLogprob,
)

HANDED_OVER = {
    "1.2": ("first_gen_tokens", "ctx_request_id", "opaque_state", "draft_tokens"),
    "1.3": (
        "first_gen_tokens",
        "ctx_request_id",
        "opaque_state",
        "draft_tokens",
        "disagg_request_id",
        "ctx_dp_rank",
        "ctx_info_endpoint",
    ),
}
"""Fields of DisaggregatedParams that prefill fills in and decode is given as they are."""
WARM_UP = Sampling(max_tokens=4, temperature=0.0)
FIRST_LOGPROBS = "first_logprobs"
"""In a hand-off, beside those: of every first token, [token, logprob, rank] of it and its alternatives."""
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "not_finished": "length", "cancelled": "abort"}

Entry = Mapping[int, Any]
"""What TensorRT-LLM tells of one token: its Logprob and those of alternatives, by token."""


def sampling_arguments(sampling: Sampling, leg: Role, version: str) -> dict[str, Any]:
    """The keyword arguments of TensorRT-LLM's SamplingParams.

    A prefill leg is told of no stop token: it hands KV over only when its one token has ended it by length.

    Raises:
        EngineError: TensorRT-LLM cannot do what is asked.
    """
    stops = () if leg is Role.PREFILL else sampling.stop_token_ids
    args: dict[str, Any] = {
        # -1 is no token. `ignore_eos` would do the same, and drop the stop tokens too (base_worker.py).
        "end_id": -1,
        "pad_id": 0,
        "max_tokens": 1 if leg is Role.PREFILL else sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "detokenize": False,
        "include_stop_str_in_output": True,
    }
    if stops:
        args["stop_token_ids"] = list(stops)
    if sampling.min_tokens > 1 and stops:
        if len(stops) > 1:
            raise EngineError(
                "TensorRT-LLM holds back one stop token under min_tokens, not several", False, "min_tokens"
            )
        args |= {"end_id": stops[0], "min_tokens": sampling.min_tokens}
    for name, unset in (("presence_penalty", 0.0), ("frequency_penalty", 0.0), ("repetition_penalty", 1.0)):
        if (value := getattr(sampling, name)) != unset:
            args[name] = value
    if sampling.min_p > 0:
        args["min_p"] = sampling.min_p
    if sampling.seed is not None:
        args["seed"] = sampling.seed
    if sampling.logprobs is not None:
        if leg is not Role.AGGREGATED and version == "1.2":
            # Its decode side has none of the token that prefill sampled, and breaks off for it (_handle_sequence).
            raise EngineError("TensorRT-LLM 1.2 has no logprobs of an answer that is handed over", False, "logprobs")
        args["logprobs"] = max(1, sampling.logprobs)  # 1.2 takes 0 for none
    return args


def guide_arguments(sampling: Sampling) -> dict[str, Any] | None:
    """The keyword arguments of its GuidedDecodingParams; None: the answer may look like anything."""
    structure = sampling.structure
    if structure is None:
        return None
    if structure.kind == "json_object":
        return {"json_object": True}
    return {"json" if structure.kind == "json_schema" else structure.kind: structure.value}


def call_arguments(request: GenerateRequest, version: str) -> dict[str, Any]:
    """Of generate_async, what is not an object of a class of TensorRT-LLM's."""
    args: dict[str, Any] = {"inputs": request.token_ids, "streaming": True}
    if request.cache_salt is not None:
        args["cache_salt"] = request.cache_salt
    if request.priority and version != "1.2":
        args["priority"] = priority(request.priority)
    return args


def priority(ours: int) -> float:
    """0..1, in the same order; 0 is TensorRT-LLM's own default."""
    return 0.5 + ours / (2 * (1 + abs(ours)))


def scheduling_arguments(rank: int) -> dict[str, Any]:
    """The keyword arguments of SchedulingParams that pin a request to that rank and let it go to no other."""
    return {"attention_dp_rank": rank, "attention_dp_relax": False}


def disaggregation_arguments(request: GenerateRequest, version: str) -> dict[str, Any] | None:
    """The keyword arguments of DisaggregatedParams, but for logprobs; None: one engine does it all."""
    if request.leg is Role.AGGREGATED:
        return None
    if request.leg is Role.PREFILL:
        args: dict[str, Any] = {"request_type": "context_only"}
        if version != "1.2":
            # Both sides know the request by it; TensorRT-LLM's own numbers are below 2**42 (disagg_utils.py).
            args["disagg_request_id"] = 1 << 61 | secrets.randbits(61)
        return args
    assert request.handoff is not None
    given = request.handoff.params
    return {"request_type": "generation_only"} | {name: given[name] for name in HANDED_OVER[version] if name in given}


def handoff(disaggregated_params: Any, logprobs: Sequence[Entry], version: str) -> KVHandoff:
    """From what a prefill leg ended with.

    Raises:
        EngineError: It ended without KV to hand over.
    """
    if disaggregated_params is None or disaggregated_params.opaque_state is None:
        raise EngineError("TensorRT-LLM ended a prefill leg without KV to hand over")
    params = {
        name: value for name in HANDED_OVER[version] if (value := getattr(disaggregated_params, name, None)) is not None
    }
    if logprobs:
        params[FIRST_LOGPROBS] = [
            [[token, told.logprob, told.rank] for token, told in entry.items()] for entry in logprobs
        ]
    return KVHandoff(params)


def entries(told: Sequence[Sequence[Sequence[Any]]], logprob_class: Any) -> list[dict[int, Any]]:
    """What `handoff` wrote of the first tokens' logprobs, as TensorRT-LLM's own again."""
    return [{token: logprob_class(logprob, rank) for token, logprob, rank in of_token} for of_token in told]


class OutputReader:
    """Reads one request's outputs, each of which holds all of its tokens so far.

    On a decode leg they begin with the token that prefill sampled. TensorRT-LLM checks only what it samples itself
    against stop tokens and the limit, so that one is checked here.
    """

    def __init__(self, request: GenerateRequest, local_cache: bool) -> None:
        self._request = request
        self._local_cache = local_cache
        self._read = 0

    def chunk(self, output: Any) -> TokenChunk | None:
        """What is new in this output; None: nothing.

        A decode engine with a cache of its own does not tell how much of the prompt was in it.
        """
        request, sampling = self._request, self._request.sampling
        (completion,) = output.outputs
        tokens = list(completion.token_ids[self._read :])
        reason = finish_reason(completion.finish_reason)
        if reason == "abort":
            return TokenChunk(request.request_id, [], "abort")
        if not tokens and reason is None:
            return None
        first = self._read == 0
        if first and tokens and request.leg is Role.DECODE:
            if tokens[0] in sampling.stop_token_ids and sampling.min_tokens <= 1:
                tokens, reason = tokens[:1], "stop"
            elif sampling.max_tokens == 1:
                tokens, reason = tokens[:1], "length"
        cached, transferred = None, None
        if first and request.leg is not Role.DECODE:
            cached = output.cached_tokens
        elif first and not self._local_cache:
            cached, transferred = 0, len(request.token_ids)
        logprobs = None
        if sampling.logprobs is not None:
            logprobs = token_logprobs(tokens, completion.logprobs[self._read :], sampling.logprobs)
        self._read += len(tokens)
        return TokenChunk(request.request_id, tokens, reason, logprobs, cached, transferred)


def finish_reason(reason: str | None) -> FinishReason | None:
    """Raises EngineError where TensorRT-LLM gave a request up."""
    if reason is None:
        return None
    if reason not in REASONS:
        raise EngineError(f"TensorRT-LLM gave a request up: {reason}")
    return REASONS[reason]


def token_logprobs(tokens: Sequence[int], entries: Sequence[Entry], num_top: int) -> list[TokenLogprob]:
    """One a token; TensorRT-LLM tells of the chosen token after the alternatives where it is none of them."""
    if len(entries) < len(tokens):
        raise EngineError(f"TensorRT-LLM gave {len(entries)} logprobs for {len(tokens)} tokens")
    found = []
    for token, entry in zip(tokens, entries, strict=False):
        ranked = sorted(((other, told.logprob) for other, told in entry.items()), key=lambda pair: -pair[1])
        found.append(TokenLogprob(token, entry[token].logprob, ranked[:num_top]))
    return found
