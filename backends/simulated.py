"""An engine without a model: the same contract, a timed model of the steps, exact KV bookkeeping.

Its tokens are a function of every token before them, so that a replayed request continues as it would have, and
a decode leg's tokens are a function of the KV it was handed, not of the prompt it was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import get_args

from backends import admission
from backends.engine import (
    Command,
    EngineError,
    EngineInfo,
    EngineStartError,
    Feature,
    FinishReason,
    GenerateRequest,
    KVEventSource,
    KVHandoff,
    LaunchSpec,
    Pause,
    RankLoad,
    Role,
    Sleep,
    TokenChunk,
    UpdateWeights,
)
from backends.failures import start_error
from backends.kv_events import KVEventBatch
from backends.kv_publisher import KVEventPublisher
from backends.simulated_args import SimulatedArgs, parse_args
from backends.simulated_cache import BlockPool, Family, Lease
from backends.simulated_condition import Condition
from backends.simulated_fabric import Fabric, key_of
from backends.simulated_tokens import first_state, fold, logprob, next_token
from backends.startup import Startup

VERSION = "1"
MAX_LOGPROBS = 20
VOCAB_SIZE = 1 << 32
"""What a fold over tokens takes; models differ, and this engine stands for any of them."""
FEATURES = (Feature.SEED, Feature.MIN_TOKENS, Feature.CACHE_SALT, Feature.PRIORITY)
"""What it really does; without a vocabulary there is no structure that an answer could keep to."""
CONTROLS = tuple(command.__struct_config__.tag for command in get_args(Command))


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
    pull: asyncio.Task[None] | None = None
    """On a decode leg, once it has blocks: fetches the KV into them."""
    computed: int = 0
    """Tokens whose KV is there."""
    transferred: int = 0
    cached: int = 0
    started: bool = False
    done: bool = False

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.token_ids)


@dataclass(frozen=True, slots=True)
class _Held:
    """What a finished prefill leg keeps for its decode side."""

    request_id: str
    rank: int
    lease: Lease
    timer: asyncio.TimerHandle


class SimulatedEngine:
    """See `backends.engine.Engine`; all DP ranks step in lockstep, as those of a WideEP engine do.

    A request waits until its blocks are there. A decode leg then fetches the KV into them, and counts as waiting
    until it has landed.
    """

    def __init__(self, spec: LaunchSpec) -> None:
        self.spec = spec
        self.info: EngineInfo | None = None
        self._startup = Startup()
        self._ranks: list[BlockPool] = []
        self._waiting: list[deque[_Sequence]] = []
        self._pulling: list[list[_Sequence]] = []
        self._running: list[list[_Sequence]] = []
        self._live: dict[str, _Sequence] = {}
        self._held: dict[str, _Held] = {}
        """By the fabric's key, which is not the request's id where a dispatcher chose the room."""
        self._publishers: list[KVEventPublisher] = []
        self._sequence_numbers: list[int] = []
        self._work = asyncio.Event()
        self._death: asyncio.Future[str] | None = None
        self._loop_task: asyncio.Task[None] | None = None
        self._fabric = Fabric(spec.place.address, self._release_held)
        self._next_rank = 0
        self._going = asyncio.Event()
        self._going.set()
        self._condition = Condition()
        self.args = SimulatedArgs()
        self.computed_tokens = 0
        """Prompt tokens computed here; what came from a cache or a peer is not among them."""

    async def start(self) -> EngineInfo | None:
        return await self._startup.run(self._start())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk]:
        sequence = self._admit(request)
        handed_over = False
        try:
            while True:
                item = await sequence.out.get()
                if isinstance(item, EngineError):
                    raise item
                handed_over = item.finish_reason == "length"
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            del self._live[request.request_id]
            self._drop(sequence)
            if request.leg is Role.PREFILL and not handed_over:
                self._release_held(key_of(request))

    async def abort(self, request_id: str) -> None:
        sequence = self._live.get(request_id)
        if sequence is not None:
            self._abort(sequence)

    async def release(self, request_id: str) -> None:
        for key in [key for key, held in self._held.items() if held.request_id == request_id]:
            self._release_held(key)

    def load(self) -> tuple[RankLoad, ...]:
        return tuple(
            RankLoad(
                rank,
                len(self._running[rank]),
                len(self._waiting[rank]) + len(self._pulling[rank]),
                pool.used_blocks,
                pool.num_blocks,
            )
            for rank, pool in enumerate(self._ranks)
        )

    def last_lines(self) -> tuple[str, ...]:
        wrote = self.args.last_line and self.args.failing_node == self.spec.node_rank
        return (self.args.last_line,) if wrote else ()

    async def check_health(self) -> None:
        self._check_alive()

    async def died(self) -> str:
        assert self._death is not None, "start() comes first"
        return await asyncio.shield(self._death)

    def kill(self, reason: str) -> None:
        """Die as a crashed process would: every request is lost, no peer gets KV, nothing more is served."""
        if self._death is not None and not self._death.done():
            self._death.set_result(reason)
        if self._loop_task is not None:
            self._loop_task.cancel()
        self._fabric.close()
        self._lose_all(f"the engine died: {reason}")

    async def control(self, command: Command) -> None:
        """Sleeping aborts what is inside, as pausing with `abort` does; what comes while paused waits."""
        self._check_alive()
        self._condition = self._condition.after(command, self.spec.model_path)
        if isinstance(command, Sleep) or (isinstance(command, Pause) and command.abort):
            for sequence in self._live.values():
                self._abort(sequence)
        if isinstance(command, Sleep):  # the memory goes, and with it what waits there for a decode side
            for key in list(self._held):
                self._release_held(key)
        if isinstance(command, Sleep | UpdateWeights):
            for pool in self._ranks:
                pool.flush()
            self._publish()
        if self._condition.steps:
            self._going.set()
        else:
            self._going.clear()

    async def stop(self) -> None:
        await self._startup.end()
        await self._shut_down()

    def _local_ranks(self) -> range:
        """Of the worker's, those this node serves.

        Raises:
            EngineStartError: They cannot be shared out.
        """
        spec = self.spec
        if self.args.serving == "leader":
            return range(spec.attn_dp if spec.node_rank == 0 else 0)
        if spec.attn_dp % spec.num_nodes:
            raise EngineStartError(
                f"engine_args.serving: every_node needs as many ranks on each; attn_dp={spec.attn_dp} does not divide "
                f"by {spec.num_nodes} nodes"
            )
        count = spec.attn_dp // spec.num_nodes
        return range(spec.node_rank * count, (spec.node_rank + 1) * count)

    async def _start(self) -> EngineInfo | None:
        spec = self.spec
        self.args = args = parse_args(spec.engine_args)
        ranks = self._local_ranks()
        await asyncio.sleep(args.start_s)
        if args.failing_node == spec.node_rank:
            raise start_error(self.last_lines(), "simulated", spec.role)
        address = await self._listen(len(ranks))
        self._death = asyncio.get_running_loop().create_future()
        self._ranks = [BlockPool(args.kv_blocks, args.block_size, args.prefix_caching) for _ in ranks]
        self._waiting = [deque() for _ in ranks]
        self._pulling = [[] for _ in ranks]
        self._running = [[] for _ in ranks]
        self._sequence_numbers = [0] * len(ranks)
        self._loop_task = asyncio.create_task(self._run(), name=f"simulated-{spec.worker}")
        if not ranks:
            return None
        self.info = EngineInfo(
            backend="simulated",
            version=VERSION,
            model=spec.model,
            role=spec.role,
            attn_dp_size=len(ranks),
            block_size=args.block_size,
            max_model_len=args.max_model_len,
            kv_total_blocks=args.kv_blocks,
            handoff="none" if spec.role is Role.AGGREGATED else args.handoff,
            caches_prefixes=args.prefix_caching,
            kv_event_sources=tuple(
                KVEventSource(rank, p.endpoint, p.replay_endpoint, "simulated-1")
                for rank, p in enumerate(self._publishers)
            ),
            bootstrap_address=address if args.handoff == "concurrent" else None,
            max_logprobs=MAX_LOGPROBS,
            first_dp_rank=ranks.start,
            features=FEATURES,
            loras=tuple(spec.loras),
            controls=CONTROLS,
        )
        return self.info

    async def _listen(self, num_ranks: int) -> str | None:
        """Open the ranks' publishers and, of a prefill engine, the rendezvous; returns its address."""
        spec = self.spec
        try:
            if spec.kv_events and self.args.prefix_caching:
                for _ in range(num_ranks):
                    self._publishers.append(KVEventPublisher(spec.place.address))
            return await self._fabric.listen() if spec.role is Role.PREFILL and num_ranks else None
        except OSError as error:
            await self._shut_down()
            raise EngineStartError(f"the simulated engine cannot listen on {spec.place.address}: {error}") from error

    async def _shut_down(self) -> None:
        self._lose_all("the engine was stopped")
        if self._loop_task is not None:
            self._loop_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._loop_task
            self._loop_task = None
        for held in self._held.values():
            held.timer.cancel()
        self._held.clear()
        for publisher in self._publishers:
            await publisher.close()
        self._publishers = []
        self._fabric.close()

    def _check_alive(self) -> None:
        if self._death is not None and self._death.done():
            raise EngineError(f"the simulated engine died: {self._death.result()}")
        if self._loop_task is None or self._loop_task.done():
            raise EngineError("the simulated engine is not running")

    def _check_serving(self) -> EngineInfo:
        self._check_alive()
        if self.info is None:
            raise EngineError("this node's ranks are served through its leader", retryable=False)
        return self.info

    def _admit(self, request: GenerateRequest) -> _Sequence:
        """Refuse what can never run, and what cannot now; queue the rest."""
        admission.check(request, self._check_serving(), VOCAB_SIZE)
        if self._condition.refusal is not None:
            raise EngineError(self._condition.refusal)
        admission.check_new(request, self._live)
        prompt, sampling = request.token_ids, request.sampling
        seed = sampling.seed if sampling.seed is not None else random.getrandbits(31)
        rank = request.dp_rank
        if rank is None:
            rank = self._next_rank
            self._next_rank = (rank + 1) % len(self._ranks)
        state = fold(prompt, first_state(self._condition.weights or "", request.lora))
        sequence = _Sequence(request, rank, list(prompt), state, None if sampling.temperature == 0.0 else seed)
        self._live[request.request_id] = sequence
        self._queue(sequence)
        self._work.set()
        return sequence

    async def _pull(self, sequence: _Sequence, handoff: KVHandoff) -> None:
        """Fetch the KV that is not cached here, as long as its bytes take; then the sequence runs."""
        try:
            state, num_tokens = await self._fabric.pull(handoff)
            sequence.transferred = num_tokens - sequence.cached
            await asyncio.sleep(sequence.transferred / self.args.transfer_tokens_per_s)
            await self._fabric.landed(handoff)
        except EngineError as error:
            sequence.out.put_nowait(error)
            return
        sequence.state = state
        # The last token is computed here in any case: the next one follows from it.
        sequence.computed = len(sequence.tokens) - 1
        self._pulling[sequence.rank].remove(sequence)
        self._running[sequence.rank].append(sequence)
        self._work.set()

    def _queue(self, sequence: _Sequence, again: bool = False) -> None:
        """Behind all of its priority; before them where it is there `again`."""
        waiting, priority = self._waiting[sequence.rank], sequence.request.priority
        place = len(waiting)
        while place and (waiting[place - 1].request.priority < priority + again):
            place -= 1
        waiting.insert(place, sequence)

    async def _run(self) -> None:
        while True:
            await self._going.wait()
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
            await self._going.wait()
            for rank, steps in enumerate(plan):
                for sequence, count in steps:
                    if sequence.lease is not None:  # neither finished nor preempted since the step was planned
                        self._advance(rank, sequence, count)
            self._publish()

    def _admit_waiting(self) -> None:
        for rank, waiting in enumerate(self._waiting):
            running, pulling = self._running[rank], self._pulling[rank]
            while waiting and len(running) + len(pulling) < self.args.max_running and self._allocate(waiting[0]):
                sequence = waiting.popleft()
                request = sequence.request
                if request.leg is Role.DECODE and sequence.pull is None:
                    assert request.handoff is not None
                    pulling.append(sequence)
                    sequence.pull = asyncio.create_task(self._pull(sequence, request.handoff))
                else:
                    running.append(sequence)

    def _allocate(self, sequence: _Sequence) -> bool:
        """Hold blocks for what the sequence has; False when there are not enough."""
        pool = self._ranks[sequence.rank]
        request = sequence.request
        sequence.lease = pool.acquire(sequence.tokens, Family(request.cache_salt, request.lora))
        if sequence.lease is None:
            return False
        sequence.cached = sequence.computed = len(sequence.lease.shared) * pool.block_size
        return True

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
        if not sequence.num_generated:  # Else it was preempted, and its prompt has been counted.
            self.computed_tokens += prompt_tokens
        if sequence.computed < len(sequence.tokens) - (0 if prompt_tokens else 1):
            return
        sequence.computed = len(sequence.tokens)
        pool.publish_full(sequence.lease, sequence.tokens)
        if sequence.request.leg is Role.PREFILL:
            self._finish_prefill(sequence)
            return
        while not pool.extend(sequence.lease, len(sequence.tokens) + 1):
            self._preempt_newest(rank)
            if sequence.lease is None:
                return
        self._emit(sequence)

    def _emit(self, sequence: _Sequence) -> None:
        request, args = sequence.request, self.args
        token = next_token(sequence.state, sequence.seed, len(sequence.tokens), args)
        sequence.state = fold([token], sequence.state)
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
            logprobs=None if sampling.logprobs is None else [logprob(token, sampling.logprobs, args)],
            cached_tokens=sequence.cached if first else None,
            transferred_tokens=sequence.transferred if first and request.leg is Role.DECODE else None,
        )
        if reason is not None:
            self._drop(sequence)
        sequence.out.put_nowait(chunk)

    def _finish_prefill(self, sequence: _Sequence) -> None:
        assert sequence.lease is not None
        request = sequence.request
        key = key_of(request)
        timer = asyncio.get_running_loop().call_later(self.args.lease_s, self._release_held, key)
        self._held[key] = _Held(request.request_id, sequence.rank, sequence.lease, timer)
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

    def _preempt_newest(self, rank: int) -> None:
        """Out of blocks: the newest sequence gives up its own and starts over, tokens kept."""
        victim = self._running[rank].pop()
        assert victim.lease is not None
        self._ranks[rank].release(victim.lease)
        victim.lease = None
        self._queue(victim, again=True)

    def _drop(self, sequence: _Sequence) -> None:
        """Take a sequence out of the engine and free its blocks; safe to call twice."""
        sequence.done = True
        for place in (self._waiting, self._pulling, self._running):
            with contextlib.suppress(ValueError):
                place[sequence.rank].remove(sequence)
        if sequence.pull is not None:
            sequence.pull.cancel()
        if sequence.lease is not None:
            self._ranks[sequence.rank].release(sequence.lease)
            sequence.lease = None

    def _abort(self, sequence: _Sequence) -> None:
        if not sequence.done:
            self._drop(sequence)
            sequence.out.put_nowait(TokenChunk(sequence.request.request_id, [], "abort"))

    def _lose_all(self, reason: str) -> None:
        for sequence in self._live.values():
            self._drop(sequence)
            sequence.out.put_nowait(EngineError(reason))

    def _release_held(self, key: str) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            held.timer.cancel()
            self._ranks[held.rank].release(held.lease)
        self._fabric.withdraw(key)

    def _publish(self) -> None:
        for rank, pool in enumerate(self._ranks):
            events, pool.events = pool.events, []
            if events and self._publishers:
                self._publishers[rank].publish(KVEventBatch(self._sequence_numbers[rank], rank, events))
                self._sequence_numbers[rank] += 1
