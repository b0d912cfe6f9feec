"""What every engine refuses alike, before it queues a request."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

from backends.engine import Command, EngineError, EngineInfo, Feature, GenerateRequest, Role, Sampling


def check(request: GenerateRequest, info: EngineInfo, vocab_size: int) -> None:
    """Refuse what this engine could never run.

    Raises:
        EngineError: Not retryable; names the field.
    """
    prompt, sampling = request.token_ids, request.sampling
    if not prompt:
        raise _refusal("the prompt is empty", "prompt")
    if len(prompt) >= info.max_model_len:
        raise _refusal(f"the prompt has {len(prompt)} tokens; at most {info.max_model_len - 1} fit", "prompt")
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise _refusal(f"the prompt has token ids outside 0..{vocab_size - 1}", "prompt")
    if request.dp_rank is not None and not 0 <= request.dp_rank < info.attn_dp_size:
        raise _refusal(f"dp_rank {request.dp_rank} is not in 0..{info.attn_dp_size - 1}", "dp_rank")
    if request.leg not in (Role.AGGREGATED, info.role):
        raise _refusal(f"a {info.role} engine takes no {request.leg} leg", "leg")
    if _needs_handoff(request.leg, info) != (request.handoff is not None):
        raise _refusal(f"a {request.leg} leg {'needs a' if request.handoff is None else 'takes no'} handoff", "handoff")
    if sampling.logprobs is not None and sampling.logprobs > info.max_logprobs:
        raise _refusal(f"{sampling.logprobs} logprobs are asked for; at most {info.max_logprobs}", "logprobs")
    if sampling.max_tokens < 1:
        raise _refusal(f"max_tokens is {sampling.max_tokens}; at least 1", "max_tokens")
    refusal = lacking(info, wishes(sampling, request.cache_salt, request.priority, request.lora))
    if refusal is not None:
        raise refusal


def check_new(request: GenerateRequest, inside: Container[str]) -> None:
    """Refuse a request whose id is inside already. Raises as `check` does."""
    if request.request_id in inside:
        raise _refusal(f"request {request.request_id} is already here", "request_id")


class Wishes(NamedTuple):
    """What a request asks for that not every engine has."""

    features: tuple[tuple[Feature, str], ...]
    """Each with the field that asks for it."""
    lora: str | None


def wishes(sampling: Sampling, cache_salt: str | None, priority: int, lora: str | None) -> Wishes | None:
    """None: nothing that an engine could lack.

    What cannot change the answer is not asked for: a seed or min_p where the most likely token is taken anyway, and
    priority 0.
    """
    structure, samples = sampling.structure, sampling.temperature > 0
    features = (
        (Feature.SEED, "seed", samples and sampling.seed is not None),
        (Feature.MIN_P, "min_p", samples and sampling.min_p > 0),
        (Feature.MIN_TOKENS, "min_tokens", sampling.min_tokens > 0),
        (Feature.CACHE_SALT, "cache_salt", cache_salt is not None),
        (Feature.PRIORITY, "priority", priority != 0),
    )
    asked = [(feature, field) for feature, field, is_asked in features if is_asked]
    if structure is not None:
        asked.append((Feature(structure.kind), "structure"))
    return Wishes(tuple(asked), lora) if asked or lora is not None else None


def lacking(info: EngineInfo, asked: Wishes | None) -> EngineError | None:
    """What keeps this engine from doing as asked, not retryable and with the field; None: nothing does."""
    if asked is None:
        return None
    if asked.lora is not None and asked.lora not in info.loras:
        have = f"it has {', '.join(info.loras)}" if info.loras else "it has none"
        return _refusal(f"{_name(info)} has no LoRA adapter {asked.lora!r}; {have}", "lora")
    for feature, field in asked.features:
        if feature not in info.features:
            return _refusal(f"{_name(info)} does not support {_SPOKEN.get(feature, field)}", field)
    return None


def no_such_control(command: Command, info: EngineInfo) -> EngineError:
    """What an engine says to a command that it has not."""
    name = command.__struct_config__.tag
    have = f"it has {', '.join(info.controls)}" if info.controls else "it has none"
    return EngineError(f"{_name(info)} has no command {name!r}; {have}", False, "command")


_SPOKEN = {
    Feature.JSON_OBJECT: "answers that must be a JSON object",
    Feature.JSON_SCHEMA: "answers to a JSON schema",
    Feature.REGEX: "answers to a regular expression",
    Feature.GRAMMAR: "answers to a grammar",
}


def _name(info: EngineInfo) -> str:
    return f"{info.backend} {info.version} as it was started"


def _needs_handoff(leg: Role, info: EngineInfo) -> bool:
    return leg is Role.DECODE or (leg is Role.PREFILL and info.handoff == "concurrent")


def _refusal(message: str, field: str) -> EngineError:
    return EngineError(message, retryable=False, field=field)
