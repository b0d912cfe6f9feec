"""CPU-us a token from an engine's chunk to the bytes of its server-sent event, and of the whole HTTP front.

python tests/bench/bench_detokenise.py [--model FOLDER] [--tokens 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from backends.engine import Sampling, TokenChunk
from dynamo_ray.models import byte_tokenizer, folder
from dynamo_ray.request.answer import Answer, ChatShape
from dynamo_ray.request.choice import Choice
from dynamo_ray.request.detokenise import Detokeniser, WindowDetokeniser
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.http import Front, Settings
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.telemetry import Telemetry

WORDS = (
    *("the", "quick", "brown", "fox", "jumps", "over", "13", "lazy", "dogs;", "na\u00efve", "caf\u00e9s"),
    *("cost", "4.50", "\u20ac", "\u4e2d\u6587", "\U0001f600", "def", "f(x):\n"),
)


def answer_tokens(library: Tokenizer, count: int) -> list[int]:
    chosen = random.Random(7)
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += library.encode(" ".join(chosen.choices(WORDS, k=2000)), add_special_tokens=False).ids
    return tokens[:count]


def to_events(tokeniser: Tokeniser, detokeniser: Detokeniser, chunks: Sequence[TokenChunk], stops: list[str]) -> int:
    choice = Choice(0, Sampling(10**9), detokeniser, stops)
    answer = Answer(ChatShape(), "chatcmpl-x", "model", 1, False, tokeniser.token_bytes)
    num_bytes = 0
    for chunk in chunks:
        delta = choice.take(chunk)
        if delta is not None:
            num_bytes += len(answer.events(0, delta))
    return num_bytes


class Replay:
    """A service whose streams are the same tokens, one a chunk, with a turn of the loop between."""

    max_model_len, max_logprobs = 10**9, 0

    def __init__(self, tokens: Sequence[int]) -> None:
        self._chunks = [TokenChunk("", [token]) for token in tokens[:-1]] + [TokenChunk("", [tokens[-1]], "length")]

    def ready(self) -> None:
        return None

    async def generate(self, request: Generation) -> AsyncGenerator[TokenChunk]:
        for chunk in self._chunks:
            await asyncio.sleep(0)
            yield chunk


async def front_us(path: Path, tokens: Sequence[int], streams: int) -> float:
    front = Front(Replay(tokens), Tokeniser(path), Settings("model"), Telemetry())
    body = json.dumps({"model": "model", "prompt": "x", "stream": True, "max_tokens": len(tokens)}).encode()

    async def one() -> None:
        incoming = [{"type": "http.request", "body": body}]

        async def receive() -> dict[str, object]:
            return incoming.pop() if incoming else await asyncio.Event().wait()

        async def send(message: object) -> None:
            pass

        await front({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)

    started_s = time.process_time()
    await asyncio.gather(*(one() for _ in range(streams)))
    return (time.process_time() - started_s) / streams / len(tokens) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="default: SmolLM2 where it is prepared, else the byte tokenizer")
    parser.add_argument("--tokens", type=int, default=100_000)
    args = parser.parse_args()
    smollm2 = folder("smollm2-135m-instruct")
    with tempfile.TemporaryDirectory() as scratch:
        path = args.model or (smollm2 if (smollm2 / "tokenizer.json").is_file() else Path(scratch))
        if path == Path(scratch):
            byte_tokenizer.build(path)
        report(path, args.tokens)


def report(path: Path, count: int) -> None:
    library, tokeniser = Tokenizer.from_file(str(path / "tokenizer.json")), Tokeniser(path)
    tokens = answer_tokens(library, count)
    single = [TokenChunk("", [token]) for token in tokens]
    merged = [TokenChunk("", tokens[start : start + 4]) for start in range(0, count, 4)]
    cases = {
        "detokenise + event, 1 token a chunk": (tokeniser.detokeniser([]), single, []),
        "detokenise + event, 4 tokens a chunk": (tokeniser.detokeniser([]), merged, []),
        "the same with 4 stop strings": (tokeniser.detokeniser([]), single, ["\n\nUser:", "###", "<|end", "Stop."]),
        "window detokeniser + event": (WindowDetokeniser(library, []), single, []),
    }
    figures: dict[str, float] = {}
    for name, (detokeniser, chunks, stops) in cases.items():
        started_s = time.process_time()
        to_events(tokeniser, detokeniser, chunks, stops)
        figures[name] = round((time.process_time() - started_s) / count * 1e6, 2)
    figures["whole front, 64 streams, 1 token a chunk"] = round(asyncio.run(front_us(path, tokens[:500], 64)), 2)
    json.dump({"model": path.name, "tokens": count, "cpu_us_per_token": figures}, sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
