"""Traces made to a pattern: conversations, agents, questions on documents, and prompts that share nothing."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

from dynamo_ray.simulator.traces import BLOCK_TOKENS, TraceRequest


class _Maker:
    """Random lengths and gaps, and block ids that were not given out before."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._ids = count()

    def blocks(self, tokens: int) -> tuple[int, ...]:
        return tuple(next(self._ids) for _ in range(max(1, round(tokens / BLOCK_TOKENS))))

    def tokens(self, mean: float) -> int:
        """Lognormal, as lengths are in Mooncake's traces: its p90 is 2.6 times its median."""
        return max(1, int(mean * self.random.lognormvariate(-0.28, 0.75)))

    def starts(self, number: int, per_s: float) -> list[float]:
        now_s, starts = 0.0, []
        for _ in range(number):
            now_s += self.random.expovariate(per_s)
            starts.append(now_s)
        return starts


def conversations(number: int = 300, turns: int = 6, per_s: float = 1.0, seed: int = 0) -> tuple[TraceRequest, ...]:
    """Each turn's prompt is the one before, with what was answered and asked since; 20 s of thinking between them.

    Args:
        number: of conversations, each of 1 to 2 * `turns` - 1 turns.
        per_s: conversations that begin in a second.
    """
    make, requests = _Maker(seed), []
    for session, start_s in enumerate(make.starts(number, per_s)):
        now_s, prompt = start_s, make.blocks(make.tokens(2_000))
        for _ in range(make.random.randint(1, 2 * turns - 1)):
            requests.append(_request(now_s, prompt, make.tokens(300), str(session)))
            now_s += 5.0 + make.random.expovariate(1 / 15.0)
            prompt += make.blocks(make.tokens(1_000))
    return _sorted(requests)


def agents(number: int = 200, calls: int = 10, per_s: float = 1.0, seed: int = 0) -> tuple[TraceRequest, ...]:
    """All share 8,192 tokens of system prompt, and one of 4 sets of tools; tool results come a few seconds apart."""
    make, requests = _Maker(seed), []
    system = make.blocks(8_192)
    tools = [make.blocks(4_096) for _ in range(4)]
    for session, start_s in enumerate(make.starts(number, per_s)):
        now_s, prompt = start_s, system + make.random.choice(tools) + make.blocks(make.tokens(1_000))
        for _ in range(make.random.randint(1, 2 * calls - 1)):
            requests.append(_request(now_s, prompt, make.tokens(120), str(session)))
            now_s += 1.0 + make.random.expovariate(1 / 3.0)
            prompt += make.blocks(make.tokens(1_500))
    return _sorted(requests)


def documents(number: int = 1_000, corpus: int = 100, per_s: float = 3.0, seed: int = 0) -> tuple[TraceRequest, ...]:
    """Questions on `corpus` documents of 20,000 tokens; a few are asked about most (Zipf, exponent 1)."""
    make = _Maker(seed)
    known = [make.blocks(make.tokens(20_000)) for _ in range(corpus)]
    weights = [1 / rank for rank in range(1, corpus + 1)]
    requests = []
    for start_s in make.starts(number, per_s):
        document = make.random.choices(range(corpus), weights)[0]
        requests.append(_request(start_s, known[document] + make.blocks(BLOCK_TOKENS), make.tokens(250), str(document)))
    return _sorted(requests)


def single_turn(number: int = 1_500, per_s: float = 5.0, seed: int = 0) -> tuple[TraceRequest, ...]:
    """Prompts of 4,000 tokens that share nothing."""
    make = _Maker(seed)
    return _sorted(
        [
            _request(start_s, make.blocks(make.tokens(4_000)), make.tokens(250), str(number))
            for number, start_s in enumerate(make.starts(number, per_s))
        ]
    )


WORKLOADS: dict[str, Callable[..., tuple[TraceRequest, ...]]] = {
    "conversations": conversations,
    "agents": agents,
    "documents": documents,
    "single_turn": single_turn,
}


def _request(now_s: float, blocks: tuple[int, ...], answer: int, session: str) -> TraceRequest:
    return TraceRequest(now_s, blocks, len(blocks) * BLOCK_TOKENS, answer, session)


def _sorted(requests: list[TraceRequest]) -> tuple[TraceRequest, ...]:
    return tuple(sorted(requests, key=lambda request: request.arrival_s))
