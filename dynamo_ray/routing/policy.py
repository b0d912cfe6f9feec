"""What a policy sees and says: one leg of one request, and a cost for each rank that could take it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from backends.engine import Role
from dynamo_ray.routing.block_hash import block_hashes
from dynamo_ray.routing.kv_index import Runs
from dynamo_ray.routing.ranks import Holder
from dynamo_ray.routing.speeds import Speeds

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Places = NDArray[np.intp]

MAX_MASKS = 256
"""Sets of ranks remembered as arrays, per pool."""
INF = float("inf")
FEW_BITS = 12
"""Up to so many ranks of a mask are faster one by one than as an array."""


class Ask:
    """What a request asks of the router. The block hashes are computed once, however often it is asked."""

    __slots__ = ("_hashes", "max_tokens", "priority", "seed", "session", "token_ids")

    def __init__(
        self, token_ids: Sequence[int], seed: int, max_tokens: int = 1, session: str | None = None, priority: int = 0
    ) -> None:
        self.token_ids = token_ids
        self.seed = seed
        """`chain_seed(model, lora, cache_salt)`: prompts under other seeds share nothing."""
        self.max_tokens = max_tokens
        self.session = session
        """Of a conversation, where the client names one."""
        self.priority = priority
        self._hashes: dict[int, list[int]] = {}

    def hashes(self, block_size: int) -> list[int]:
        found = self._hashes.get(block_size)
        if found is None:
            found = self._hashes[block_size] = block_hashes(self.token_ids, block_size, self.seed)
        return found


class Pool:
    """The ranks that could take a leg, in a stable order: by lockstep group, then by rank. Facts that don't change."""

    def __init__(
        self,
        columns: Places | Sequence[int],
        holders: Sequence[Holder],
        groups: Sequence[str],
        kv: Floats | Sequence[int],
    ) -> None:
        self.holders = tuple(holders)
        self.columns = np.array(columns, dtype=np.intp)
        self.first_column = int(columns[0])
        self.kv_total_tokens: Floats = np.array(kv, dtype=np.float64)
        self.least_kv_tokens = float(self.kv_total_tokens.min())
        self.groups = tuple(groups)
        """The name of each one's lockstep group."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        self.lockstep = len(numbers) < len(groups)
        """Whether any of them step together."""
        self.group = np.array([numbers[name] for name in groups], dtype=np.intp)
        self.group_starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        self._hashes: NDArray[np.uint64] | None = None
        self._width = int(self.columns.max()) + 1
        self._place = {column: place for place, column in enumerate(self.columns.tolist())}
        self._by_mask: dict[int, Bools] = {}

    def __len__(self) -> int:
        return len(self.holders)

    def part(self, mask: int) -> Pool:
        """Those of a mask: cheap, as which ranks are busy changes with every request.

        Raises:
            ValueError: There are none.
        """
        places = self._unpacked(mask).nonzero()[0]
        if not len(places):
            raise ValueError("no known rank is in the mask")
        chosen = places.tolist()
        holders, groups = [self.holders[place] for place in chosen], [self.groups[place] for place in chosen]
        return Pool(self.columns[places], holders, groups, self.kv_total_tokens[places])

    @property
    def hashes(self) -> NDArray[np.uint64]:
        """Of each one's name and rank: the same in every process, and after a restart."""
        if self._hashes is None:
            names = (f"{holder.worker} {holder.dp_rank}".encode() for holder in self.holders)
            self._hashes = np.array([xxh3_64_intdigest(name) for name in names], dtype=np.uint64)
        return self._hashes

    def slowest(self, values: Floats) -> Floats:
        """For each rank, the greatest value among those that step with it."""
        if not self.lockstep:
            return values
        return np.maximum.reduceat(values, self.group_starts)[self.group]

    def depths(self, runs: Runs) -> Floats:
        """The depth of each rank's run, 0 where it is in none."""
        depths = np.zeros(len(self.holders))
        self.set_depths(depths, runs)
        return depths

    def set_depths(self, depths: Floats, runs: Runs) -> None:
        """Put the depth of each run where its ranks are; the others stay."""
        for mask, depth in runs:
            if mask.bit_count() > FEW_BITS:
                depths[self._members(mask)] = depth
                continue
            while mask:
                low = mask & -mask
                mask ^= low
                place = self._place.get(low.bit_length() - 1)
                if place is not None:
                    depths[place] = depth

    def _members(self, mask: int) -> Bools:
        """Which candidates are in the mask. Remembered: who holds a system prompt is much the same for a while."""
        members = self._by_mask.get(mask)
        if members is None:
            if len(self._by_mask) >= MAX_MASKS:
                self._by_mask.clear()
            members = self._by_mask[mask] = self._unpacked(mask)
        return members

    def _unpacked(self, mask: int) -> Bools:
        num_bytes = (max(self._width, mask.bit_length()) + 7) // 8
        packed = np.frombuffer(mask.to_bytes(num_bytes, "little"), np.uint8)
        return np.unpackbits(packed, bitorder="little").view(np.bool_)[self.columns]


@dataclass(slots=True, eq=False)
class Leg:
    """One leg to be placed, and its candidates as arrays: element i of each is of `holders[i]`. To read only."""

    role: Role
    ask: Ask
    block_size: int
    turn: int
    """Counts the legs of this role that were given out: what rotates, rotates by it."""
    pool: Pool
    prompt_tokens: int
    load: Floats
    """As `LoadTable.values`: queued_tokens, num_requests and kv_tokens are its rows."""
    sent: Floats
    """The same without what waits in this ingress: what is before a request that goes now."""
    recent_tokens: Floats
    """Tokens that each was lately given to compute and to generate, done or not."""
    device_blocks: Floats
    """Leading prompt blocks each holds where its engine can use them at once."""
    host_blocks: Floats
    """The same, counting those in host memory in; never less than `device_blocks`."""
    disk_blocks: Floats
    """The same, counting every tier in."""
    coming_blocks: Floats
    """`device_blocks`, counting those in that the rank is computing, or is about to, for requests before this one: it
    will have them when it comes to this one."""
    speeds: Speeds

    @property
    def holders(self) -> tuple[Holder, ...]:
        return self.pool.holders

    @property
    def queued_tokens(self) -> Floats:
        """Prompt tokens each has to compute before this leg's."""
        queued: Floats = self.load[0]
        return queued

    @property
    def num_requests(self) -> Floats:
        """Requests each has, running and waiting."""
        requests: Floats = self.load[1]
        return requests

    @property
    def kv_tokens(self) -> Floats:
        """Tokens whose KV each holds for requests."""
        tokens: Floats = self.load[2]
        return tokens

    @property
    def computes_prompt(self) -> bool:
        """False of a decode leg, which is handed its KV."""
        return self.role is not Role.DECODE

    @property
    def prompt_blocks(self) -> int:
        """Rounded up."""
        return -(-self.prompt_tokens // self.block_size)

    @property
    def uncached_tokens(self) -> Floats:
        """Prompt tokens each would have to compute (a decode leg: to be handed)."""
        return self.prompt_tokens - self.block_size * self.coming_blocks

    @property
    def slowness(self) -> Floats | float:
        """Seconds each takes over what `speeds` says of its role; 1.0 where all are alike."""
        return self.speeds.slowness(self.pool.columns)


Costs = Floats | Mapping[str, Floats]
"""A cost for each candidate, lower is better, inf: never this one; or several by name, which are added up."""
Scorer = Callable[[Leg], Costs]
Filter = Callable[[Leg], Bools]
"""True for each candidate that may be chosen."""
Picker = Callable[[Leg, Floats], int]
"""The place of the candidate to take, among those whose cost is finite; there is one."""


def cheapest(leg: Leg, costs: Floats) -> int:
    """The lowest cost; of equals the one with the fewest requests, then in rotation, so that equals share work."""
    best = int(costs.argmin())
    like = costs == costs[best]
    if np.count_nonzero(like) == 1:
        return best
    equal = like.nonzero()[0]
    requests = leg.num_requests[equal]
    equal = equal[requests == requests[requests.argmin()]]
    return int(equal[leg.turn % len(equal)])


Pairing = Callable[[Leg, Places, Leg, Places], Floats | None]
"""(prefill leg, some of its candidates, decode leg, some of its) -> what each pair costs beyond its two costs, a row a
prefill candidate; None: the legs do not depend on one another this time."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Filters, a scorer, a picker. `Policy(score)` is what a plain function stands for."""

    score: Scorer
    terms: Scorer | None = None
    """What the scorer's one cost is the sum of, for explanations; None: the scorer says it itself, or nobody does."""
    filters: tuple[Filter, ...] = ()
    pick: Picker = cheapest
    pair: Pairing | None = None
    """Weighs the `SHORTLIST` cheapest of both legs as pairs."""
    reads_overlap: bool = True
    """False: prompts are neither hashed nor looked up for it."""
    reads_coming: bool = True
    """False: `coming_blocks` are `device_blocks`, and what is being computed does not count."""
    waits: bool = True
    """A request waits for the rank that is best for it, though a worse one is free. False: any that is free will do."""


SHORTLIST = 4


class Nonsense(ValueError):
    """A policy's answer that names no candidate; the message says what it was."""


def total(policy: Policy, leg: Leg) -> Floats:
    """The policy's cost for each candidate, filtered ones at inf.

    Raises:
        Nonsense: It is not one number for each, or there is none that may be taken.
    """
    scored = policy.score(leg)
    costs = scored if isinstance(scored, np.ndarray) or not isinstance(scored, Mapping) else sum(scored.values())
    for allows in policy.filters:
        costs = np.where(allows(leg), costs, np.inf)
    if not isinstance(costs, np.ndarray) or costs.shape != (len(leg.pool),):
        shown = costs.shape if isinstance(costs, np.ndarray) else type(costs).__name__
        raise Nonsense(f"the costs are {shown}, not an array of {len(leg.pool)} numbers")
    least = costs.item(costs.argmin())  # Where there is a NaN, that one.
    if not -INF < least < INF:
        raise Nonsense(f"the lowest cost is {least}: no candidate can be taken")
    return costs


def pick(policy: Policy, leg: Leg, costs: Floats) -> int:
    """The policy's pick.

    Raises:
        Nonsense: It is none of the candidates that may be taken.
    """
    place = policy.pick(leg, costs)
    if not 0 <= place < len(costs) or costs[place] == np.inf:
        raise Nonsense(f"picked {place} of {len(costs)} candidates")
    return place


def pick_pair(policy: Policy, prefill: Leg, first: Floats, decode: Leg, second: Floats) -> tuple[int, int] | None:
    """The cheapest pair of the shortlists; None where each leg is best placed by itself.

    Raises:
        Nonsense: The pairs' costs are no matrix of numbers, or all inf.
    """
    if policy.pair is None:
        return None
    rows, columns = _shortlist(first), _shortlist(second)
    beyond = policy.pair(prefill, rows, decode, columns)
    if beyond is None:
        return None
    costs = first[rows, None] + second[columns] + beyond
    if costs.shape != (len(rows), len(columns)) or not -np.inf < costs.min() < np.inf:
        raise Nonsense(f"pairs cost {costs}")
    row, column = divmod(int(costs.argmin()), len(columns))
    return int(rows[row]), int(columns[column])


def _shortlist(costs: Floats) -> Places:
    """The cheapest, in order."""
    if len(costs) <= SHORTLIST:
        return costs.argsort()
    few = costs.argpartition(SHORTLIST)[:SHORTLIST]
    return few[costs[few].argsort()]
