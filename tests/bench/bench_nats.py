"""What `events: nats` costs: a worker's process for what it publishes, the wire, and a new ingress until it is exact.

    python tests/bench/bench_nats.py [--ranks 8] [--blocks 20000]

A real nats-server on loopback. CPU is this process's alone, the server's is not in it. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from backends.engine import KVEventSource, RankLoad
from backends.kv_events import BlockStored, KVEventBatch
from dynamo_ray.config import NatsConfig
from dynamo_ray.events.nats.publisher import Publisher
from dynamo_ray.events.nats.server import PrivateServer, only_with
from dynamo_ray.events.nats.subscriber import NatsSubscriber
from dynamo_ray.routing.kv_index import KVIndex, Snapshot
from dynamo_ray.routing.ranks import Holder, Ranks

BLOCK_TOKENS = 64
BATCH_BLOCKS = 4
TIMEOUT_S = 120.0
WORKER = "w"


class Ingress:
    """A Listener that notes when what arrived."""

    def __init__(self, holders: list[Holder]) -> None:
        self.index = KVIndex("m", Ranks())
        self.heard_s: dict[tuple[int, int], float] = {}
        for holder in holders:
            self.index.add_holder(holder)

    def apply(self, holder: Holder, batch: KVEventBatch) -> None:
        self.index.apply(holder, batch)
        self.heard_s[holder.dp_rank, batch.sequence] = time.perf_counter()

    def uncertain(self, holder: Holder) -> None:
        self.index.doubt(holder)

    def restoring(self, holder: Holder, snapshot: Snapshot) -> Iterator[None]:
        return self.index.restoring(holder, snapshot)

    def load(self, holder: Holder, load: RankLoad) -> None:
        return


class Bench:
    def __init__(self, server: PrivateServer, num_ranks: int) -> None:
        self.holders = [Holder(WORKER, 1, rank) for rank in range(num_ranks)]
        # Nobody publishes there: events are handed over as the worker's subscriber to its engine would.
        self.sources = [KVEventSource(rank, "ipc:///tmp/nobody", None, "simulated-1") for rank in range(num_ranks)]
        self.config = NatsConfig(urls=(server.url,), token="bench")
        self.publisher = Publisher(self.config, "bench", "m", WORKER, 1, lambda: ())
        self.ingresses: list[NatsSubscriber] = []
        self._random = random.Random(0)
        self._next = dict.fromkeys(range(num_ranks), 0)

    def batch(self, rank: int) -> KVEventBatch:
        first = self._next[rank]
        self._next[rank] += BATCH_BLOCKS
        tokens = [self._random.randrange(128_000) for _ in range(BATCH_BLOCKS * BLOCK_TOKENS)]
        names: list[int | bytes] = [hash((rank, first + n)) for n in range(BATCH_BLOCKS)]
        return KVEventBatch(first // BATCH_BLOCKS, rank, [BlockStored(names, None, tokens, BLOCK_TOKENS)])

    async def publish(self, num_batches: int) -> float:
        """CPU microseconds a batch; a burst an engine step, as ranks in lockstep make it."""
        batches = [self.batch(n % len(self.holders)) for n in range(num_batches)]
        began_s = time.process_time()
        for number, batch in enumerate(batches):
            self.publisher.apply(self.holders[batch.dp_rank or 0], batch)
            if number % len(self.holders) == len(self.holders) - 1:
                await asyncio.sleep(0.002)
        await until(lambda: self.publisher.idle)
        return 1e6 * (time.process_time() - began_s) / num_batches

    async def start_ingress(self) -> tuple[Ingress, float, float]:
        """It, and the wall and CPU seconds until it is exact."""
        ingress = Ingress(self.holders)
        plane = NatsSubscriber(self.config, "bench", ingress)
        self.ingresses.append(plane)
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        plane.subscribe(WORKER, 1, self.sources)
        said = [self.publisher.next_sequence(holder) for holder in self.holders]
        await until(lambda: [plane.next_sequence(holder) for holder in self.holders] == said)
        return ingress, time.perf_counter() - wall_s, time.process_time() - cpu_s

    async def lags_ms(self, ingress: Ingress, num_batches: int) -> list[float]:
        """From the hand-over in the worker's process to the ingress's index."""
        said_s: dict[tuple[int, int], float] = {}
        for number in range(num_batches):
            rank = number % len(self.holders)
            batch = self.batch(rank)
            said_s[rank, self.publisher.next_sequence(self.holders[rank]) or 0] = time.perf_counter()
            self.publisher.apply(self.holders[rank], batch)
            await asyncio.sleep(0.005)
        await until(lambda: said_s.keys() <= ingress.heard_s.keys())
        return [1e3 * (ingress.heard_s[key] - said_s[key]) for key in said_s]

    async def close(self) -> None:
        for plane in self.ingresses:
            await plane.close()
        await self.publisher.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def run(num_ranks: int, num_blocks: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="bench-nats-") as folder:
        server = PrivateServer(Path(folder) / "server", only_with("bench"))
        server.start()
        bench = Bench(server, num_ranks)
        try:
            bench.publisher.start(bench.sources)
            await until(lambda: bench.publisher.idle)
            publish_us = await bench.publish(num_ranks * num_blocks // BATCH_BLOCKS)
            _, replayed_s, replayed_cpu_s = await bench.start_ingress()
            bench.publisher.restate_all()
            await until(lambda: bench.publisher.idle)
            ingress, exact_s, exact_cpu_s = await bench.start_ingress()
            lags = await bench.lags_ms(ingress, 400)
        finally:
            await bench.close()
            server.stop()
    return {
        "ranks": num_ranks,
        "blocks_a_rank": num_blocks,
        "tokens_a_block": BLOCK_TOKENS,
        "publish_us_a_batch_of_4_blocks": round(publish_us, 1),
        "new_ingress_from_events_s": round(replayed_s, 3),
        "new_ingress_from_events_cpu_s": round(replayed_cpu_s, 3),
        "new_ingress_from_states_s": round(exact_s, 3),
        "new_ingress_from_states_cpu_s": round(exact_cpu_s, 3),
        "lag_p50_ms": round(statistics.median(lags), 2),
        "lag_p99_ms": round(statistics.quantiles(lags, n=100)[98], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=20_000)
    arguments = parser.parse_args()
    print(json.dumps(asyncio.run(run(arguments.ranks, arguments.blocks)), indent=2))


if __name__ == "__main__":
    main()
