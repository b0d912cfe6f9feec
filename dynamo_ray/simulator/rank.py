"""One DP rank of an engine as a model: its paged prefix cache, its batch, and how long a step of it takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from backends.engine import RankLoad, Role
from backends.simulated_cache import BlockPool, Lease


@dataclass(frozen=True, slots=True)
class RankModel:
    """How much a rank holds, and how fast it is.

    A step takes step_s + prompt tokens / prefill_tokens_per_s + decoding * sequence_s + their KV * kv_token_s.
    """

    block_size: int = 16
    kv_total_blocks: int = 8192
    max_running: int = 512
    max_batched_tokens: int = 8192
    """Tokens of one step: one for each leg that decodes, the rest for prompts, oldest first."""
    prefill_tokens_per_s: float = 100_000.0
    step_s: float = 0.01
    sequence_s: float = 0.0
    kv_token_s: float = 0.0
    transfer_tokens_per_s: float = 1_000_000.0

    def __post_init__(self) -> None:
        """Raises ValueError naming what can be no rank's."""
        for name in self.__slots__:
            value, may_be_zero = getattr(self, name), name in ("step_s", "sequence_s", "kv_token_s")
            whole = name in ("block_size", "kv_total_blocks", "max_running", "max_batched_tokens")
            if not isinstance(value, int if whole else int | float):
                raise ValueError(f"{name}: {value!r} is no {'whole ' if whole else ''}number")
            if not 0 <= value < inf or (value == 0 and not may_be_zero):
                raise ValueError(f"{name}: {value:g} is not {'0 or more' if may_be_zero else 'above 0'}")

    def step_time_s(self, prompt_tokens: int, sequences: int, kv_tokens: float) -> float:
        return (
            self.step_s
            + prompt_tokens / self.prefill_tokens_per_s
            + sequences * self.sequence_s
            + kv_tokens * self.kv_token_s
        )


@dataclass(slots=True, eq=False)
class Leg:
    """One leg of a request inside a rank. It holds blocks for prompt and answer from its admission to its end."""

    number: int
    tokens: list[int]
    """Prompt and answer."""
    prompt_tokens: int
    role: Role
    lease: Lease | None = None
    computed: int = 0
    """Prompt tokens whose KV is there."""
    cached: int = 0
    """Of them, those found in this rank's cache."""

    @property
    def missing(self) -> int:
        return self.prompt_tokens - self.computed


class What(Enum):
    """What a step brought a leg."""

    ADMITTED = "admitted"
    """A decode leg has its blocks; its KV may come."""
    FIRST_TOKEN = "first token"
    FINISHED = "finished"
    """A prefill leg has computed its prompt and still holds its blocks; any other leg has its whole answer and none."""


class Outcome(NamedTuple):
    leg: Leg
    what: What


@dataclass(slots=True)
class Rank:
    """Continuous batching with chunked prefill: who is admitted runs to its end, nobody is preempted.

    A step is `plan`, then `advance` when its time is over.
    """

    model: RankModel
    dp_rank: int = 0
    caches_prefixes: bool = True
    steps: int = 0
    prefilled_tokens: int = 0
    decoded_tokens: int = 0
    pool: BlockPool = field(init=False)
    _waiting: deque[Leg] = field(default_factory=deque)
    _pulling: int = 0
    _prefilling: list[Leg] = field(default_factory=list)
    _chunks: list[tuple[Leg, int]] = field(default_factory=list)
    _landed: list[Leg] = field(default_factory=list)
    _fresh: list[Leg] = field(default_factory=list)
    """Decoding, and still without a token."""
    _decoding: list[tuple[int, int, Leg]] = field(default_factory=list)
    """A heap by the step that brings the last token."""
    _kv_tokens: int = 0
    _full: bool = False
    """The first that waits did not fit, and nothing was freed since."""

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.model.kv_total_blocks, self.model.block_size, self.caches_prefixes)

    @property
    def num_running(self) -> int:
        return self._pulling + len(self._prefilling) + len(self._landed) + len(self._decoding)

    @property
    def idle(self) -> bool:
        """Nothing to step for; decode legs may still wait for their KV."""
        return not (self._chunks or self._decoding)

    @property
    def work_tokens(self) -> int:
        """Prompt tokens computed and answer tokens decoded."""
        return self.prefilled_tokens + self.decoded_tokens

    def load(self) -> RankLoad:
        return RankLoad(
            self.dp_rank,
            len(self._prefilling) + len(self._decoding),
            len(self._waiting) + self._pulling + len(self._landed),
            self.pool.used_blocks,
            self.pool.num_blocks,
        )

    def fits(self, tokens: int) -> bool:
        """Whether a leg of so many tokens can ever be admitted."""
        return -(-tokens // self.model.block_size) <= self.model.kv_total_blocks

    def submit(self, leg: Leg) -> None:
        """Queue; it joins no step that has begun."""
        self._waiting.append(leg)

    def landed(self, leg: Leg) -> None:
        """The KV of an admitted decode leg is there."""
        self._pulling -= 1
        self._landed.append(leg)

    def release(self, leg: Leg) -> None:
        """Free a leg's blocks; those that are full stay findable until evicted."""
        assert leg.lease is not None, "a leg is released once, after it was admitted"
        self.pool.release(leg.lease)
        leg.lease = None
        self._full = False

    def plan(self) -> list[Outcome]:
        """Settle what the next step does; who was admitted for it and waits for KV."""
        for leg in self._landed:
            self._publish(leg, leg.prompt_tokens)
            self._start_decoding(leg, len(leg.tokens) - leg.prompt_tokens)
            self._fresh.append(leg)
        self._landed.clear()
        budget = self.model.max_batched_tokens - len(self._decoding)
        self._chunks = []
        for leg in self._prefilling:
            budget -= self._take(leg, budget)
        admitted = []
        while self._waiting and budget > 0 and self._admit(self._waiting[0]):
            leg = self._waiting.popleft()
            if leg.role is Role.DECODE:
                self._pulling += 1
                admitted.append(Outcome(leg, What.ADMITTED))
            else:
                self._prefilling.append(leg)
                budget -= self._take(leg, budget)
        return admitted

    def equal_steps(self) -> int | None:
        """For how many steps nothing but the length of answers changes; None: this rank does not care."""
        if self._chunks or self._fresh:
            return 1
        return self._decoding[0][0] - self.steps if self._decoding else None

    def step_time_s(self, steps: int) -> float:
        """The mean of the next `steps`, which must be equal ones."""
        if self.idle:
            return 0.0
        decoding = len(self._decoding)
        prompt_tokens = sum(count for _, count in self._chunks)
        kv_tokens = self._kv_tokens + decoding * (steps - 1) / 2
        return self.model.step_time_s(prompt_tokens, decoding, kv_tokens)

    def advance(self, steps: int) -> Iterator[Outcome]:
        """The planned step is over, and `steps` - 1 equal ones after it."""
        self.steps += steps
        self._kv_tokens += len(self._decoding) * steps
        self.decoded_tokens += len(self._decoding) * steps
        for leg in self._fresh:
            yield Outcome(leg, What.FIRST_TOKEN)
        self._fresh.clear()
        while self._decoding and self._decoding[0][0] == self.steps:
            leg = heappop(self._decoding)[2]
            self._kv_tokens -= len(leg.tokens)
            yield self._finish(leg)
        chunks, self._chunks = self._chunks, []
        for leg, count in chunks:
            leg.computed += count
            self.prefilled_tokens += count
            self._publish(leg, leg.computed)
            if not leg.missing:
                self._prefilling.remove(leg)
                yield from self._computed(leg)

    def _computed(self, leg: Leg) -> Iterator[Outcome]:
        """The step that ends a prompt brings the first token too."""
        if leg.role is Role.PREFILL:
            yield Outcome(leg, What.FINISHED)
            return
        self.decoded_tokens += 1
        yield Outcome(leg, What.FIRST_TOKEN)
        rest = len(leg.tokens) - leg.prompt_tokens - 1
        if rest:
            self._start_decoding(leg, rest)
            self._kv_tokens += 1
        else:
            yield self._finish(leg)

    def _finish(self, leg: Leg) -> Outcome:
        self._publish(leg, len(leg.tokens))
        self.release(leg)
        return Outcome(leg, What.FINISHED)

    def _start_decoding(self, leg: Leg, steps: int) -> None:
        heappush(self._decoding, (self.steps + steps, leg.number, leg))
        self._kv_tokens += leg.prompt_tokens

    def _take(self, leg: Leg, budget: int) -> int:
        count = min(budget, leg.missing)
        if count > 0:
            self._chunks.append((leg, count))
        return max(0, count)

    def _admit(self, leg: Leg) -> bool:
        """Give it blocks for prompt and answer, if there are so many."""
        if self._full or self.num_running >= self.model.max_running:
            return False
        leg.lease = self.pool.acquire(leg.tokens)
        if leg.lease is None:
            self._full = True
            return False
        size = self.model.block_size
        # The last token of a prompt is always computed, and with it the rest of its block.
        found = min(len(leg.lease.shared), (leg.prompt_tokens - 1) // size)
        leg.cached = leg.computed = found * size
        return True

    def _publish(self, leg: Leg, tokens: int) -> None:
        assert leg.lease is not None, "only what holds blocks has something to publish"
        self.pool.publish_full(leg.lease, leg.tokens, tokens)
