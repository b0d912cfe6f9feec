"""One request in vLLM's words, and what vLLM answers in ours; pure, vLLM is imported by whoever calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backends.engine import (
    EngineError,
    FinishReason,
    GenerateRequest,
    KVHandoff,
    Role,
    Structure,
    TokenChunk,
    TokenLogprob,
)

PREFILL_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
"""kv_transfer_params that ask a prefill engine to hold the blocks and say where they are (vLLM's NIXL connector). What
it answers goes to decode as it is: 0.33's has an entry, remote_registration_generation, that 0.32's has not."""

STRUCTURES = {"json_schema": "json", "regex": "regex", "grammar": "grammar"}
"""Our kinds -> the fields of vLLM's StructuredOutputsParams; `json_object` has no text to it."""

FINISH_REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


@dataclass(frozen=True, slots=True)
class PromptSources:
    """Where the KV of one request's prompt came from, in tokens."""

    cached_tokens: int
    transferred_tokens: int


def sampling_arguments(request: GenerateRequest) -> dict[str, Any]:
    """The keyword arguments of vLLM's SamplingParams; the caller adds the output kind and the structure."""
    if request.leg is Role.PREFILL:
        # One token that nobody sees: a request that ends for any reason but its length hands nothing over.
        return {
            "max_tokens": 1,
            "temperature": 0.0,
            "ignore_eos": True,
            "detokenize": False,
            "extra_args": {"kv_transfer_params": dict(PREFILL_PARAMS)},
        }
    sampling = request.sampling
    arguments: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": sampling.seed,
        "min_tokens": sampling.min_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        # The ingress has put EOS among the stop tokens where it ends an answer; what vLLM reads from
        # the model's files would add to them. A structure lets EOS through where it is complete: nothing holds
        # what would follow.
        "ignore_eos": sampling.structure is None,
        "logprobs": sampling.logprobs,
        "detokenize": False,
    }
    if request.handoff is not None:
        arguments["extra_args"] = {"kv_transfer_params": dict(request.handoff.params)}
    return arguments


def structure_arguments(structure: Structure) -> dict[str, Any]:
    """The keyword arguments of vLLM's StructuredOutputsParams."""
    return {"json_object": True} if structure.kind == "json_object" else {STRUCTURES[structure.kind]: structure.value}


def prefill_chunk(request: GenerateRequest, output: Any, sources: PromptSources | None) -> TokenChunk:
    """The one chunk of a prefill leg, from vLLM's last RequestOutput.

    Raises:
        EngineError: vLLM finished without saying where the blocks are.
    """
    if output.outputs[0].finish_reason == "abort":
        return TokenChunk(request.request_id, [], "abort")
    params = output.kv_transfer_params
    if not params:
        raise EngineError(f"prefill of {request.request_id} ended without a hand-off")
    cached = None if sources is None else sources.cached_tokens
    return TokenChunk(request.request_id, [], "length", cached_tokens=cached, handoff=KVHandoff(dict(params)))


def chunk(request: GenerateRequest, completion: Any, sources: PromptSources | None) -> TokenChunk:
    """A chunk from the CompletionOutput of one step; `sources` are for the first one.

    Raises:
        EngineError: vLLM ended the request with an error; for a decode leg that is KV that did not arrive.
    """
    return TokenChunk(
        request.request_id,
        list(completion.token_ids),
        finish_reason(request, completion.finish_reason),
        logprobs=None
        if request.sampling.logprobs is None
        else token_logprobs(completion.token_ids, completion.logprobs or (), request.sampling.logprobs),
        cached_tokens=None if sources is None else sources.cached_tokens,
        transferred_tokens=None if sources is None or request.leg is not Role.DECODE else sources.transferred_tokens,
    )


def finish_reason(request: GenerateRequest, reason: str | None) -> FinishReason | None:
    if reason is None:
        return None
    if reason in FINISH_REASONS:
        return FINISH_REASONS[reason]
    what = "its KV did not arrive from the prefill side" if request.leg is Role.DECODE else "vLLM reports an error"
    raise EngineError(f"request {request.request_id} failed: {what} ({reason})")


def token_logprobs(
    token_ids: Sequence[int], positions: Sequence[Mapping[int, Any]], num_top: int
) -> list[TokenLogprob]:
    """vLLM gives a dict a position: the chosen token, and the `num_top` most likely with their ranks from 1."""
    result = []
    for token_id, alternatives in zip(token_ids, positions, strict=True):
        top = sorted(
            ((entry.rank, other, entry.logprob) for other, entry in alternatives.items() if entry.rank <= num_top)
        )
        chosen = alternatives[token_id].logprob
        result.append(TokenLogprob(token_id, chosen, [(other, logprob) for _, other, logprob in top]))
    return result
