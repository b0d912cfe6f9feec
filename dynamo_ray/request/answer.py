"""OpenAI's answers: text and logprobs to JSON bodies and server-sent events. Pure."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from dynamo_ray import __version__
from dynamo_ray.errors import RequestError
from dynamo_ray.request.choice import Delta, Located

DONE = b"data: [DONE]\n\n"
SYSTEM_FINGERPRINT = f"dynamo_ray-{__version__}"
MIN_LOGPROB = -9999.0
"""OpenAI's stand-in for minus infinity, which JSON cannot say."""

TokenBytesOf = Callable[[int], bytes]
"""A token's bytes, from its id."""

_encode = msgspec.json.encode


@dataclass(slots=True)
class Usage:
    """What a request took, over all its choices; a prompt counts once, however many choices it has."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class Shape(Protocol):
    """How one endpoint writes a choice."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    text_open: bytes
    """What stands before the text in a streamed choice, after its index."""
    text_close: bytes

    def opening(self) -> dict[str, Any] | None:
        """The choice of a stream's first event, before any token; None where there is no such event."""
        ...

    def streamed(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        """One choice an event, without index and logprobs; the first carries the logprobs."""
        ...

    def whole(self, text: str) -> dict[str, Any]: ...

    def logprobs(self, located: Sequence[Located], bytes_of: TokenBytesOf) -> dict[str, Any]: ...


class ChatShape:
    id_prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    text_open = b'"delta":{"content":'
    text_close = b"},"

    def opening(self) -> dict[str, Any] | None:
        return {"delta": {"role": "assistant", "content": "", "refusal": None}, "finish_reason": None}

    def streamed(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        told = [{"delta": {"content": text}, "finish_reason": None}]
        return told if finish_reason is None else [*told, {"delta": {}, "finish_reason": finish_reason}]

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, located: Sequence[Located], bytes_of: TokenBytesOf) -> dict[str, Any]:
        content = [
            {
                **_chat_token(token.token_id, token.logprob, bytes_of),
                "top_logprobs": [_chat_token(token_id, value, bytes_of) for token_id, value in token.top],
            }
            for _, token in located
        ]
        return {"content": content, "refusal": None}


class TextShape:
    id_prefix = "cmpl-"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    text_open = b'"text":'
    text_close = b","

    def opening(self) -> dict[str, Any] | None:
        return None

    def streamed(self, text: str, finish_reason: str | None) -> list[dict[str, Any]]:
        return [{"text": text, "finish_reason": finish_reason}]

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def logprobs(self, located: Sequence[Located], bytes_of: TokenBytesOf) -> dict[str, Any]:
        tokens = [(token.token_id, token.logprob) for _, token in located]
        # As OpenAI: the chosen token is always there, so there may be one more than asked for.
        tops = [[*token.top, (token.token_id, token.logprob)] for _, token in located]
        return {
            "text_offset": [offset for offset, _ in located],
            "token_logprobs": [max(value, MIN_LOGPROB) for _, value in tokens],
            "tokens": [_shown(bytes_of(token_id), "bytes:") for token_id, _ in tokens],
            "top_logprobs": [
                {_shown(bytes_of(token_id), "bytes:"): max(value, MIN_LOGPROB) for token_id, value in top}
                for top in tops
            ],
        }


class Answer:
    """Everything that is sent of one answer but its HTTP headers.

    An event of nothing but text, which is nearly all of them, is put together from ready-made bytes.
    """

    def __init__(
        self, shape: Shape, answer_id: str, model: str, num_choices: int, include_usage: bool, bytes_of: TokenBytesOf
    ) -> None:
        self._shape = shape
        self._bytes_of = bytes_of
        self._head = {"created": int(time.time()), "model": model, "system_fingerprint": SYSTEM_FINGERPRINT}
        self._id = answer_id
        self._include_usage = include_usage
        envelope = _encode({"id": answer_id, "object": shape.chunk_object, **self._head})
        self._open = b"data: " + envelope[:-1] + b',"choices":['
        self._close = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        close = shape.text_close + b'"logprobs":null,"finish_reason":null}' + self._close
        self._around_text = [
            (b'%b{"index":%d,%b' % (self._open, i, shape.text_open), close) for i in range(num_choices)
        ]

    def opening(self, index: int) -> bytes:
        """What a choice's stream begins with."""
        entry = self._shape.opening()
        return b"" if entry is None else self._event(index, entry, None)

    def events(self, index: int, delta: Delta) -> bytes:
        if delta.finish_reason is None and not delta.logprobs:
            before, after = self._around_text[index]
            return before + _encode(delta.text) + after
        entries = self._shape.streamed(delta.text, delta.finish_reason)
        logprobs = self._logprobs(delta.logprobs) if delta.logprobs else None
        if len(entries) > 1 and not delta.text and logprobs is None:
            entries = entries[1:]
        return b"".join(self._event(index, entry, logprobs if i == 0 else None) for i, entry in enumerate(entries))

    def ending(self, usage: Usage) -> bytes:
        """What a stream ends with, if nothing went wrong."""
        if not self._include_usage:
            return DONE
        return self._open + b'],"usage":' + _encode(usage.as_dict()) + b"}\n\n" + DONE

    def whole(self, deltas: Sequence[Sequence[Delta]], usage: Usage, with_logprobs: bool) -> bytes:
        """The body of an answer that is not streamed, from each choice's deltas."""
        choices = []
        for index, parts in enumerate(deltas):
            located = [one for part in parts for one in part.logprobs]
            choices.append(
                {
                    "index": index,
                    **self._shape.whole("".join([part.text for part in parts])),
                    "logprobs": self._logprobs(located) if with_logprobs else None,
                    "finish_reason": parts[-1].finish_reason,
                }
            )
        head = {"id": self._id, "object": self._shape.whole_object, **self._head}
        return _encode({**head, "choices": choices, "usage": usage.as_dict()})

    def _event(self, index: int, entry: dict[str, Any], logprobs: dict[str, Any] | None) -> bytes:
        return self._open + _encode({"index": index, **entry, "logprobs": logprobs}) + self._close

    def _logprobs(self, located: Sequence[Located]) -> dict[str, Any]:
        return self._shape.logprobs(located, self._bytes_of)


def error_body(error: RequestError) -> bytes:
    """OpenAI's error object."""
    return _encode({"error": {"message": error.message, "type": error.type, "param": error.field, "code": error.code}})


def error_event(error: RequestError) -> bytes:
    """An error after the first byte of a stream, where it has no status any more."""
    return b"data: " + error_body(error) + b"\n\n"


def _chat_token(token_id: int, logprob: float, bytes_of: TokenBytesOf) -> dict[str, Any]:
    content = bytes_of(token_id)
    return {"token": _shown(content), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(content)}


def _shown(content: bytes, prefix: str = "") -> str:
    """A token as text; one that is part of a character as its bytes, escaped the way OpenAI does."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return prefix + "".join([f"\\x{byte:02x}" for byte in content])
