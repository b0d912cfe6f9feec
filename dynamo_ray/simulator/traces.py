"""Traces: when requests come, how long they are, and which parts of their prompts are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from dynamo_ray.errors import ConfigError, Problem

BLOCK_TOKENS = 512
"""What one id of a prompt stands for in Mooncake's traces; the last may stand for fewer."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace. Equal `block_ids` are equal tokens.

    Raises:
        ValueError: It can be no request; names the field.
    """

    arrival_s: float
    block_ids: tuple[int, ...]
    prompt_tokens: int
    answer_tokens: int
    session: str
    """Whose it is: what a client would send as its conversation's id."""

    def __post_init__(self) -> None:
        if not 0 <= self.arrival_s < inf:
            raise ValueError(f"arrival_s: {self.arrival_s:g} is not 0 or more")
        for field in ("prompt_tokens", "answer_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: {getattr(self, field)} is not 1 or more")
        blocks = -(-self.prompt_tokens // BLOCK_TOKENS)
        if len(self.block_ids) != blocks:
            raise ValueError(
                f"block_ids: {len(self.block_ids)} for {self.prompt_tokens} tokens; {BLOCK_TOKENS}-token blocks make "
                f"{blocks}"
            )

    def token_ids(self) -> list[int]:
        """The prompt."""
        return token_ids(self.block_ids, self.prompt_tokens)


def token_ids(block_ids: Sequence[int], prompt_tokens: int) -> list[int]:
    """A prompt of these blocks: each is its own id, over and over, which no other block is."""
    tokens: list[int] = []
    for block in block_ids:
        tokens += [block] * BLOCK_TOKENS
    del tokens[prompt_tokens:]
    return tokens


class _Line(msgspec.Struct):
    timestamp: Annotated[float, Meta(ge=0)]
    input_length: Annotated[int, Meta(ge=1)]
    output_length: Annotated[int, Meta(ge=1)]
    hash_ids: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 31)]], Meta(min_length=1)]
    session_id: str | None = None


def read_trace(path: Path) -> tuple[TraceRequest, ...]:
    """Read Mooncake's format: JSON lines of timestamp (ms), input_length, output_length, hash_ids.

    A line may name its `session_id`; one that does not is of the session that its first block begins.

    Raises:
        ConfigError: The file cannot be read or is no such trace; names the first wrong line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError((Problem(str(path), f"cannot be read: {error.strerror or error}"),)) from error
    decoder = msgspec.json.Decoder(_Line)
    requests: list[TraceRequest] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError((Problem(str(path), f"not a request of a trace: {error}", number),)) from error
        requests.append(_request(read, path, number, requests))
    if not requests:
        raise ConfigError((Problem(str(path), "holds no requests; give a trace of JSON lines"),))
    return tuple(requests)


def _request(read: _Line, path: Path, number: int, before: Sequence[TraceRequest]) -> TraceRequest:
    arrival_s = read.timestamp / 1000
    if before and arrival_s < before[-1].arrival_s:
        raise ConfigError((Problem(str(path), "timestamp: earlier than the line before; sort the file", number),))
    session = read.session_id if read.session_id is not None else str(read.hash_ids[0])
    try:
        return TraceRequest(arrival_s, tuple(read.hash_ids), read.input_length, read.output_length, session)
    except ValueError as error:
        message = str(error).replace("block_ids", "hash_ids")
        raise ConfigError((Problem(str(path), message, number),)) from error


def faster(trace: Sequence[TraceRequest], rate: float) -> Iterator[TraceRequest]:
    """The same requests, arriving `rate` times as fast."""
    for request in trace:
        yield TraceRequest(
            request.arrival_s / rate,
            request.block_ids,
            request.prompt_tokens,
            request.answer_tokens,
            request.session,
        )
