"""A small SSE load client: N streams at once, plain sockets, one JSON line out.

python tests/bench/sse_load.py --url http://127.0.0.1:8000 --streams 64 --tokens 200
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass
class Stream:
    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    characters: int = 0
    finish_reason: str | None = None
    completion_tokens: int = 0
    error: str | None = None


async def run_stream(host: str, port: int, body: bytes) -> Stream:
    stream = Stream(time.perf_counter())
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        )
        status = await reader.readline()
        if b" 200 " not in status:
            stream.error = status.decode() + (await reader.read(2000)).decode(errors="replace")
            return stream
        async for line in reader:
            if line.startswith(b"data: {"):
                _take(stream, json.loads(line[6:]))
        writer.close()
    except OSError as error:
        stream.error = repr(error)
    return stream


def _take(stream: Stream, event: dict) -> None:
    if "error" in event:
        stream.error = event["error"]["message"]
    if event.get("usage"):
        stream.completion_tokens = event["usage"]["completion_tokens"]
    for choice in event.get("choices", ()):
        if choice.get("text"):
            stream.arrivals_s.append(time.perf_counter())
            stream.characters += len(choice["text"])
        stream.finish_reason = choice.get("finish_reason") or stream.finish_reason


async def load(url: str, model: str, streams: int, tokens: int, prompt_chars: int) -> dict[str, object]:
    """Streams of different texts of that length; see `load_prompts`."""
    filler = "lorem ipsum " * (prompt_chars // 12 + 1)
    return await load_prompts(url, model, [f"stream {i}: {filler}"[:prompt_chars] for i in range(streams)], tokens)


async def load_prompts(url: str, model: str, prompts: Sequence[str | list[int]], tokens: int) -> dict[str, object]:
    """Run a stream a prompt, all at once; figures over all of them, times in ms."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80

    def body(prompt: str | list[int]) -> bytes:
        return json.dumps(
            {
                "model": model,
                "prompt": prompt,
                "max_tokens": tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
                "temperature": 0,
                "ignore_eos": True,
            }
        ).encode()

    bodies = [body(prompt) for prompt in prompts]
    started_s = time.perf_counter()
    done = await asyncio.gather(*(run_stream(host, port, each) for each in bodies))
    wall_s = time.perf_counter() - started_s
    ttft = [s.arrivals_s[0] - s.started_s for s in done if s.arrivals_s]
    itl = [b - a for s in done for a, b in zip(s.arrivals_s, s.arrivals_s[1:], strict=False)]
    return {
        "streams": len(prompts),
        "ok": sum(s.error is None and s.finish_reason is not None for s in done),
        "errors": sorted({s.error for s in done if s.error})[:3],
        "tokens": sum(s.completion_tokens for s in done),
        "events": sum(len(s.arrivals_s) for s in done),
        "wall_s": round(wall_s, 3),
        "ttft_p50_ms": round(1000 * statistics.median(ttft), 2) if ttft else None,
        "itl_p50_ms": round(1000 * statistics.median(itl), 2) if itl else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--prompt-chars", type=int, default=200)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(load(args.url, args.model, args.streams, args.tokens, args.prompt_chars))))


if __name__ == "__main__":
    main()
