"""One HTTP request and its reply over ASGI."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping, Sequence
from typing import Any

from backends.cancel_scope import CancelScope, ScopeCancelled
from dynamo_ray.errors import InvalidRequest, PayloadTooLarge, RequestError
from dynamo_ray.request.answer import error_body, error_event

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Header = tuple[bytes, bytes]

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"

_NAME = re.compile(rb"[ -~]{1,256}")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


class Exchange:
    """Knows what of the reply has been sent; every reply carries x-request-id."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived_s = time.perf_counter()
        self.method: str = scope["method"]
        self.path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.unique_id = uuid.uuid4().hex
        """Ours; what the client calls its request need not be unique."""
        self.request_id = self.unique_id.encode()
        self.status: int | None = None
        """Of the reply, once it has begun."""
        self._receive, self._send = receive, send

    def adopt_request_id(self) -> None:
        """Take the client's x-request-id where there is one; raises InvalidRequest when it cannot be echoed."""
        given = self.headers.get(b"x-request-id")
        if given is None:
            return
        if _REQUEST_ID.fullmatch(given) is None:
            raise InvalidRequest("send 1 to 128 letters, digits, or any of . _ : -", "x-request-id")
        self.request_id = given

    def number(self, header: bytes) -> float | None:
        """A header's positive number; raises InvalidRequest for anything else."""
        given = self.headers.get(header)
        if given is None:
            return None
        name = header.decode()
        try:
            value = float(given)
        except ValueError:
            raise InvalidRequest(f"{name}: send a number", name) from None
        if not 0 < value < float("inf"):
            raise InvalidRequest(f"{name}: send a positive number", name)
        return value

    def flag(self, header: bytes) -> bool:
        """A header that is 1, or 0 or missing; raises InvalidRequest for anything else."""
        given = self.headers.get(header, b"0")
        if given not in (b"0", b"1"):
            name = header.decode()
            raise InvalidRequest(f"{name}: send 1 or 0", name)
        return given == b"1"

    def name(self, header: bytes) -> str | None:
        """A header's text of 1 to 256 printable characters; raises InvalidRequest for anything else."""
        given = self.headers.get(header)
        if given is None:
            return None
        if _NAME.fullmatch(given) is None:
            shown = header.decode()
            raise InvalidRequest(f"{shown}: send 1 to 256 printable ASCII characters", shown)
        return given.decode()

    async def json_body(self, max_bytes: int) -> bytes:
        """The whole body.

        Raises:
            InvalidRequest: Its headers say that it is no JSON in UTF-8.
            PayloadTooLarge: At once if its length is announced, else as soon as it is.
            ClientGone: It never came whole.
        """
        self._check_content_type()
        too_large = PayloadTooLarge(f"the body is larger than {max_bytes} bytes; send less")
        announced = self.headers.get(b"content-length", b"")
        if announced.isdigit() and int(announced) > max_bytes:
            raise too_large
        parts: list[bytes] = []
        num_bytes = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            part = message.get("body", b"")
            num_bytes += len(part)
            if num_bytes > max_bytes:
                raise too_large
            parts.append(part)
            if not message.get("more_body", False):
                return b"".join(parts)

    def _check_content_type(self) -> None:
        kind, _, parameters = self.headers.get(b"content-type", JSON).lower().partition(b";")
        if kind.strip() != JSON:
            shown = kind.decode("latin-1")
            raise InvalidRequest(f"Content-Type is {shown}; send application/json", "Content-Type")
        charset = re.search(rb'charset="?([^";\s]+)', parameters)
        if charset is not None and charset[1] not in (b"utf-8", b"utf8", b"us-ascii"):
            raise InvalidRequest("the charset must be UTF-8", "Content-Type")
        if self.headers.get(b"content-encoding", b"identity") != b"identity":
            raise InvalidRequest("compressed bodies are not taken; send it as it is", "Content-Encoding")

    async def while_connected(self, work: Coroutine[Any, Any, None]) -> None:
        """Run the work to its end, or until the client closes its connection; it has cleaned up on return.

        Raises:
            ClientGone: It has closed it.
        """
        leaving = asyncio.ensure_future(self._disconnect())
        connected = CancelScope()
        leaving.add_done_callback(lambda _: connected.cancel())
        try:
            with connected:
                await work
        except ScopeCancelled:
            raise ClientGone from None
        finally:
            leaving.cancel()

    async def _disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def reply(self, status: int, body: bytes, kind: bytes = JSON, headers: Sequence[Header] = ()) -> None:
        await self.start(status, kind, [(b"content-length", b"%d" % len(body)), *headers])
        await self.write(b"" if self.method == "HEAD" else body, last=True)

    async def fail(self, error: RequestError, headers: Sequence[Header] = ()) -> None:
        """Tell the client, with a status where the reply has not begun and as its last event where it has."""
        if self.status is not None:
            await self.write(error_event(error), last=True)
            return
        if error.retry_after_s is not None:
            headers = [*headers, (b"retry-after", b"%d" % max(1, round(error.retry_after_s)))]
        await self.reply(error.status, error_body(error), headers=headers)

    async def start(self, status: int, kind: bytes, headers: Sequence[Header] = ()) -> None:
        self.status = status
        lines = [(b"content-type", kind), (b"x-request-id", self.request_id), *headers]
        await self._send({"type": "http.response.start", "status": status, "headers": lines})

    async def write(self, data: bytes, last: bool = False) -> None:
        """Returns when the server can take more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
