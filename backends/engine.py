"""The contract every engine fulfils, and the values that cross it.

Ownership of KV blocks, step by step:

* `generate` owns a request's blocks from its first step until its generator is exhausted or closed;
  closing it (or `abort`) frees them within one engine step.
* A *prefill* leg ends with a chunk that carries a `KVHandoff`. From then on the blocks are held for the
  decode side until it has copied them, `release` is called, or the engine's own lease lapses.
* A *decode* leg owns its copy like any other request.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, Protocol

import msgspec


class Role(StrEnum):
    """What a worker does with a request."""

    PREFILL = "prefill"
    DECODE = "decode"
    AGGREGATED = "aggregated"


FinishReason = Literal["stop", "length", "abort"]
HandoffStyle = Literal["none", "sequential", "concurrent"]
"""`sequential`: prefill answers with the hand-off, then decode starts. `concurrent`: both start with the same
hand-off, made by the dispatcher. `none`: this engine only serves aggregated."""


class KVHandoff(msgspec.Struct, frozen=True):
    """What decode needs to find the KV that prefill computed; opaque outside the engine's adapter."""

    params: dict[str, Any]


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens are chosen. Stop strings are not here: the ingress detokenises, so it applies them."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: no logprobs. k >= 0: the chosen token's logprob and the k most likely alternatives."""


class GenerateRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One leg of one request, as the engine sees it."""

    request_id: str
    token_ids: list[int]
    sampling: Sampling
    leg: Role = Role.AGGREGATED
    """`prefill` computes the prompt and ends with a hand-off; `decode` starts from one."""
    dp_rank: int | None = None
    """Pin to this attention data-parallel rank; None leaves the choice to the engine."""
    handoff: KVHandoff | None = None
    """Set on a decode leg, and on a prefill leg of a `concurrent` engine."""
    cache_salt: str | None = None


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    top: list[tuple[int, float]] = []
    """(token id, logprob), most likely first; as many as asked for."""


class TokenChunk(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """New tokens of one request from one engine step. The last chunk, and only it, has a finish reason."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprob] | None = None
    """As many as `token_ids` when asked for."""
    cached_tokens: int | None = None
    """On the first chunk: prompt tokens this leg found in the engine's own prefix cache."""
    transferred_tokens: int | None = None
    """On a decode leg's first chunk: prompt tokens whose KV came from the prefill side."""
    handoff: KVHandoff | None = None
    """On the last chunk of a `sequential` prefill leg."""


class RankLoad(msgspec.Struct, frozen=True, array_like=True):
    """The load of one attention DP rank at one moment."""

    dp_rank: int
    num_running: int
    num_waiting: int
    kv_used_blocks: int
    """Blocks that running or handed-off requests hold; cached blocks nobody holds are free."""
    kv_total_blocks: int


class KVEventSource(msgspec.Struct, frozen=True):
    """Where one DP rank publishes its KV events: a ZeroMQ PUB socket, and a ROUTER that replays."""

    dp_rank: int
    endpoint: str
    replay_endpoint: str | None
    wire_format: str
    """A name `backends.kv_events.decoder` knows: engines and versions differ in encoding."""


class EngineInfo(msgspec.Struct, frozen=True):
    """What a started engine is; never changes until it stops."""

    backend: str
    version: str
    model: str
    role: Role
    attn_dp_size: int
    block_size: int
    max_model_len: int
    """Prompt and answer together, in tokens."""
    kv_total_blocks: int
    """Per DP rank."""
    handoff: HandoffStyle
    caches_prefixes: bool = True
    """A prompt's blocks may still be there for the next one that begins alike."""
    kv_event_sources: tuple[KVEventSource, ...] = ()
    """Empty: this engine publishes none; the router then guesses what it caches, and says so."""
    bootstrap_address: str | None = None
    """host:port of a `concurrent` prefill engine's rendezvous server."""
    max_logprobs: int = 0


@dataclass(frozen=True, slots=True)
class LaunchSpec:
    """Everything one node needs to start its share of one worker's engine."""

    worker: str
    role: Role
    model: str
    model_path: str
    attn_tp: int = 1
    attn_dp: int = 1
    moe_ep: int = 1
    moe_tp: int = 1
    pp: int = 1
    num_nodes: int = 1
    node_rank: int = 0
    node_address: str = "127.0.0.1"
    """The address other nodes reach this one at; sockets bind here, but for those an adapter names."""
    leader_address: str = "127.0.0.1"
    """node_address of node_rank 0."""
    leader_ports: tuple[int, ...] = ()
    """`ports` of node_rank 0, for what the other nodes connect to."""
    ports: tuple[int, ...] = ()
    """Free ports on this node that belong to this worker alone, for what others must be told beforehand; an adapter
    takes them in order. Everything else may listen on free ports of its engine's choice."""
    cores: tuple[int, ...] = ()
    """CPU engines: the cores to compute on, one or more a rank, in rank order. Empty: not pinned."""
    transfer_backend: str = "nixl"
    kv_events: bool = True
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """The user's, under the engine's own names; already checked against what we own."""


class EngineError(Exception):
    """An engine refused or lost a request.

    Args:
        message: what happened, for a person.
        retryable: another worker may succeed with the same request.
        field: the request field at fault, when the client can mend it.
    """

    def __init__(self, message: str, retryable: bool = True, field: str | None = None) -> None:
        super().__init__(message, retryable, field)
        self.message = message
        self.retryable = retryable
        self.field = field

    def __str__(self) -> str:
        return self.message


class EngineStartError(Exception):
    """An engine could not start; the message names the cause and, where the config can mend it, the field."""


class Engine(Protocol):
    """One node's share of one engine. All methods run on one event loop; none blocks it for long.

    Everything the engine started (processes, sockets, shared memory) is gone when `stop` returns.
    """

    async def start(self) -> EngineInfo:
        """Start and load the model; returns when requests can be served.

        Raises:
            EngineStartError: It cannot start; nothing is left running.
        """
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        """Yield the request's tokens, a chunk an engine step, the last with a finish reason.

        A prefill leg yields exactly one chunk, without tokens a client should see. Closing the generator aborts.

        Raises:
            EngineError: On the first iteration if the request is refused (never queued), later if it was lost.
        """
        ...

    async def abort(self, request_id: str) -> None:
        """End a request and free its KV within one step; unknown or finished ids are ignored."""
        ...

    async def release(self, request_id: str) -> None:
        """Free what a finished prefill leg still holds for its decode side; ignored when nothing is held.

        A leg that was closed before its hand-off was read holds nothing: that frees too.
        """
        ...

    def load(self) -> tuple[RankLoad, ...]:
        """The newest known load of every DP rank, in rank order."""
        ...

    async def check_health(self) -> None:
        """Return if the engine can serve; raises EngineError when any of its ranks is dead."""
        ...

    async def died(self) -> str:
        """Return, with the reason, only when the engine has died by itself."""
        ...

    async def stop(self) -> None:
        """Stop everything; safe to call twice and after a failed start.

        Requests inside end with an EngineError, and a start that still runs with an EngineStartError.
        """
        ...
