"""Who holds which prompt block: exact, from the engines' own events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from backends.kv_events import AllBlocksCleared, BlockStored, KVEventBatch
from dynamo_ray.routing.anomalies import Anomalies, Anomaly
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.holdings import Blocks, EngineHash, Holding
from dynamo_ray.routing.ranks import Holder as Holder
from dynamo_ray.routing.ranks import Ranks

DEVICE, HOST, DISK = range(3)
"""Tiers, the faster first."""
_TIERS = {
    None: DEVICE,
    "GPU": DEVICE,  # vLLM says so on CPUs too.
    "CPU": HOST,
    "cpu": HOST,  # vLLM's Mooncake store.
    "CPU_PINNED": HOST,  # SGLang.
    "STORAGE": DISK,  # vLLM.
    "DISK": DISK,  # SGLang.
    "EXTERNAL": DISK,  # SGLang: a pool that workers share.
}
"""By the media that engines name: distributed/kv_events.py in vLLM 0.32 and 0.33, disaggregation/kv_events.py in
SGLang 0.5.16 and 0.5.23."""

MAX_BLOCK_TOKENS = 1 << 16
MAX_BATCH_BLOCKS = 1 << 18
"""A step stores a few thousand."""
MAX_RANK_BLOCKS = 1 << 22
"""Of one tier: far beyond what memory there is for blocks of 16 tokens."""
_CHUNK = 32

Runs = list[tuple[int, int]]
"""(mask of ranks, depth): these ranks hold exactly `depth` leading blocks. Deepest last; no rank is in two."""


class Overlap(NamedTuple):
    """How much of a prompt is where; runs are empty for tiers that no event ever named."""

    device: Runs
    host: Runs
    """On the host or faster."""
    disk: Runs
    """On any tier."""


class TierSnapshot(msgspec.Struct, frozen=True):
    """One tier of a rank: the engine's names, our hashes of them, and copies beyond the first."""

    theirs: list[int | bytes]
    ours: list[int]
    copies: list[tuple[int | bytes, int]]


class Snapshot(msgspec.Struct, frozen=True):
    """All that a rank held before its batch `sequence`; goes between processes of one application as msgpack."""

    sequence: int
    tiers: list[TierSnapshot]


class KVIndex:
    """Block hash -> the set of its holders, as the bits of one int, a tier each.

    Never promises a block that no event told of: blocks below an unknown parent are counted in `orphan_blocks` and
    attributed to nobody, and what makes no sense is counted in `anomalies` and changes nothing.

    Bits are columns of `ranks`. Whoever shares it removes a rank here first, and there last.
    """

    def __init__(self, model: str, ranks: Ranks, anomalies: Anomalies | None = None) -> None:
        self._model = model
        self._ranks = ranks
        self.anomalies = Anomalies() if anomalies is None else anomalies
        self._tiers: tuple[Blocks, ...] = ({}, {}, {})
        self._named = 1
        """Tiers up to the slowest that an event has named."""
        self._holdings: dict[Holder, tuple[Holding, ...]] = {}
        self._doubtful: set[Holder] = set()
        self._restoring: dict[Holder, Snapshot] = {}
        """What is being taken in step by step."""
        self.orphan_blocks = 0

    @property
    def num_blocks(self) -> int:
        """Distinct ones, on devices."""
        return len(self._tiers[DEVICE])

    @property
    def doubtful(self) -> frozenset[Holder]:
        """Ranks of which something was missed: they answer only what they told since."""
        return frozenset(self._doubtful)

    def holds(self, column: int, block: int) -> bool:
        """Whether the rank of that column has a block of ours on its device."""
        return bool(self._tiers[DEVICE].get(block, 0) >> column & 1)

    def num_held(self, holder: Holder) -> int:
        """Blocks of one rank, by the engine's names, on all tiers."""
        return sum(map(len, self._holdings.get(holder, ())))

    def add_holder(self, holder: Holder) -> None:
        """Know a rank, holding nothing yet; adding it again changes nothing."""
        if holder not in self._holdings:
            bit = 1 << self._ranks.add(holder)
            self._holdings[holder] = tuple(Holding(bit, blocks) for blocks in self._tiers)

    def remove_holder(self, holder: Holder) -> None:
        """Forget a rank and all it holds; `Ranks.remove` may follow."""
        self.clear_holder(holder)
        self._holdings.pop(holder, None)
        self.anomalies.forget(holder)

    def clear_holder(self, holder: Holder) -> None:
        """It holds nothing, for certain."""
        for holding in self._holdings.get(holder, ()):
            holding.clear()
        self._restoring.pop(holder, None)
        self._doubtful.discard(holder)

    def doubt(self, holder: Holder) -> None:
        """Something it told was missed: forget what it held, and answer only what it tells from here on."""
        if holder in self._holdings:
            self.clear_holder(holder)
            self._doubtful.add(holder)

    def snapshot(self, holder: Holder, sequence: int) -> Snapshot | None:
        """What another process needs to go on from batch `sequence`; None for a rank that is unknown or in doubt."""
        held = self._holdings.get(holder)
        if held is None or holder in self._doubtful:
            return None
        return Snapshot(sequence, [TierSnapshot(*holding.contents()) for holding in held[: self._named]])

    def restoring(self, holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        """Take another process's word for all that a rank holds, in short steps, of which the last ends any doubt.

        Between them anything may be done but `apply` of this rank. Whatever clears, doubts, restores or removes it has
        the last word: what is left of this is then dropped.
        """
        held = self._holdings.get(holder)
        if held is None:
            return
        if any(len(tier.theirs) != len(tier.ours) for tier in snapshot.tiers):
            self.anomalies.saw(Anomaly.LENGTH, holder, "a snapshot of unequal lists")
            self.doubt(holder)
            return
        self._doubtful.add(holder)
        self._restoring[holder] = snapshot
        tiers = [*snapshot.tiers, *(TierSnapshot([], [], []) for _ in held)]
        for holding, tier in zip(held, tiers, strict=False):
            for _ in holding.replacing(tier.theirs, tier.ours, tier.copies):
                yield
                if self._restoring.get(holder) is not snapshot:
                    return
        del self._restoring[holder]
        self._doubtful.discard(holder)
        self._named = max(self._named, min(len(snapshot.tiers), len(self._tiers)))

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        """Take one batch of a rank's events, in order; those of an unknown holder are counted and ignored."""
        held = self._holdings.get(holder)
        if held is None:
            self.anomalies.saw(Anomaly.UNKNOWN_RANK, holder, "told of blocks, and is not known")
            return
        num_blocks = 0
        for event in batch.events:
            if isinstance(event, AllBlocksCleared):
                self.clear_holder(holder)
                continue
            num_blocks += len(event.block_hashes)
            if num_blocks > MAX_BATCH_BLOCKS:
                self.anomalies.saw(Anomaly.TOO_MANY_BLOCKS, holder, f"more than {MAX_BATCH_BLOCKS} in one batch")
                self.doubt(holder)
                return
            tier = _TIERS.get(event.medium)
            if tier is None:
                self.anomalies.saw(Anomaly.MEDIUM, holder, f"blocks on {event.medium!r}")
            elif isinstance(event, BlockStored):
                self._store(holder, held, tier, event)
            else:
                held[tier].remove(event.block_hashes)

    def lookup(self, hashes: Sequence[int], mask: int = -1) -> Overlap:
        """How many leading blocks of a chain each rank of `mask` has; ranks without the first are left out."""
        device = leading_runs(self._tiers[DEVICE], hashes, mask)
        if self._named == 1:
            return Overlap(device, [], [])
        host = _leading_runs_on_any(self._tiers[: HOST + 1], hashes, mask)
        disk = _leading_runs_on_any(self._tiers, hashes, mask) if self._named > DISK else []
        return Overlap(device, host, disk)

    def overlap(self, hashes: Sequence[int]) -> dict[Holder, int]:
        """`lookup` on the device by rank, for tests and explanations."""
        return self._ranks.by_holder(self.lookup(hashes).device)

    def _store(self, holder: Holder, held: tuple[Holding, ...], tier: int, event: BlockStored) -> None:
        holding = held[tier]
        names = event.block_hashes
        if len(holding) + len(names) > MAX_RANK_BLOCKS:
            self.anomalies.saw(Anomaly.TOO_MANY_BLOCKS, holder, f"more than {MAX_RANK_BLOCKS} on one tier")
            return
        self._named = max(self._named, tier + 1)
        if not event.token_ids:
            self._move(holder, held, tier, names)
            return
        ours = self._hashes(holder, held, event)
        if ours is not None:
            contradictions = holding.store(names, ours)
            if contradictions:
                detail = f"{contradictions} of {len(names)} names are those of other blocks"
                self.anomalies.saw(Anomaly.CONTRADICTION, holder, detail, contradictions)

    def _hashes(self, holder: Holder, held: tuple[Holding, ...], event: BlockStored) -> list[int] | None:
        """Our hashes of the event's blocks; None, and counted, where it makes no sense."""
        num_blocks, size = len(event.block_hashes), event.block_size
        saw = self.anomalies.saw
        if not 0 < size <= MAX_BLOCK_TOKENS:
            saw(Anomaly.BLOCK_SIZE, holder, f"blocks of {size} tokens")
            return None
        if len(event.token_ids) != num_blocks * size:
            saw(Anomaly.LENGTH, holder, f"{len(event.token_ids)} tokens in {num_blocks} blocks of {size}")
            return None
        if event.parent_block_hash is None:
            parent = chain_seed(self._model, event.lora_name, event.cache_salt)
        else:
            found = _block(held, event.parent_block_hash)
            if found is None:
                self.orphan_blocks += num_blocks
                saw(Anomaly.UNKNOWN_PARENT, holder, f"{num_blocks} blocks below one never told of", num_blocks)
                return None
            parent = found
        try:
            return block_hashes(event.token_ids, size, parent)
        except (OverflowError, TypeError) as error:
            saw(Anomaly.TOKENS, holder, str(error))
            return None

    def _move(self, holder: Holder, held: tuple[Holding, ...], tier: int, names: Sequence[EngineHash]) -> None:
        """Blocks told of before are now on this tier too: named without their tokens, as vLLM's offloading does."""
        known = [(name, block) for name in names if (block := _block(held, name)) is not None]
        held[tier].store([name for name, _ in known], [block for _, block in known])
        if len(known) < len(names):
            unknown = len(names) - len(known)
            self.anomalies.saw(
                Anomaly.UNKNOWN_BLOCK, holder, f"{unknown} blocks without tokens, never told of", unknown
            )


def _block(held: tuple[Holding, ...], name: EngineHash) -> int | None:
    """Our hash of a block that a rank holds on any tier."""
    for holding in held:
        block = holding.block(name)
        if block is not None:
            return block
    return None


def leading_runs(blocks: Blocks, hashes: Sequence[int], mask: int) -> Runs:
    """Leading runs in one tier.

    Every block is looked at, up to where no rank is left: what an engine evicted from the middle of a chain leaves
    holes, so the search cannot skip ahead. Most stretches are held by the same ranks throughout, and are counted whole.
    """
    runs: Runs = []
    get = blocks.get
    alive, depth = mask & get(hashes[0], 0) if hashes else 0, 0
    if not alive:
        return runs
    for start in range(0, len(hashes), _CHUNK):
        if not alive & get(hashes[start], 0):
            break
        masks = list(map(get, hashes[start : start + _CHUNK]))
        first = masks[0]
        if first is not None and alive & first == alive and masks.count(first) == len(masks):
            depth += len(masks)
            continue
        for found in masks:
            held = alive & found if found is not None else 0
            if held != alive:
                if depth:
                    runs.append((alive & ~held, depth))
                alive = held
                if not alive:
                    return runs
            depth += 1
    runs.append((alive, depth))
    return runs


def _leading_runs_on_any(tiers: Sequence[Blocks], hashes: Sequence[int], mask: int) -> Runs:
    """Leading runs of blocks that are on any of the tiers, each perhaps on another."""
    runs: Runs = []
    alive, depth = mask, 0
    for block in hashes:
        held = 0
        for blocks in tiers:
            held |= blocks.get(block, 0)
        held &= alive
        if held != alive:
            if depth:
                runs.append((alive & ~held, depth))
            alive = held
            if not alive:
                return runs
        depth += 1
    if depth and alive:
        runs.append((alive, depth))
    return runs
