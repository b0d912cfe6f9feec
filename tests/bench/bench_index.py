"""The KV index: events applied, memory, and lookups while events stream in, beside Dynamo's RadixTree in the same run.

    python tests/bench/bench_index.py [--check] [--json FILE] [--entries 1000000] [--alone]

Eight ranks hold documents that begin with one of 16 system prompts of 16 blocks; every event is 70 blocks of 64 tokens
from a vocabulary of DeepSeek's size. `built`: a million (rank, block) entries, as the bytes that vLLM's publisher sends
in an engine core of ours, decoded, hashed and applied; the second row as vLLM's own, token ids as integers. `churned`:
then a quarter as many, with an old document evicted for every new one. `queried`: prompts of 8k tokens half of which
are cached, on a quiet index and between events.

RadixTree takes events of another shape: JSON in which every block is hashed already, by the worker. Its second row adds
what that hashing costs (compute_block_hash_for_seq). Each runs in a process of its own, one after the other. Time is
CPU time of the whole process over all of a phase, not of its best part; memory is what the process grew by.

With --check, exit 1 unless at least 300,000 blocks are applied a second, an entry takes at most 200 bytes, and a lookup
between events takes at most 1.5 times as long as on a quiet index. `--alone`: without ai-dynamo-runtime==1.6.1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import psutil

from backends.kv_events import decoder, tokens_to_publish
from dynamo_ray.routing.block_hash import block_hashes, chain_seed
from dynamo_ray.routing.kv_index import KVIndex
from dynamo_ray.routing.ranks import Holder, Ranks

RANKS, SYSTEMS, SYSTEM_BLOCKS, DOCUMENT_BLOCKS, BLOCK = 8, 16, 16, 70, 64
VOCABULARY = 129_280
CHUNK = 100
Words = "array[int]"
QUERY_BLOCKS, HIT_BLOCKS, ROUNDS = 128, 64, 7
MIN_BLOCKS_S, MAX_BYTES, MAX_SLOWER = 300_000, 200, 1.5


@dataclass(frozen=True, slots=True)
class Document:
    """A rank's blocks below a system prompt, or the system prompt itself."""

    rank: int
    parent: int | None
    names: list[int]
    tokens: list[int]
    system: int


class Index(Protocol):
    """What is measured: `packed` happens in the engine, all else here."""

    def packed(self, document: Document) -> Any: ...
    def removal(self, document: Document) -> Any: ...
    def apply(self, rank: int, event: Any) -> None: ...
    def hashes(self, tokens: list[int]) -> list[int]: ...
    def lookup(self, query: list[int]) -> object: ...


class Ours:
    def __init__(self, packs_tokens: bool) -> None:
        self._packs_tokens = packs_tokens
        self._index = KVIndex("m", Ranks())
        self._holders = [Holder(f"w{rank}", 1, 0) for rank in range(RANKS)]
        self._decoders = [decoder("vllm-0.33") for _ in self._holders]
        for holder in self._holders:
            self._index.add_holder(holder)

    def packed(self, document: Document) -> Any:
        stored = {"type": "BlockStored", "block_hashes": document.names, "parent_block_hash": document.parent}
        tokens = tokens_to_publish(document.tokens) if self._packs_tokens else document.tokens
        stored |= {"token_ids": tokens, "block_size": BLOCK, "lora_id": None, "medium": "GPU"}
        return self._frames({**stored, "lora_name": None, "group_idx": 0, "kv_cache_spec_kind": "mla_attention"})

    def removal(self, document: Document) -> Any:
        return self._frames({"type": "BlockRemoved", "block_hashes": document.names, "medium": "GPU", "group_idx": 0})

    def apply(self, rank: int, event: Any) -> None:
        self._index.apply(self._holders[rank], self._decoders[rank](event))

    def hashes(self, tokens: list[int]) -> list[int]:
        return block_hashes(tokens, BLOCK, chain_seed("m"))

    def lookup(self, query: list[int]) -> object:
        return self._index.lookup(query)

    def _frames(self, event: dict[str, Any]) -> list[bytes]:
        return [b"", bytes(8), msgspec.msgpack.encode([1.0, [event], 0])]


class Peer:
    """Dynamo's, by reference to its Python bindings of 1.6.1."""

    def __init__(self, hashes_tokens: bool) -> None:
        from dynamo._core import RadixTree, compute_block_hash_for_seq  # type: ignore[import-not-found]

        self._tree, self._hash, self._hashes_tokens = RadixTree(), compute_block_hash_for_seq, hashes_tokens

    def packed(self, document: Document) -> Any:
        local = self._hash(document.tokens, BLOCK)
        blocks = [
            {"block_hash": name, "tokens_hash": tokens, "mm_extra_info": None}
            for name, tokens in zip(document.names, local, strict=True)
        ]
        stored = json.dumps(_event({"stored": {"parent_hash": document.parent, "blocks": blocks}})).encode()
        return stored, document.tokens if self._hashes_tokens else None

    def removal(self, document: Document) -> Any:
        return json.dumps(_event({"removed": {"block_hashes": document.names}})).encode(), None

    def apply(self, rank: int, event: Any) -> None:
        packed, tokens = event
        if tokens is not None:
            self._hash(tokens, BLOCK)
        self._tree.apply_event(rank, packed)

    def hashes(self, tokens: list[int]) -> list[int]:
        found: list[int] = self._hash(tokens, BLOCK)
        return found

    def lookup(self, query: list[int]) -> object:
        return self._tree.find_matches(query).scores


SUBJECTS: dict[str, Callable[[], Index]] = {
    "dynamo_ray KVIndex": lambda: Ours(True),
    "KVIndex, tokens as integers": lambda: Ours(False),
    "Dynamo RadixTree": lambda: Peer(False),
    "RadixTree and its hashing": lambda: Peer(True),
}


def _event(data: dict[str, Any]) -> dict[str, Any]:
    return {"event_id": 0, "data": data, "dp_rank": 0}


def _random(rng: np.random.Generator, count: int, below: int = 1 << 63) -> list[int]:
    found: list[int] = rng.integers(0, below, count).tolist()
    return found


class Workload:
    """The same for every subject: system prompts on every rank, then documents."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.systems = [self._document(0, None, SYSTEM_BLOCKS, system) for system in range(SYSTEMS)]
        self._next = 0

    def beginning(self) -> Iterator[Document]:
        for rank in range(RANKS):
            for each in self.systems:
                yield Document(rank, None, each.names, each.tokens, each.system)

    def chunk(self) -> list[Document]:
        return [self._next_document() for _ in range(CHUNK)]

    def _next_document(self) -> Document:
        self._next += 1
        system = int(self.rng.integers(SYSTEMS))
        return self._document(self._next % RANKS, self.systems[system].names[-1], DOCUMENT_BLOCKS, system)

    def _document(self, rank: int, parent: int | None, blocks: int, system: int) -> Document:
        tokens = _random(self.rng, blocks * BLOCK, VOCABULARY)
        return Document(rank, parent, _random(self.rng, blocks), tokens, system)


def applied(index: Index, events: Sequence[tuple[int, Any]]) -> float:
    """CPU seconds."""
    began = time.process_time()
    for rank, event in events:
        index.apply(rank, event)
    return time.process_time() - began


@dataclass(slots=True)
class Held:
    """What the ranks hold, the oldest first, in little memory; and of every fourth document a prompt's hashes."""

    documents: deque[tuple[int, Words]]
    prompts: deque[Words]

    @property
    def num_bytes(self) -> int:
        return sum(len(each) * 8 + 200 for each in (*(names for _, names in self.documents), *self.prompts))

    def add(self, index: Index, workload: Workload, documents: list[Document]) -> None:
        for each in documents:
            self.documents.append((each.rank, array("Q", each.names)))
        for each in documents[::4]:
            self.prompts.append(array("Q", index.hashes(workload.systems[each.system].tokens + each.tokens)))


def measure(name: str, entries: int) -> dict[str, float]:
    """One subject, in a fresh process."""
    index, workload, process = SUBJECTS[name](), Workload(), psutil.Process()
    for each in workload.beginning():
        index.apply(each.rank, index.packed(each))
    [index.packed(each) for each in workload.chunk()]  # So that what making them takes is taken before it counts.
    gc.collect()
    before = process.memory_info().rss
    held, cpu_s, done = Held(deque(), deque()), 0.0, 0

    def num_bytes() -> float:
        gc.collect()
        return (process.memory_info().rss - before - held.num_bytes) / done

    while done < entries:
        documents = workload.chunk()
        cpu_s += applied(index, [(each.rank, index.packed(each)) for each in documents])
        held.add(index, workload, documents)
        done += CHUNK * DOCUMENT_BLOCKS
        del documents
    found = {"built_blocks_s": done / cpu_s, "bytes": num_bytes()}
    found |= _churned(index, workload, held, entries // 4)
    return {**found, "bytes_churned": num_bytes(), **_queried(index, workload, held)}


def _churned(index: Index, workload: Workload, held: Held, entries: int) -> dict[str, float]:
    cpu_s, done = 0.0, 0
    while done < entries:
        events = _exchange(index, workload, held)
        cpu_s += applied(index, events)
        done += len(events) * DOCUMENT_BLOCKS
    return {"churned_blocks_s": done / cpu_s}


def _exchange(index: Index, workload: Workload, held: Held) -> list[tuple[int, Any]]:
    """A chunk of documents stored, and as many old ones removed."""
    documents = workload.chunk()
    events = []
    for number, each in enumerate(documents):
        rank, names = held.documents.popleft()
        if number % 4 == 0:
            held.prompts.popleft()
        events.append((rank, index.removal(Document(rank, None, names.tolist(), [], 0))))
        events.append((each.rank, index.packed(each)))
    held.add(index, workload, documents)
    return events


def _queried(index: Index, workload: Workload, held: Held) -> dict[str, float]:
    """Medians over the rounds, quiet and streaming by turns; no prompt comes twice in a round."""
    quiet, streaming = [], []
    for _ in range(ROUNDS):
        events = _exchange(index, workload, held)
        prompts = [held.prompts[i] for i in workload.rng.permutation(len(held.prompts))[: 2 * len(events)]]
        new = [_random(workload.rng, QUERY_BLOCKS - HIT_BLOCKS, 1 << 60) for _ in prompts]
        queries = [prompt[:HIT_BLOCKS].tolist() + end for prompt, end in zip(prompts, new, strict=True)]
        quiet.append([_timed(index, query) for query in queries[::2]])
        times = []
        for event, query in zip(events, queries[1::2], strict=False):
            index.apply(*event)
            times.append(_timed(index, query))
        streaming.append(times)
    middle = [[statistics.median(times) for times in rounds] for rounds in (quiet, streaming)]
    return {
        "quiet_us": statistics.median(middle[0]),
        "streaming_us": statistics.median(middle[1]),
        "slower": statistics.median(s / q for q, s in zip(*middle, strict=True)),
        "streaming_p99_us": statistics.quantiles((t for times in streaming for t in times), n=100)[-1],
    }


def _timed(index: Index, query: list[int]) -> float:
    began = time.thread_time_ns()
    index.lookup(query)
    return (time.thread_time_ns() - began) / 1000


def table(results: dict[str, dict[str, float]]) -> str:
    rows = [
        "| index | built, blocks a CPU second | churned | bytes an entry: built, churned"
        " | lookup of 8k tokens: quiet, between events, p99 (us) | slower between events |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in results.items():
        rows.append(
            f"| {name} | {r['built_blocks_s']:,.0f} | {r['churned_blocks_s']:,.0f} "
            f"| {r['bytes']:.0f}, {r['bytes_churned']:.0f} "
            f"| {r['quiet_us']:.0f}, {r['streaming_us']:.0f}, {r['streaming_p99_us']:.0f} | {r['slower']:.2f} |"
        )
    return "\n".join(rows)


def missed(ours: dict[str, float]) -> list[str]:
    checks = {
        f"{ours['built_blocks_s']:,.0f} blocks a second, {MIN_BLOCKS_S:,} wanted": ours["built_blocks_s"]
        < MIN_BLOCKS_S,
        f"{ours['bytes']:.0f} bytes an entry, {MAX_BYTES} at most": ours["bytes"] > MAX_BYTES,
        f"lookups {ours['slower']:.2f} times slower between events, {MAX_SLOWER} at most": ours["slower"] > MAX_SLOWER,
    }
    return [text for text, fails in checks.items() if fails]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--alone", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--only", choices=SUBJECTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only, args.entries)))
        return 0
    results = {}
    for name in list(SUBJECTS)[: 2 if args.alone else None]:
        command = [sys.executable, __file__, "--only", name, "--entries", str(args.entries)]
        results[name] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(table(results))
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1))
    failures = missed(next(iter(results.values()))) if args.check else []
    print(*(f"MISSED: {failure}" for failure in failures), sep="\n", end="\n" if failures else "")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
