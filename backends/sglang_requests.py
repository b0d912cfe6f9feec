"""One request in SGLang's words, and what SGLang answers in ours; pure, SGLang is imported by whoever calls."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
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

ANY_OBJECT = '{"type": "object"}'
"""What `json_object` means to SGLang's own HTTP server too (serving_chat.py)."""

ABORTED = "Aborted by AbortReq."
"""What SGLang says where it was told to; of a request whose structure it still compiles as of a client's mistake."""


def rid_of(request_id: str) -> str:
    """SGLang's name of a request. It aborts every request whose name begins with the given one (scheduler.py), so
    that none may begin another."""
    return request_id + "/"


def arguments(request: GenerateRequest, version: str, priority_order: int = 0) -> dict[str, Any]:
    """The keyword arguments of SGLang's GenerateReqInput.

    Args:
        priority_order: as `sglang_args.priority_order` says. Where there is one, every request is told its priority:
            to SGLang one without comes last, behind those of a low one.

    Raises:
        EngineError: SGLang cannot do what is asked.
    """
    sampling = request.sampling
    args: dict[str, Any] = {
        "input_ids": request.token_ids,
        "sampling_params": sampling_arguments(sampling),
        "stream": True,
        "rid": rid_of(request.request_id),
        "routed_dp_rank": request.dp_rank,
    }
    if sampling.logprobs is not None:
        args |= {"return_logprob": True, "logprob_start_len": -1, "top_logprobs_num": sampling.logprobs}
    if request.lora is not None:
        args["lora_path"] = request.lora
    if priority_order:
        args["priority"] = priority_order * request.priority
    if request.cache_salt is not None:
        args["extra_key" if version == "0.5.16" else "cache_salt"] = request.cache_salt
    if request.handoff is not None:
        args |= _rendezvous(request.handoff)
        if request.leg is Role.DECODE:
            args["disagg_prefill_dp_rank"] = request.handoff.params["prefill_dp_rank"]
    return args


def sampling_arguments(sampling: Sampling) -> dict[str, Any]:
    """SGLang's SamplingParams. Prefill samples the first token, so both legs are told the same."""
    if sampling.ignore_eos and sampling.stop_token_ids:
        raise EngineError("SGLang stops at no token at all under ignore_eos; send one of the two", False, "ignore_eos")
    args: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        # EOS is among the stop tokens where it ends an answer.
        "ignore_eos": not sampling.stop_token_ids,
    }
    if sampling.seed is not None:
        args["sampling_seed"] = sampling.seed
    if sampling.min_tokens:
        args["min_new_tokens"] = sampling.min_tokens
    if sampling.structure is not None:
        kind = {"json_object": "json_schema", "json_schema": "json_schema", "regex": "regex", "grammar": "ebnf"}
        args[kind[sampling.structure.kind]] = sampling.structure.value or ANY_OBJECT
    return args


def prefill_chunk(request: GenerateRequest, output: Mapping[str, Any]) -> TokenChunk:
    """The one chunk of a prefill leg, from SGLang's last output: decode has its copy by then."""
    meta = output["meta_info"]
    reason = finish_reason(request, meta["finish_reason"])
    if reason == "abort":
        return TokenChunk(request.request_id, [], "abort")
    return TokenChunk(request.request_id, [], "length", cached_tokens=meta["cached_tokens"])


def chunk(request: GenerateRequest, output: Mapping[str, Any], first: bool, local_cache: bool) -> TokenChunk:
    """A chunk from the output of one step.

    Args:
        local_cache: this engine keeps a prefix cache. A decode engine without one takes the whole prompt from
            prefill; one with a cache does not tell how much of it was its own, because `cached_tokens` is then what
            prefill had cached plus that.
    """
    meta = output["meta_info"]
    reason = finish_reason(request, meta["finish_reason"])
    token_ids = [] if reason == "abort" else list(output["output_ids"])
    cached, transferred = None, None
    if first and reason != "abort":
        if request.leg is not Role.DECODE:
            cached = meta["cached_tokens"]
        elif not local_cache:
            cached, transferred = 0, meta["prompt_tokens"]
    wanted = request.sampling.logprobs
    return TokenChunk(
        request.request_id,
        token_ids,
        reason,
        logprobs=None if wanted is None else token_logprobs(meta, wanted, len(token_ids)),
        cached_tokens=cached,
        transferred_tokens=transferred,
    )


def finish_reason(request: GenerateRequest, reason: Mapping[str, Any] | None) -> FinishReason | None:
    """SGLang's {"type": ...} as ours.

    Raises:
        EngineError: SGLang ended the request with an error; for a leg of two that is also KV that did not arrive.
    """
    if reason is None:
        return None
    kind = reason["type"]
    if kind == "length":
        return "length"
    if kind == "stop":
        return "stop"
    status, message = reason.get("status_code"), reason.get("message")
    at_fault = status == HTTPStatus.BAD_REQUEST
    if status is None or (at_fault and message == ABORTED):
        return "abort"
    raise EngineError(f"SGLang ended {request.request_id}: {message}", retryable=not at_fault)


def token_logprobs(meta: Mapping[str, Any], num_top: int, num_tokens: int) -> list[TokenLogprob]:
    """SGLang gives (logprob, token, text) a position, and as many of them as were asked for as alternatives."""
    chosen = meta.get("output_token_logprobs") or []
    tops = meta.get("output_top_logprobs") or [()] * len(chosen)
    if len(chosen) < num_tokens:
        raise EngineError(f"SGLang gave {len(chosen)} logprobs for {num_tokens} tokens")
    pairs = list(zip(chosen, tops, strict=True))[len(chosen) - num_tokens :]
    return [
        TokenLogprob(token, logprob, [(other, value) for value, other, _ in (top or ())[:num_top]])
        for (logprob, token, _), top in pairs
    ]


def _rendezvous(handoff: KVHandoff) -> dict[str, Any]:
    host, _, port = handoff.params["bootstrap_address"].rpartition(":")
    return {
        "bootstrap_host": host.strip("[]"),
        "bootstrap_port": int(port),
        "bootstrap_room": handoff.params["bootstrap_room"],
    }
