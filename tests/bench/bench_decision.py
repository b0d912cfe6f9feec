"""What one routing decision costs, beside Dynamo's SelectionService in the same process and minute.

A decision: hash the prompt's blocks, look them up, score every rank, book, free. Both get the prompt as a list of ints.
The index holds a million (rank, block) entries: documents that begin with one of 16 system prompts of 16 blocks, each
on four ranks. Of a prompt, 75 % (2k tokens) or 50 % (8k, 32k) is a document's; the rest is new.

    python tests/bench/bench_decision.py [--check] [--json FILE] [--ranks 8,64,512] [--entries 1000000] [--alone]

CPU is that of all threads that a router has, median of the rounds; p99 is of CPU too, since a wall clock on a shared
machine tells of the neighbours. `--check` fails unless each policy costs at most a third of SelectionService at every
point, and 8k x 64 has its p99 below a millisecond. `--alone`: without SelectionService (ai-dynamo-runtime==1.6.1).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import zmq

from backends.engine import Role
from backends.kv_events import BlockStored, KVEventBatch
from dynamo_ray.config import RouterConfig
from dynamo_ray.routing.block_hash import chain_seed
from dynamo_ray.routing.chooser import Booked, Chooser, WorkerFacts
from dynamo_ray.routing.policy import Ask
from dynamo_ray.routing.ranks import Holder

BLOCK, MODEL = 64, "m"
SYSTEMS, SYSTEM_BLOCKS, COPIES = 16, 16, 4
HITS = {2048: 24, 8192: 64, 32768: 256}
"""Prompt tokens, and the blocks of them that a document has."""
BATCH = {2048: 200, 8192: 100, 32768: 40}
ROUNDS = 5
POLICIES = ("latency", "blocks")
FACTOR, P99_US = 3.0, 1000.0
PEER = "SelectionService"


@dataclass(frozen=True, slots=True)
class Point:
    """One row: what a decision of one router costs."""

    router: str
    ranks: int
    tokens: int
    cpu_us: float
    p50_us: float
    p99_us: float
    factor: float
    """How many times less than the peer, median of the rounds, each beside the peer's; 0 without it."""


def tokens(rng: np.random.Generator, blocks: int) -> list[int]:
    return rng.integers(0, 100_000, blocks * BLOCK).tolist()


@dataclass(frozen=True, slots=True)
class Document:
    number: int
    tokens: list[int]
    ranks: list[int]


def documents(num_ranks: int, num_entries: int) -> Iterator[Document]:
    """A third of the entries for each length; the same ones for the same arguments."""
    rng = np.random.default_rng(1)
    systems = [tokens(rng, SYSTEM_BLOCKS) for _ in range(SYSTEMS)]
    number = 0
    for blocks in HITS.values():
        for _ in range(num_entries // len(HITS) // (blocks * COPIES)):
            body = tokens(rng, blocks - SYSTEM_BLOCKS)
            yield Document(number, systems[number % SYSTEMS] + body, rng.integers(0, num_ranks, COPIES).tolist())
            number += 1


def stored(document: Document) -> BlockStored:
    """Blocks named by their contents, as engines do: the system's alike in every document that begins with it."""
    blocks = len(document.tokens) // BLOCK
    system, own = (document.number % SYSTEMS + 1) << 40, (document.number + SYSTEMS + 1) << 40
    names: list[int | bytes] = [(system if place < SYSTEM_BLOCKS else own) + place for place in range(blocks)]
    return BlockStored(names, None, document.tokens, BLOCK)


class Ours:
    """One policy over an index that all policies share."""

    def __init__(self, policy: str, num_ranks: int) -> None:
        self.name = policy
        self.chooser = Chooser(MODEL, RouterConfig(policy=policy))
        for rank in range(num_ranks):
            self.chooser.up(WorkerFacts(f"w{rank}", 1, Role.AGGREGATED, 1, BLOCK, 1 << 20))
        self._seed = chain_seed(MODEL)
        self._every = (1 << num_ranks) - 1
        self._now_s = 0.0

    def store(self, document: Document) -> None:
        event = stored(document)
        for rank in document.ranks:
            self.chooser.apply(Holder(f"w{rank}", 1, 0), KVEventBatch(0, 0, [event]))

    def book(self, prompt: list[int]) -> Booked:
        self._now_s += 0.01
        choice = self.chooser.choose(Ask(prompt, self._seed, 128), None, self._every, self._now_s)
        return self.chooser.book(choice, self._now_s)

    async def hold(self, prompt: list[int]) -> None:
        self.book(prompt).first_token(self._now_s)

    async def overlap(self, prompt: list[int]) -> int:
        """The most blocks that a rank holds."""
        choice = self.chooser.choose(Ask(prompt, self._seed, 128), None, self._every, self._now_s)
        return int(choice.decode.leg.device_blocks.max())

    async def batch(self, prompts: list[list[int]]) -> list[float]:
        """CPU seconds of each decision. There is no thread but this one; the peer's go on beside it."""
        taken = []
        for prompt in prompts:
            began_s = time.thread_time()
            self.book(prompt).free(self._now_s)
            taken.append(time.thread_time() - began_s)
        return taken


class Theirs:
    """Dynamo's SelectionService, one worker a rank, fed over ZeroMQ as by vLLM."""

    name = PEER

    def __init__(self, num_ranks: int) -> None:
        from dynamo._core import SelectionService  # type: ignore[import-not-found]

        self._service = SelectionService(indexer_threads=1)
        self._context = zmq.Context(io_threads=1)
        self._context.set(zmq.MAX_SOCKETS, 4096)
        self._sockets = []
        for _ in range(num_ranks):
            socket = self._context.socket(zmq.PUB)
            socket.set_hwm(0)
            socket.bind("tcp://127.0.0.1:*")
            self._sockets.append(socket)
        self._sequences = [0] * num_ranks
        self._number = 0
        self._encoder = msgspec.msgpack.Encoder()

    async def start(self) -> None:
        for rank, socket in enumerate(self._sockets):
            endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
            await self._service.upsert_worker(
                {
                    "worker_id": rank + 1,
                    "model_name": MODEL,
                    "endpoint": f"tcp://127.0.0.1:{rank + 1}",
                    "block_size": BLOCK,
                    "kv_events_endpoints": {0: endpoint},
                    "max_num_batched_tokens": 8192,
                    "total_kv_blocks": 1 << 20,
                }
            )

    def store(self, document: Document) -> None:
        event = stored(document)
        for rank in document.ranks:
            self._publish(rank, event)

    def _publish(self, rank: int, event: BlockStored) -> None:
        listed = ["BlockStored", event.block_hashes, None, event.token_ids, BLOCK, None, "GPU"]
        payload = self._encoder.encode([time.time(), [listed], 0])
        self._sockets[rank].send_multipart([b"", struct.pack(">Q", self._sequences[rank]), payload])
        self._sequences[rank] += 1

    async def settle(self, rng: np.random.Generator) -> None:
        """Publish one last prompt on every rank, again and again, until it is found on all of them."""
        self._number += 1
        last = Document((1 << 20) + self._number, tokens(rng, 1), list(range(len(self._sockets))))
        event = stored(last)
        deadline_s = time.monotonic() + 120
        while True:
            scores = await self._service.overlap_scores({"model_name": MODEL, "token_ids": last.tokens})
            missing = {worker["worker_id"] - 1 for worker in scores["workers"] if not worker["device_blocks"]}
            found = {worker["worker_id"] - 1 for worker in scores["workers"]} - missing
            if len(found) == len(self._sockets):
                return
            if time.monotonic() > deadline_s:
                raise TimeoutError(f"{len(self._sockets) - len(found)} ranks' events did not arrive")
            for rank in set(last.ranks) - found:
                self._publish(rank, event)
            await asyncio.sleep(0.2)

    async def overlap(self, prompt: list[int]) -> int:
        scores = await self._service.overlap_scores({"model_name": MODEL, "token_ids": prompt})
        return max(int(worker["device_blocks"]) for worker in scores["workers"])

    async def hold(self, prompt: list[int]) -> None:
        self._number += 1
        await self._service.select_and_reserve(self._request(prompt))
        await self._service.prefill_complete(str(self._number))

    async def batch(self, prompts: list[list[int]]) -> list[float]:
        taken = []
        for prompt in prompts:
            self._number += 1
            began_s = time.process_time()
            await self._service.select_and_reserve(self._request(prompt))
            await self._service.free_reservation(str(self._number))
            taken.append(time.process_time() - began_s)
        return taken

    def _request(self, prompt: list[int]) -> dict[str, Any]:
        return {"model_name": MODEL, "token_ids": prompt, "selection_id": str(self._number)}

    def close(self) -> None:
        self._service.shutdown()
        self._context.destroy(linger=0)


async def measure(num_ranks: int, num_entries: int, alone: bool) -> list[Point]:
    ours = [Ours(policy, num_ranks) for policy in POLICIES]
    for router in ours[1:]:
        router.chooser.index = ours[0].chooser.index
    theirs = None if alone else Theirs(num_ranks)
    rng = np.random.default_rng(2)
    if theirs is not None:
        await theirs.start()
        await theirs.settle(rng)
    shown: dict[int, list[list[int]]] = {length: [] for length in HITS}
    lengths = {blocks: length for length, blocks in HITS.items()}
    for document in documents(num_ranks, num_entries):
        ours[0].store(document)
        if theirs is not None:
            theirs.store(document)
        kept = shown[lengths[len(document.tokens) // BLOCK]]
        if len(kept) < 100:
            kept.append(document.tokens)
        await asyncio.sleep(0)
    if theirs is not None:
        await theirs.settle(rng)
    points: list[Point] = []
    routers = [*ours, *([] if theirs is None else [theirs])]
    try:
        for router in routers:
            for _ in range(2 * num_ranks):
                await router.hold(tokens(rng, 4))
        for length, blocks in HITS.items():
            points += await compare(routers, rng, num_ranks, length, blocks, shown[length])
    finally:
        if theirs is not None:
            theirs.close()
    return points


async def compare(
    routers: list[Any], rng: np.random.Generator, num_ranks: int, length: int, blocks: int, known: list[list[int]]
) -> list[Point]:
    """In turn, a batch each, so that what disturbs one disturbs all."""
    taken: dict[str, list[list[float]]] = {router.name: [] for router in routers}
    for turn in range(ROUNDS + 1):
        prompts = [random.choice(known) + tokens(rng, length // BLOCK - blocks) for _ in range(BATCH[length])]
        for router in routers:
            batch = await router.batch(prompts)
            if turn:  # The first one warms up.
                taken[router.name].append(batch)
        await check_hit(routers, prompts[0], blocks)
    peer = taken.get(PEER)
    return [_point(name, num_ranks, length, rounds, peer) for name, rounds in taken.items()]


async def check_hit(routers: list[Any], prompt: list[int], blocks: int) -> None:
    """All see the document: a decision that finds nothing would be a cheap one."""
    for router in routers:
        found = await router.overlap(prompt)
        if found != blocks:
            raise AssertionError(f"{router.name} finds {found} of {blocks} blocks")


def _point(name: str, num_ranks: int, length: int, rounds: list[list[float]], peer: list[list[float]] | None) -> Point:
    each = sorted(seconds * 1e6 for batch in rounds for seconds in batch)
    means = [statistics.fmean(batch) for batch in rounds]
    theirs = [statistics.fmean(batch) for batch in peer or []]
    factor = statistics.median(b / a for a, b in zip(means, theirs, strict=True)) if theirs else 0.0
    p50_us, p99_us = each[len(each) // 2], each[int(len(each) * 0.99)]
    return Point(name, num_ranks, length, statistics.median(means) * 1e6, p50_us, p99_us, factor)


def table(points: list[Point]) -> str:
    """As Markdown: CPU us a decision, p99, and how many times less than the peer's."""
    routers = list(dict.fromkeys(point.router for point in points))
    cells = {(point.router, point.ranks, point.tokens): point for point in points}
    lines = ["| tokens | ranks | " + " | ".join(f"{router}: us (p99)" for router in routers) + " |"]
    lines.append("|" + "---|" * (2 + len(routers)))
    for ranks, length in dict.fromkeys((point.ranks, point.tokens) for point in points):
        row = [cells[router, ranks, length] for router in routers]
        shown = (f"{p.cpu_us:.0f} ({p.p99_us:.0f})" + f", {p.factor:.1f}x less" * (p.router != PEER) for p in row)
        lines.append(f"| {length} | {ranks} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def misses(points: list[Point]) -> list[str]:
    found = []
    for point in points:
        where = f"{point.router} at {point.tokens} tokens x {point.ranks} ranks"
        if point.router != PEER and point.factor and point.factor < FACTOR:
            found.append(f"{where}: {point.factor:.1f}x less than {PEER}")
        if point.router != PEER and (point.tokens, point.ranks) == (8192, 64) and point.p99_us > P99_US:
            found.append(f"{where}: p99 is {point.p99_us:.0f} us")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--ranks", default="8,64,512")
    parser.add_argument("--entries", type=int, default=1_000_000)
    args = parser.parse_args()
    os.environ.setdefault("DYN_LOG", "error")
    random.seed(3)
    points: list[Point] = []
    for ranks in map(int, args.ranks.split(",")):
        points += asyncio.run(measure(ranks, args.entries, args.alone))
    print(table(points))
    if args.json:
        args.json.write_text(json.dumps([asdict(point) for point in points], indent=1))
    missed = misses(points) if args.check else []
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
