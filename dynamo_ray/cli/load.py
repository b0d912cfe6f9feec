"""A small load generator: streams of completions over plain sockets, and what their clients saw.

For figures that are comparable between systems there is AIPerf; this one says whether a deployment holds up, and
takes as little CPU as it can on the machine it shares with it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import msgspec

MAX_LINE_BYTES = 1 << 20


class Figures(msgspec.Struct, frozen=True):
    """Of one run. Times are what the clients saw, in seconds; None where nothing was seen."""

    requests: int
    ok: int
    errors: dict[str, int]
    """What went wrong, and how often."""
    wall_s: float
    prompt_tokens: int
    cached_tokens: int
    """Of those, what was found in a prefix cache."""
    answer_tokens: int
    events: int
    """That carried text."""
    ttft_s: dict[str, float] | None
    """p50, p90 and p99 of the times to the first token."""
    itl_s: dict[str, float] | None
    """Of the times between two events of one stream."""

    @property
    def tokens_per_s(self) -> float:
        return self.answer_tokens / self.wall_s


@dataclass(frozen=True, slots=True)
class Target:
    """Where the requests go."""

    url: str
    model: str
    api_key: str | None = None


@dataclass(slots=True)
class _Stream:
    started_s: float
    arrivals_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None and self.finish_reason is not None

    def take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            self.error = event["error"]["message"]
        self.usage = event.get("usage") or self.usage
        for choice in event.get("choices", ()):
            if choice.get("text"):
                self.arrivals_s.append(time.perf_counter())
            self.finish_reason = choice.get("finish_reason") or self.finish_reason


async def run(
    target: Target,
    prompts: Sequence[str | list[int]],
    answer_tokens: int,
    concurrency: int | None = None,
    progress: Callable[[int], None] = lambda num_done: None,
) -> Figures:
    """Stream a greedy answer of that many tokens to each prompt.

    Args:
        concurrency: streams at once, each next prompt as soon as one has ended; None: all at once.
        progress: told how many have ended, after each.
    """
    free = asyncio.Semaphore(concurrency or len(prompts))
    num_done = 0

    async def one(body: bytes) -> _Stream:
        nonlocal num_done
        async with free:
            stream = await _stream(target, body)
        num_done += 1
        progress(num_done)
        return stream

    # All beforehand: of streams that begin together, each would wait for the encoding of those after it.
    bodies = [_body(target, prompt, answer_tokens) for prompt in prompts]
    started_s = time.perf_counter()
    done = await asyncio.gather(*map(one, bodies))
    return _figures(done, time.perf_counter() - started_s)


def _body(target: Target, prompt: str | list[int], answer_tokens: int) -> bytes:
    return json.dumps(
        {
            "model": target.model,
            "prompt": prompt,
            "max_tokens": answer_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0,
            "ignore_eos": True,
        }
    ).encode()


async def _stream(target: Target, body: bytes) -> _Stream:
    stream = _Stream(time.perf_counter())
    parts = urlsplit(target.url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    try:
        reader, writer = await asyncio.open_connection(
            parts.hostname or "127.0.0.1", parts.port or (443 if secure else 80), limit=MAX_LINE_BYTES, ssl=secure
        )
    except OSError as error:
        stream.error = f"cannot connect: {error.strerror or error}"
        return stream
    try:
        writer.write(_head(target, parts.netloc, parts.path, len(body)) + body)
        status = (await reader.readline()).decode(errors="replace").strip()
        if " 200 " not in f"{status} ":
            stream.error = f"{status.partition(' ')[2] or 'the connection was closed'}: {_message(await reader.read())}"
            return stream
        async for line in reader:
            if line.startswith(b"data: {"):
                stream.take(json.loads(line[6:]))
        if not stream.ok and stream.error is None:
            stream.error = "the stream broke off"
    except (OSError, ValueError) as error:
        stream.error = f"the stream broke off: {error}"
    finally:
        writer.close()
    return stream


def _head(target: Target, host: str, path: str, num_bytes: int) -> bytes:
    lines = [
        f"POST {path.rstrip('/')}/v1/completions HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        "Connection: close",
        f"Content-Length: {num_bytes}",
    ]
    if target.api_key is not None:
        lines.append(f"Authorization: Bearer {target.api_key}")
    return "\r\n".join([*lines, "", ""]).encode()


def _message(answer: bytes) -> str:
    """Of an error's body, whatever stands around it."""
    start, end = answer.find(b"{"), answer.rfind(b"}") + 1
    try:
        return str(json.loads(answer[start:end])["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.rpartition(b"\r\n\r\n")[2][:200].decode(errors="replace").strip()


def _figures(streams: Sequence[_Stream], wall_s: float) -> Figures:
    errors: dict[str, int] = {}
    for stream in streams:
        if stream.error is not None:
            errors[stream.error] = errors.get(stream.error, 0) + 1
    usages = [stream.usage for stream in streams]
    return Figures(
        requests=len(streams),
        ok=sum(stream.ok for stream in streams),
        errors=errors,
        wall_s=wall_s,
        prompt_tokens=sum(usage.get("prompt_tokens", 0) for usage in usages),
        cached_tokens=sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for usage in usages),
        answer_tokens=sum(usage.get("completion_tokens", 0) for usage in usages),
        events=sum(len(stream.arrivals_s) for stream in streams),
        ttft_s=_percentiles(s.arrivals_s[0] - s.started_s for s in streams if s.arrivals_s),
        itl_s=_percentiles(
            later - earlier for s in streams for earlier, later in zip(s.arrivals_s, s.arrivals_s[1:], strict=False)
        ),
    )


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    found = list(values)
    if len(found) < 2:
        return dict.fromkeys(("p50", "p90", "p99"), found[0]) if found else None
    cuts = statistics.quantiles(found, n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
