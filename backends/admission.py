"""What every engine refuses alike, before it queues a request."""

from __future__ import annotations

from backends.engine import Command, EngineError, EngineInfo, GenerateRequest, Role


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


def no_such_control(command: Command, info: EngineInfo) -> EngineError:
    """What an engine says to a command that it has not."""
    name = command.__struct_config__.tag
    have = f"it has {', '.join(info.controls)}" if info.controls else "it has none"
    return EngineError(f"{info.backend} as it was started has no command {name!r}; {have}", False, "command")


def _needs_handoff(leg: Role, info: EngineInfo) -> bool:
    return leg is Role.DECODE or (leg is Role.PREFILL and info.handoff == "concurrent")


def _refusal(message: str, field: str) -> EngineError:
    return EngineError(message, retryable=False, field=field)
