"""An engine without a model: the same contract, a timed model of the steps, exact KV bookkeeping.

Its tokens are a function of every token before them, so that a replayed request continues as it would have, and
a decode leg's tokens are a function of the KV it was handed, not of the prompt it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import zlib
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from backends.engine import (
    EngineError,
    EngineInfo,
    EngineStartError,
    FinishReason,
    GenerateRequest,
    HandoffStyle,
    KVEventSource,
    KVHandoff,
    LaunchSpec,
    RankLoad,
    Role,
    TokenChunk,
    TokenLogprob,
)
from backends.kv_events import KVEventBatch
from backends.kv_publisher import KVEventPublisher
from backends.simulated_cache import BlockPool, Lease
from backends.simulated_fabric import Fabric

VERSION = "1"
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True)
class SimulatedArgs:
    """What `engine_args` may hold for this backend."""

    block_size: int = 16
    kv_blocks: int = 8192
    """Per DP rank."""
    max_model_len: int = 8192
    max_running: int = 512
    """Requests that step together, per DP rank."""
    max_batched_tokens: int = 8192
    """Prompt tokens computed in one step, per DP rank; longer prompts take several."""
    step_s: float = 0.01
    """A step that only decodes."""
    prefill_tokens_per_s: float = 100_000.0
    transfer_tokens_per_s: float = 1_000_000.0
    start_s: float = 0.0
    handoff: HandoffStyle = "sequential"
    lease_s: float = 30.0
    """How long a prefill leg's KV waits for its decode side."""
    token_low: int = 97
    token_high: int = 122
    """Tokens are drawn from this closed range; the default is a to z in the byte tokenizer."""


def parse_args(given: Mapping[str, Any]) -> SimulatedArgs:
    """Check `engine_args`.

    Raises:
        EngineStartError: A key is unknown, or a value has the wrong type or sign; names it.
    """
    known = {f.name: f for f in fields(SimulatedArgs)}
    for key, value in given.items():
        if key not in known:
            raise EngineStartError(f"engine_args.{key}: unknown to the simulated engine; it has {', '.join(known)}")
        wanted = type(getattr(SimulatedArgs(), key))
        if not isinstance(value, (int, float) if wanted is float else wanted) or isinstance(value, bool):
            raise EngineStartError(f"engine_args.{key}: {value!r} is not of type {wanted.__name__}")
        if isinstance(value, (int, float)) and value < (0 if key in ("step_s", "start_s", "token_low") else 1e-9):
            raise EngineStartError(f"engine_args.{key}: {value!r} is too small")
    args = SimulatedArgs(**given)
    if args.handoff not in ("sequential", "concurrent"):
        raise EngineStartError(f"engine_args.handoff: {args.handoff!r}; use 'sequential' or 'concurrent'")
    if args.token_high < args.token_low:
        raise EngineStartError("engine_args.token_high: must not be below token_low")
    return args


@dataclass(slots=True, eq=False)
class _Sequence:
    """A request inside the engine."""

    request: GenerateRequest
    rank: int
    tokens: list[int]
    """Prompt and answer."""
    state: int
    """Stands for the KV: a fold over every token before the next one."""
    seed: int | None
    out: asyncio.Queue[TokenChunk | EngineError] = field(default_factory=asyncio.Queue)
    lease: Lease | None = None
    computed: int = 0
    """Tokens whose KV is there."""
    transferred: int = 0
    cached: int = 0
    started: bool = False
    done: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.token_ids)


class SimulatedEngine:
    """See `backends.engine.Engine`; all DP ranks step in lockstep, as those of a WideEP engine do."""

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self._ranks: list[BlockPool] = []
        self._waiting: list[deque[_Sequence]] = []
        self._running: list[list[_Sequence]] = []
        self._live: dict[str, _Sequence] = {}
        self._held: dict[str, tuple[int, Lease, asyncio.TimerHandle]] = {}
        self._held_keys: dict[str, str] = {}
        """Request id -> the fabric's key; they differ when a dispatcher chose the room."""
        self._publishers: list[KVEventPublisher] = []
        self._sequence_numbers: list[int] = []
        self._work = asyncio.Event()
        self._death: asyncio.Future[str] | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._fabric: Fabric | None = None
        self._next_rank = 0
        self.args = SimulatedArgs()
        self.computed_tokens = 0
        """Prompt tokens computed here; what came from a cache or a peer is not among them."""

    async def start(self) -> EngineInfo:
        self.args = args = parse_args(self.spec.engine_args)
        spec, ranks = self.spec, self.spec.attn_dp
        await asyncio.sleep(args.start_s)
        self._death = asyncio.get_running_loop().create_future()
        self._ranks = [BlockPool(args.kv_blocks, args.block_size) for _ in range(ranks)]
        self._waiting = [deque() for _ in range(ranks)]
        self._running = [[] for _ in range(ranks)]
        if spec.kv_events:
            self._publishers = [KVEventPublisher(spec.node_address) for _ in range(ranks)]
            self._sequence_numbers = [0] * ranks
        self._fabric = Fabric(spec.node_address, self._release_held, listen=spec.role is Role.PREFILL)
        address = await self._fabric.start()
        self._loop_task = asyncio.create_task(self._run(), name=f"simulated-{spec.worker}")
        return EngineInfo(
            backend="simulated",
            version=VERSION,
            model=spec.model,
            role=spec.role,
            attn_dp_size=ranks,
            block_size=args.block_size,
            max_model_len=args.max_model_len,
            kv_total_blocks=args.kv_blocks,
            handoff="none" if spec.role is Role.AGGREGATED else args.handoff,
            kv_event_sources=tuple(
                KVEventSource(rank, p.endpoint, p.replay_endpoint, "simulated-1")
                for rank, p in enumerate(self._publishers)
            ),
            bootstrap_address=address if args.handoff == "concurrent" else None,
            max_logprobs=MAX_LOGPROBS,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        sequence = self._admit(request)
        self._live[request.request_id] = sequence
        try:
            if request.leg is Role.DECODE:
                await self._pull(sequence)
            self._waiting[sequence.rank].append(sequence)
            self._work.set()
            while True:
                item = await sequence.out.get()
                if isinstance(item, EngineError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._live.get(request.request_id) is sequence:
                del self._live[request.request_id]
            self._drop(sequence)
            if request.leg is Role.PREFILL and request.request_id not in self._held_keys and self._fabric is not None:
                self._fabric.withdraw(self._fabric.key_of(request))

    async def abort(self, request_id: str) -> None:
        sequence = self._live.get(request_id)
        if sequence is not None and not sequence.done:
            self._drop(sequence)
            sequence.out.put_nowait(TokenChunk(request_id, [], "abort"))

    async def release(self, request_id: str) -> None:
        if request_id in self._held_keys:
            self._release_held(self._held_keys[request_id])

    def load(self) -> tuple[RankLoad, ...]:
        return tuple(
            RankLoad(rank, len(self._running[rank]), len(self._waiting[rank]), pool.used_blocks, pool.num_blocks)
            for rank, pool in enumerate(self._ranks)
        )

    async def check_health(self) -> None:
        if self._death is None or self._death.done() or self._loop_task is None or self._loop_task.done():
            raise EngineError("the simulated engine is not running")

    async def died(self) -> str:
        assert self._death is not None, "start() comes first"
        return await asyncio.shield(self._death)

    def kill(self, reason: str) -> None:
        """Die as a crashed process would: every request is lost, nothing more is served."""
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        if self._loop_task is not None:
            self._loop_task.cancel()
        for sequence in list(self._live.values()):
            sequence.out.put_nowait(EngineError(f"the engine died: {reason}"))

    async def stop(self) -> None:
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None
        for _, _, timer in self._held.values():
            timer.cancel()
        self._held.clear()
        for publisher in self._publishers:
            await publisher.close()
        self._publishers = []
        if self._fabric is not None:
            await self._fabric.stop()
            self._fabric = None
        for sequence in list(self._live.values()):
            sequence.out.put_nowait(EngineError("the engine was stopped"))

    def _admit(self, request: GenerateRequest) -> _Sequence:
        """Refuse what can never run; otherwise make its sequence."""
        args, prompt = self.args, request.token_ids
        if self._loop_task is None or self._loop_task.done():
            raise EngineError("the simulated engine is not running")
        if not prompt:
            raise EngineError("the prompt is empty", retryable=False, field="prompt")
        if request.dp_rank is not None and not 0 <= request.dp_rank < len(self._ranks):
            raise EngineError(
                f"dp_rank {request.dp_rank} is not in 0..{len(self._ranks) - 1}", retryable=False, field="dp_rank"
            )
        room = min(args.max_model_len, args.kv_blocks * args.block_size)
        if len(prompt) >= room:
            raise EngineError(
                f"the prompt has {len(prompt)} tokens; at most {room - 1} fit", retryable=False, field="prompt"
            )
        if (request.sampling.logprobs or 0) > MAX_LOGPROBS:
            raise EngineError(f"at most {MAX_LOGPROBS} logprobs", retryable=False, field="logprobs")
        if (request.leg is Role.DECODE) != (request.handoff is not None) and self.args.handoff == "sequential":
            raise EngineError("a decode leg needs a handoff, and only it", retryable=False, field="handoff")
        if request.request_id in self._live:
            raise EngineError(f"request {request.request_id} is already here", retryable=False, field="request_id")
        greedy = request.sampling.temperature == 0.0
        seed = (
            None if greedy else request.sampling.seed if request.sampling.seed is not None else random.getrandbits(31)
        )
        rank = request.dp_rank
        if rank is None:
            rank = self._next_rank
            self._next_rank = (rank + 1) % len(self._ranks)
        return _Sequence(request, rank, list(prompt), _fold(prompt), seed)

    async def _pull(self, sequence: _Sequence) -> None:
        """Wait for the prefill side's KV, as long as its bytes take."""
        assert self._fabric is not None
        assert sequence.request.handoff is not None
        state, num_tokens = await self._fabric.pull(sequence.request.handoff)
        await asyncio.sleep(num_tokens / self.args.transfer_tokens_per_s)
        await self._fabric.landed(sequence.request.handoff)
        sequence.state = state
        sequence.transferred = num_tokens

    async def _run(self) -> None:
        while True:
            self._admit_waiting()
            if not any(self._running):
                self._work.clear()
                self._publish()
                if not any(self._waiting):
                    await self._work.wait()
                else:
                    await asyncio.sleep(self.args.step_s or 0.001)
                continue
            plan = [self._plan_rank(running) for running in self._running]
            slowest = max(sum(count for _, count in steps) for steps in plan)
            await asyncio.sleep(self.args.step_s + slowest / self.args.prefill_tokens_per_s)
            for rank, steps in enumerate(plan):
                for sequence, count in steps:
                    if sequence.lease is not None:  # neither finished nor preempted since the step was planned
                        self._advance(rank, sequence, count)
            self._publish()

    def _admit_waiting(self) -> None:
        for rank, waiting in enumerate(self._waiting):
            pool, running = self._ranks[rank], self._running[rank]
            while waiting and len(running) < self.args.max_running:
                sequence = waiting[0]
                lease = pool.acquire(sequence.tokens, sequence.request.cache_salt)
                if lease is None:
                    break
                waiting.popleft()
                sequence.lease = lease
                sequence.cached = len(lease.shared) * pool.block_size
                sequence.computed = sequence.cached
                if sequence.transferred and not sequence.num_generated:
                    sequence.computed = max(sequence.cached, len(sequence.tokens) - 1)
                running.append(sequence)

    def _plan_rank(self, running: list[_Sequence]) -> list[tuple[_Sequence, int]]:
        """Which sequences step, and how many prompt tokens each computes beyond the one a decode step costs."""
        budget, plan = self.args.max_batched_tokens, []
        for sequence in running:
            missing = len(sequence.tokens) - sequence.computed
            if missing > 1:
                missing = min(missing, budget)
                budget -= missing
                if missing:
                    plan.append((sequence, missing))
            else:
                plan.append((sequence, 0))
        return plan

    def _advance(self, rank: int, sequence: _Sequence, prompt_tokens: int) -> None:
        pool = self._ranks[rank]
        assert sequence.lease is not None
        sequence.computed += prompt_tokens
        self.computed_tokens += prompt_tokens
        if sequence.computed < len(sequence.tokens) - (0 if prompt_tokens else 1):
            return
        sequence.computed = len(sequence.tokens)
        pool.publish_full(sequence.lease, sequence.tokens)
        if sequence.request.leg is Role.PREFILL:
            self._finish_prefill(sequence)
            return
        if not pool.extend(sequence.lease, len(sequence.tokens) + 1):
            self._preempt(rank, sequence)
            return
        self._emit(sequence)

    def _emit(self, sequence: _Sequence) -> None:
        request, args = sequence.request, self.args
        token = _next_token(sequence.state, sequence.seed, len(sequence.tokens), args)
        sequence.state = _fold([token], sequence.state)
        sequence.tokens.append(token)
        sampling, count = request.sampling, sequence.num_generated
        reason: FinishReason | None = None
        if token in sampling.stop_token_ids and count >= sampling.min_tokens:
            reason = "stop"
        elif count >= sampling.max_tokens or len(sequence.tokens) >= args.max_model_len:
            reason = "length"
        first = not sequence.started
        sequence.started = True
        chunk = TokenChunk(
            request.request_id,
            [token],
            reason,
            logprobs=None if sampling.logprobs is None else [_logprob(token, sampling.logprobs, args)],
            cached_tokens=sequence.cached if first else None,
            transferred_tokens=sequence.transferred if first and request.leg is Role.DECODE else None,
        )
        if reason is not None:
            self._drop(sequence)
        sequence.out.put_nowait(chunk)

    def _finish_prefill(self, sequence: _Sequence) -> None:
        assert self._fabric is not None
        assert sequence.lease is not None
        request = sequence.request
        key = self._fabric.key_of(request)
        timer = asyncio.get_running_loop().call_later(self.args.lease_s, self._release_held, key)
        self._held[key] = (sequence.rank, sequence.lease, timer)
        self._held_keys[request.request_id] = key
        sequence.lease = None
        handoff = self._fabric.offer(key, sequence.state, len(sequence.tokens))
        self._drop(sequence)
        sequential = self.args.handoff == "sequential"
        sequence.out.put_nowait(
            TokenChunk(
                request.request_id,
                [],
                "length",
                cached_tokens=sequence.cached,
                handoff=KVHandoff(handoff) if sequential else None,
            )
        )

    def _preempt(self, rank: int, sequence: _Sequence) -> None:
        """Out of blocks: the newest sequence gives up its own and starts over, tokens kept."""
        victim = self._running[rank].pop()
        assert victim.lease is not None
        self._ranks[rank].release(victim.lease)
        victim.lease = None
        victim.computed = 0
        self._waiting[rank].appendleft(victim)
        if victim is not sequence:
            sequence.computed = len(sequence.tokens) - 1

    def _drop(self, sequence: _Sequence) -> None:
        """Take a sequence out of the engine and free its blocks; safe to call twice."""
        sequence.done = True
        if not self._ranks:
            return
        with contextlib.suppress(ValueError):
            self._running[sequence.rank].remove(sequence)
        with contextlib.suppress(ValueError):
            self._waiting[sequence.rank].remove(sequence)
        if sequence.lease is not None:
            self._ranks[sequence.rank].release(sequence.lease)
            sequence.lease = None

    def _release_held(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._held_keys = {request_id: k for request_id, k in self._held_keys.items() if k != key}
            rank, lease, timer = held
            timer.cancel()
            self._ranks[rank].release(lease)
        if self._fabric is not None:
            self._fabric.withdraw(key)

    def _publish(self) -> None:
        for rank, pool in enumerate(self._ranks):
            events, pool.events = pool.events, []
            if events and self._publishers:
                self._publishers[rank].publish(KVEventBatch(self._sequence_numbers[rank], rank, events))
                self._sequence_numbers[rank] += 1


def _fold(tokens: list[int], state: int = 0) -> int:
    """A 32-bit fold over tokens; folding a then b equals folding a+b."""
    return zlib.crc32(array("I", tokens).tobytes(), state)


def _next_token(state: int, seed: int | None, position: int, args: SimulatedArgs) -> int:
    mixed = state if seed is None else hash((state, seed, position))
    return args.token_low + (mixed * 2_654_435_761 >> 8) % (args.token_high - args.token_low + 1)


def _logprob(token: int, num_top: int, args: SimulatedArgs) -> TokenLogprob:
    """Half the mass on the chosen token, halving for each alternative after it."""
    span = args.token_high - args.token_low + 1
    others = [args.token_low + (token - args.token_low + i) % span for i in range(min(num_top, span))]
    return TokenLogprob(token, -0.6931, [(other, -0.6931 * (i + 1)) for i, other in enumerate(others)])
