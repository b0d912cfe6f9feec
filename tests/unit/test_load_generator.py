"""The load generator's figures, and what it makes of a server's answers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from dynamo_ray.cli import load
from dynamo_ray.cli.bench import Shape, prompts

TARGET = load.Target("http://somewhere:1/prefix/", "m", "key")


class Server:
    """Answers each connection with the next of these, and keeps what was asked."""

    def __init__(self, *answers: bytes) -> None:
        self.answers = list(answers)
        self.asked: list[bytes] = []

    async def connect(self, *_: Any, **__: Any) -> tuple[asyncio.StreamReader, Server]:
        reader = asyncio.StreamReader()
        reader.feed_data(self.answers.pop(0))
        reader.feed_eof()
        return reader, self

    def write(self, data: bytes) -> None:
        self.asked.append(data)

    def close(self) -> None:
        pass


def stream(*events: dict[str, Any] | str) -> bytes:
    lines = [f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n" for event in events]
    return ("HTTP/1.1 200 OK\r\n\r\n" + "".join(lines)).encode()


def token(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": reason}]}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 10, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
}


def run(monkeypatch: pytest.MonkeyPatch, server: Server, prompts: list[str | list[int]]) -> load.Figures:
    monkeypatch.setattr(asyncio, "open_connection", server.connect)
    return asyncio.run(load.run(TARGET, prompts, 2))


def test_tokens_times_and_caches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    server = Server(*[stream(token("a"), token("b", "length"), USAGE, "[DONE]")] * 2)
    figures = run(monkeypatch, server, ["one", [1, 2]])
    assert (figures.requests, figures.ok, figures.errors) == (2, 2, {})
    assert (figures.prompt_tokens, figures.cached_tokens, figures.answer_tokens, figures.events) == (20, 8, 4, 4)
    assert figures.ttft_s is not None
    assert figures.itl_s is not None
    head, _, body = server.asked[1].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /prefix/v1/completions HTTP/1.1\r\nHost: somewhere:1\r\n")
    assert b"Authorization: Bearer key" in head
    assert json.loads(body)["prompt"] == [1, 2]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b'HTTP/1.1 429 Too Many\r\n\r\n{"error": {"message": "full"}}', "429 Too Many: full"),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\nno backend", "502 Bad Gateway: no backend"),
        (b"", "the connection was closed: "),
        (stream(token("a")), "the stream broke off"),
        (stream(token("a"), {"error": {"message": "lost"}}), "lost"),
        (b"HTTP/1.1 200 OK\r\n\r\ndata: {oops\n\n", "the stream broke off: "),
    ],
)
def test_what_goes_wrong_is_counted_by_its_words(answer: bytes, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = run(monkeypatch, Server(answer), ["x"])
    assert figures.ok == 0
    ((words, count),) = figures.errors.items()
    assert (words.startswith(said), count) == (True, 1), words


def test_prompts_share_as_much_of_their_beginning_as_asked() -> None:
    first, second = prompts(Shape(2, 1, 100, 1, 0.5, seed=3), 4.0)
    assert len(first) == len(second) == 400
    assert first[:200] == second[:200]
    assert first[200:] != second[200:]
    assert prompts(Shape(1, 1, 100, 1, 0.5, seed=3), 4.0) == [first]
    assert prompts(Shape(1, 1, 100, 1, 0.5, seed=4), 4.0) != [first]
