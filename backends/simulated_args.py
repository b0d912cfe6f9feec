"""What `engine_args` may hold for the simulated engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from backends.engine import EngineStartError, LaunchSpec

Count = Annotated[int, Meta(ge=1)]
Token = Annotated[int, Meta(ge=0, lt=1 << 32)]
Duration = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class SimulatedArgs(msgspec.Struct, frozen=True):
    block_size: Count = 16
    kv_blocks: Count = 8192
    """Per DP rank."""
    prefix_caching: bool = True
    """Whether a prompt's blocks are found by the next one that begins alike, and told of in KV events."""
    max_model_len: Count = 8192
    max_running: Count = 512
    """Requests that step together or wait for their KV, per DP rank."""
    max_batched_tokens: Count = 8192
    """Prompt tokens computed in one step, per DP rank; longer prompts take several."""
    step_s: Duration = 0.01
    """A step that only decodes."""
    prefill_tokens_per_s: Positive = 100_000.0
    transfer_tokens_per_s: Positive = 1_000_000.0
    start_s: Duration = 0.0
    handoff: Literal["sequential", "concurrent"] = "sequential"
    lease_s: Positive = 30.0
    """How long a prefill leg's KV waits for its decode side."""
    serving: Literal["leader", "every_node"] = "leader"
    """Of a worker over several nodes: its leader serves all ranks, or every node its own."""
    failing_node: Annotated[int, Meta(ge=0)] | None = None
    """The node of a worker whose share does not start, once `start_s` is over; to see what becomes of that."""
    last_line: str = ""
    """What that node is to have written last."""
    token_low: Token = 97
    token_high: Token = 122
    """Tokens are drawn from this closed range; the default is a to z in the byte tokenizer."""


def caches_prefixes(spec: LaunchSpec) -> bool:
    """Raises EngineStartError as `parse_args` does."""
    return parse_args(spec.engine_args).prefix_caching


def parse_args(given: Mapping[str, Any]) -> SimulatedArgs:
    """Check `engine_args`.

    Raises:
        EngineStartError: A key is unknown, or a value cannot be; names it.
    """
    known = SimulatedArgs.__struct_fields__
    for key in given:
        if key not in known:
            raise EngineStartError(f"engine_args.{key}: unknown to the simulated engine; it has {', '.join(known)}")
    try:
        args = msgspec.convert(dict(given), SimulatedArgs)
    except msgspec.ValidationError as error:
        problem, _, key = str(error).rstrip("`").partition(" - at `$.")
        raise EngineStartError(f"engine_args.{key}: {problem}") from None
    if args.token_high < args.token_low:
        raise EngineStartError("engine_args.token_high: must not be below token_low")
    if args.kv_blocks * args.block_size < args.max_model_len:
        raise EngineStartError(
            f"engine_args.kv_blocks: {args.kv_blocks} blocks of {args.block_size} tokens do not hold one request of "
            f"max_model_len, {args.max_model_len}"
        )
    return args
