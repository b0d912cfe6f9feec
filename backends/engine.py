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


class Structure(msgspec.Struct, frozen=True):
    """What the answer must look like; the engine masks every token that would break it."""

    kind: Literal["json_object", "json_schema", "regex", "grammar"]
    value: str = ""
    """The JSON schema as JSON text, the regular expression, or the grammar in EBNF; empty for `json_object`."""


class Feature(StrEnum):
    """What a request may ask for that not every engine has, or not as it was started."""

    SEED = "seed"
    MIN_P = "min_p"
    MIN_TOKENS = "min_tokens"
    CACHE_SALT = "cache_salt"
    PRIORITY = "priority"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"
    REGEX = "regex"
    GRAMMAR = "grammar"


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
    structure: Structure | None = None


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
    lora: str | None = None
    """The name of an adapter in `EngineInfo.loras`."""
    priority: int = 0
    """Greater runs earlier, whatever the engine's own order is."""


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
    engine_s: float | None = None
    """On the first chunk, by whoever serves the engine: seconds from the leg's arrival to this chunk."""


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
    first_dp_rank: int = 0
    """Of this node's ranks within the worker's, where every node serves its own; `GenerateRequest.dp_rank` counts from
    0 on each."""
    features: tuple[Feature, ...] = ()
    loras: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    """Names of the commands that `Engine.control` takes here."""


class Pause(msgspec.Struct, frozen=True, tag="pause"):
    """Stop stepping: requests inside keep their KV and go on at Resume, or are aborted."""

    abort: bool = False


class Resume(msgspec.Struct, frozen=True, tag="resume"):
    """Undo Pause."""


class UpdateWeights(msgspec.Struct, frozen=True, tag="update_weights"):
    """Load other weights of the same architecture; cached prefixes are dropped."""

    path: str


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Give the GPU's memory back: weights move to the host's memory, or are dropped where `discard_weights`."""

    discard_weights: bool = False


class Wake(msgspec.Struct, frozen=True, tag="wake"):
    """Undo Sleep; dropped weights need an UpdateWeights after it."""


Command = Pause | Resume | UpdateWeights | Sleep | Wake
"""What a researcher does to a running engine."""


@dataclass(frozen=True, slots=True)
class NodePlace:
    """One of a worker's nodes, as the others need to know it."""

    address: str = "127.0.0.1"
    """Other nodes reach it here; its sockets bind here, but for those an adapter names."""
    ports: tuple[int, ...] = ()
    """Consecutive free ports that belong to this worker alone, for what others must be told beforehand; an adapter
    takes them in order. Everything else may listen on free ports of its engine's choice."""


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
    redundant_experts: int = 0
    node_rank: int = 0
    nodes: tuple[NodePlace, ...] = (NodePlace(),)
    """All of the worker's nodes, in node_rank order; the first is its leader."""
    cores: tuple[int, ...] = ()
    """CPU engines: the cores to compute on, one or more a rank, in rank order. Empty: not pinned."""
    transfer_backend: str = "nixl"
    kv_events: bool = True
    version: str | None = None
    """The engine's version that the configuration is for; None: whichever is installed, if it is supported."""
    launcher: Literal["processes", "ray"] = "processes"
    """`ray`: the leader's engine starts its ranks itself, as Ray actors in the worker's placement group."""
    bundles: tuple[int, ...] = ()
    """The group's bundle of every node, in node_rank order; a bundle holds all of its node's GPUs."""
    loras: Mapping[str, str] = field(default_factory=dict)
    """Adapters by name, and their folders."""
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    """The user's, under the engine's own names; already checked against what we own."""

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    @property
    def place(self) -> NodePlace:
        """This node's."""
        return self.nodes[self.node_rank]

    @property
    def leader(self) -> NodePlace:
        return self.nodes[0]

    @property
    def num_ranks(self) -> int:
        """GPUs, or processes on CPU, of the whole worker."""
        return self.attn_tp * self.attn_dp * self.pp


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

    async def start(self) -> EngineInfo | None:
        """Start and load the model; returns when requests can be served.

        Returns:
            None on a node whose ranks are served through its leader; an EngineInfo on every node that takes requests.

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

    def last_lines(self) -> tuple[str, ...]:
        """The newest lines that its processes on this node wrote, oldest first, at any time; empty without any."""
        ...

    async def check_health(self) -> None:
        """Return if the engine can serve; raises EngineError when any of its ranks is dead."""
        ...

    async def died(self) -> str:
        """Return, with the reason, only when the engine has died by itself."""
        ...

    async def control(self, command: Command) -> None:
        """Carry out a command on this node's share; returns when it has taken effect.

        Raises:
            EngineError: This engine has no such command, or not as it was started (not retryable, names the engine
                argument that would give it), or it failed.
        """
        ...

    async def stop(self) -> None:
        """Stop everything; safe to call twice and after a failed start.

        Requests inside end with an EngineError, and a start that still runs with an EngineStartError.
        """
        ...
