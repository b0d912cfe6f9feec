"""The HTTP front driven in memory: a service that plays a script, and a client that speaks ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends.engine import TokenChunk, TokenLogprob
from dynamo_ray.errors import RequestError
from dynamo_ray.request.generation import Generation
from dynamo_ray.request.http import Front, Settings
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.routing.explanation import Candidate, ChosenRank, Explanation, LegExplanation, Route
from dynamo_ray.telemetry import Telemetry

MODEL = "org/model"
END = 257
"""The byte tokenizer's EOS."""

Step = TokenChunk | RequestError | asyncio.Event
"""What a generation does next: yield, raise, or wait."""


def spell(text: str | bytes, size: int = 1, end: str = "stop", cached: int = 0) -> list[Step]:
    """The chunks of an answer of the byte tokenizer, `size` tokens each."""
    tokens = list(text.encode() if isinstance(text, str) else text) + ([END] if end == "stop" else [])
    parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    last = len(parts) - 1
    return [
        TokenChunk("", part, end if i == last else None, cached_tokens=cached if i == 0 else None)  # type: ignore[arg-type]
        for i, part in enumerate(parts)
    ]


def with_logprobs(steps: Sequence[Step], top: list[tuple[int, float]]) -> list[Step]:
    return [
        TokenChunk("", s.token_ids, s.finish_reason, [TokenLogprob(t, -0.5, top) for t in s.token_ids], s.cached_tokens)
        for s in steps
        if isinstance(s, TokenChunk)
    ]


@dataclass
class ScriptedService:
    """Implements `Service`: every generation plays what `script` says for it."""

    script: Callable[[Generation], Sequence[Step]]
    max_model_len: int = 4096
    max_logprobs: int = 5
    not_ready: str | None = None
    asked: list[Generation] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    """Generations that neither ended nor were closed."""

    def ready(self) -> str | None:
        return self.not_ready

    def explain(self, request: Generation) -> Explanation:
        self.asked.append(request)
        candidate = Candidate("w", 1, 0, True, 1.0, {}, 0, 0, 0, 0, 0, 0)
        leg = LegExplanation(len(request.token_ids), 16, "the only candidate", [candidate])
        return Explanation("blocks", None, leg, 0.1, 0.01)

    async def generate(self, request: Generation) -> AsyncGenerator[TokenChunk]:
        self.asked.append(request)
        if request.told is not None:
            request.told(Route("blocks", None, ChosenRank("w", 0, 3, 1.5, "the only candidate")))
        self.open.add(request.request_id)
        try:
            for step in self.script(request):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, RequestError):
                    raise step
                else:
                    yield step
        finally:
            self.open.discard(request.request_id)


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    """Of those that come several times, the last."""
    parts: list[bytes]
    """One a `send`."""

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The stream's events; `[DONE]` as a string."""
        return list(_events(self.body))

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json["error"]
        return error


def _events(body: bytes) -> Iterator[Any]:
    for event in body.decode().split("\n\n")[:-1]:
        assert event.startswith("data: "), event
        yield event[6:] if event == "data: [DONE]" else json.loads(event[6:])


class Client:
    """Sends requests to a front; `on_send` sees every ASGI message before it is kept."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self.gone = asyncio.Event()
        """Set it, and the client has closed its connection."""
        self.messages: list[dict[str, Any]] = []

    async def get(self, path: str, method: str = "GET", **headers: str) -> Reply:
        return await self.request(method, path, b"", headers)

    async def post(self, path: str, body: object, **headers: str) -> Reply:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, raw, {"content-type": "application/json", **headers})

    async def chat(self, **fields: Any) -> Reply:
        messages = [{"role": "user", "content": "hi"}]
        return await self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields})

    async def chat_with(self, headers: dict[str, str], **fields: Any) -> Reply:
        messages = [{"role": "user", "content": "hi"}]
        return await self.post("/v1/chat/completions", {"model": MODEL, "messages": messages, **fields}, **headers)

    async def complete(self, **fields: Any) -> Reply:
        return await self.post("/v1/completions", {"model": MODEL, "prompt": "hi", **fields})

    async def request(self, method: str, path: str, raw: bytes, headers: dict[str, str]) -> Reply:
        half = len(raw) // 2
        incoming = [
            {"type": "http.request", "body": raw[:half], "more_body": True},
            {"type": "http.request", "body": raw[half:], "more_body": False},
        ]

        async def receive() -> dict[str, Any]:
            if incoming:
                return incoming.pop(0)
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            self.messages.append(message)

        self.messages = []
        lines = [(name.lower().replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        scope = {"type": "http", "method": method, "path": path, "headers": lines}
        await self.front(scope, receive, send)
        return self.reply()

    def reply(self) -> Reply:
        """What has come so far."""
        if not self.messages:
            return Reply(0, {}, [])
        start, *rest = self.messages
        headers = {name.decode(): value.decode() for name, value in start["headers"]}
        return Reply(start["status"], headers, [message["body"] for message in rest])


def make_front(folder: Path, service: ScriptedService, **settings: Any) -> tuple[Front, Telemetry]:
    telemetry = Telemetry()
    return Front(service, Tokeniser(folder), Settings(MODEL, **settings), telemetry), telemetry
