"""The HTTP front: a raw ASGI app in OpenAI's dialect. Paths, keys, and what an error looks like to a client."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from dynamo_ray.errors import (
    InternalError,
    MethodNotAllowed,
    NotFound,
    NotReady,
    RequestError,
    Unauthorized,
)
from dynamo_ray.request.completions import Completions, Settings
from dynamo_ray.request.exchange import ClientGone, Exchange, Receive, Scope, Send
from dynamo_ray.request.openai import unknown_model
from dynamo_ray.request.openapi import document
from dynamo_ray.request.service import Service
from dynamo_ray.request.tokens import Tokeniser
from dynamo_ray.telemetry import CONTENT_TYPE, Telemetry

__all__ = ["Front", "Service", "Settings"]

log = logging.getLogger(__name__)

CLIENT_GONE = 499
"""nginx's status for a client that left; only metrics see it."""
READY_RETRY_AFTER_S = 5.0
MODELS = "/v1/models"

Endpoint = Callable[[Exchange], Awaitable[None]]


class Front:
    """One a process, on one event loop. Requests under /v1 need an API key where there are any."""

    def __init__(self, service: Service, tokeniser: Tokeniser, settings: Settings, telemetry: Telemetry) -> None:
        self._service, self._settings, self._telemetry = service, settings, telemetry
        self._started_unix_s = int(time.time())
        self._openapi = msgspec.json.encode(document(settings.model))
        completions = Completions(service, tokeniser, settings, telemetry)
        self._endpoints: dict[str, tuple[str, Endpoint]] = {
            "/v1/chat/completions": ("POST", completions.chat),
            "/v1/completions": ("POST", completions.complete),
            "/v1/route": ("POST", completions.route),
            MODELS: ("GET", self._models),
            "/health": ("GET", self._health),
            "/ready": ("GET", self._ready),
            "/metrics": ("GET", self._metrics),
            "/openapi.json": ("GET", self._document),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(Exchange(scope, receive, send))
        elif scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003, "reason": "no websocket here"})

    async def _answer(self, exchange: Exchange) -> None:
        """Every request ends here, counted, whatever happens to it."""
        name = self._name(exchange.path)
        self._telemetry.in_flight.inc()
        status: int | None = CLIENT_GONE
        try:
            await self._try(exchange, name)
            status = exchange.status
        except ClientGone:
            pass
        finally:
            self._telemetry.in_flight.dec()
            self._telemetry.requests.labels(name, str(status)).inc()

    async def _try(self, exchange: Exchange, name: str) -> None:
        try:
            exchange.adopt_request_id()
            await self._dispatch(exchange, name)
        except RequestError as error:
            await self._fail(exchange, error)
        except (asyncio.CancelledError, ClientGone):
            raise
        except Exception as error:
            log.exception("request %s failed", exchange.request_id.decode())
            await self._fail(exchange, InternalError(f"internal error ({type(error).__name__}); see the server's log"))

    async def _fail(self, exchange: Exchange, error: RequestError) -> None:
        self._telemetry.errors.labels(error.code).inc()
        if error.status >= 500 and not isinstance(error, NotReady):
            log.warning("request %s (%s): %s", exchange.request_id.decode(), exchange.unique_id, error)
        headers = []
        if isinstance(error, MethodNotAllowed):
            method, _ = self._endpoints[self._name(exchange.path)]
            headers.append((b"allow", b"GET, HEAD" if method == "GET" else method.encode()))
        if isinstance(error, Unauthorized):
            headers.append((b"www-authenticate", b"Bearer"))
        await exchange.fail(error, headers)

    async def _dispatch(self, exchange: Exchange, name: str) -> None:
        if name not in self._endpoints:
            raise NotFound(f"there is no {exchange.path}; /openapi.json lists what there is")
        if exchange.path.startswith("/v1/"):
            self._authorise(exchange)
        method, endpoint = self._endpoints[name]
        if exchange.method != method and (method, exchange.method) != ("GET", "HEAD"):
            raise MethodNotAllowed(f"{name} takes {method}, not {exchange.method}")
        await endpoint(exchange)

    def _name(self, path: str) -> str:
        """The endpoint a path belongs to; `other` for none, so that metrics have few labels."""
        if path.startswith(MODELS + "/"):
            return MODELS
        return path if path in self._endpoints else "other"

    def _authorise(self, exchange: Exchange) -> None:
        keys = self._settings.api_keys
        if not keys:
            return
        scheme, _, given = exchange.headers.get(b"authorization", b"").partition(b" ")
        # Every key is compared in full, so that the time taken tells nothing.
        matches = [hmac.compare_digest(given.strip(), key.encode()) for key in keys]
        if scheme.lower() != b"bearer" or not any(matches):
            raise Unauthorized("no valid API key; send the header Authorization: Bearer <key>")

    async def _models(self, exchange: Exchange) -> None:
        served, loras = self._settings.model, self._settings.loras
        models = {name: self._model(name, None if name == served else served) for name in (served, *loras)}
        asked = exchange.path.removeprefix(MODELS)[1:]
        if asked and asked not in models:
            raise unknown_model(asked, served, loras)
        await _reply_json(exchange, models[asked] if asked else {"object": "list", "data": list(models.values())})

    def _model(self, name: str, parent: str | None) -> dict[str, Any]:
        """As vLLM describes one; an adapter's parent is the model it is for."""
        described = {"id": name, "object": "model", "created": self._started_unix_s, "owned_by": "dynamo_ray"}
        return described if parent is None else {**described, "parent": parent}

    async def _health(self, exchange: Exchange) -> None:
        await _reply_json(exchange, {"status": "alive"})

    async def _ready(self, exchange: Exchange) -> None:
        reason = self._service.ready()
        if reason is not None:
            raise NotReady(reason, retry_after_s=READY_RETRY_AFTER_S)
        await _reply_json(exchange, {"status": "ready"})

    async def _metrics(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._telemetry.exposition(), CONTENT_TYPE.encode())

    async def _document(self, exchange: Exchange) -> None:
        await exchange.reply(200, self._openapi)


async def _reply_json(exchange: Exchange, value: object) -> None:
    await exchange.reply(200, msgspec.json.encode(value))


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
