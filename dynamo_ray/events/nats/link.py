"""One connection to NATS, made again whenever it is lost; and the stream behind it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import nats.errors
from nats.aio.client import Client, RawCredentials
from nats.js import JetStreamContext
from nats.js.api import DiscardPolicy, RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import BadRequestError, NotFoundError

from dynamo_ray import secrets
from dynamo_ray.config import NatsConfig
from dynamo_ray.errors import ConfigError, Problem
from dynamo_ray.events.nats.wire import Subjects

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 2.0
PROBE_EVERY_S = 1.0
PROBE_TIMEOUT_S = 2.0
"""A server silent for this long is left: it may hang, and never say so."""
RETRY_S = 0.5
STAYED_S = 5.0
CLOSE_TIMEOUT_S = 0.5
CANCEL_AGAIN_S = 0.2
REQUEST_TIMEOUT_S = 3.0
NAME_IN_USE = 10058
"""Of a stream: JSStreamNameExistErrF in server/errors.json of nats-server 2.15."""
_CREDENTIALS = re.compile(r"-BEGIN NATS USER JWT-+\n[\w.-]+\n.*-BEGIN USER NKEY SEED-+\nSU[A-Z2-7]+\n", re.DOTALL)


def options(config: NatsConfig) -> dict[str, Any]:
    """What `nats.connect` is given; secrets are read here, in the process that uses them, as they are now.

    Raises:
        ConfigError: A secret, or a file, is not there; names the field.
    """
    if not config.urls:
        raise _wrong("urls", "missing: only `dynamo-ray up` on a private Ray starts a server; write nats://host:port")
    found: dict[str, Any] = {"servers": list(config.urls)}
    if config.user is not None and config.password is not None:
        found |= {"user": config.user, "password": secrets.read("nats.password", config.password)}
    if config.token is not None:
        found["token"] = secrets.read("nats.token", config.token)
    if config.creds_file is not None:
        found["user_credentials"] = _credentials(config.creds_file)
    if any(url.startswith("tls://") for url in config.urls):
        found["tls"] = _tls(config)
    return found


def _credentials(path: str) -> RawCredentials:
    text = secrets.readable("nats.creds_file", path).read_text(encoding="utf-8", errors="replace")
    if _CREDENTIALS.search(text) is None:  # nats-py 2.16 would look for its beginning for ever
        raise _wrong("creds_file", f"{path} has no user's JWT and seed, as `nsc generate creds` writes them")
    return RawCredentials(text)


def _tls(config: NatsConfig) -> ssl.SSLContext:
    authority = None if config.ca_file is None else str(secrets.readable("nats.ca_file", config.ca_file))
    try:
        return ssl.create_default_context(cafile=authority)
    except ssl.SSLError as error:
        raise _wrong("ca_file", f"{authority} is no PEM of certificates: {error}") from error


def _wrong(field: str, message: str) -> ConfigError:
    return ConfigError((Problem(f"nats.{field}", message),))


@dataclass(frozen=True, slots=True)
class Stream:
    """One incarnation of the application's stream."""

    created: str
    last_sequence: int

    def continues(self, before: Stream | None) -> bool:
        """Whether it still has what it had then, but for what it was told to discard."""
        return before is not None and self.created == before.created and self.last_sequence >= before.last_sequence


class Link:
    """Runs `serve(client)` on every connection, as long as it lasts; `start` to `close`.

    Nobody waits for it. A server that is away, hangs or refuses us is tried again for ever.

    Raises:
        ConfigError: As `options`, when constructed.
    """

    def __init__(
        self, config: NatsConfig, subjects: Subjects, name: str, serve: Callable[[Client], Awaitable[None]]
    ) -> None:
        options(config)  # what is wrong with it is said at once
        self._config, self._subjects, self._name, self._serve = config, subjects, name, serve
        self._task: asyncio.Task[None] | None = None
        self._complaint = ""
        self._forbidden: set[str] = set()
        self.connected = False
        self.num_connections = 0

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"nats-{self._name}")

    async def close(self) -> None:
        if self._task is not None:
            await end([self._task])

    async def stream(self, jetstream: JetStreamContext) -> Stream:
        """The application's stream, made or changed to what the configuration says."""
        config, subjects = self._config, self._subjects
        wanted = StreamConfig(
            name=subjects.stream,
            subjects=subjects.kept,
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.OLD,
            storage=StorageType.FILE,
            max_age=config.max_age_s,
            max_bytes=config.max_bytes,
            num_replicas=config.replicas,
            duplicate_window=min(2.0, config.max_age_s),
        )
        try:
            info = await jetstream.stream_info(subjects.stream)
        except NotFoundError:
            try:
                info = await jetstream.add_stream(wanted)
            except BadRequestError as error:
                if error.err_code != NAME_IN_USE:  # another one has just made it, with other limits
                    raise
                info = await jetstream.stream_info(subjects.stream)
        found = info.config
        if (found.max_age, found.max_bytes, found.num_replicas, sorted(found.subjects or [])) != (
            wanted.max_age,
            wanted.max_bytes,
            wanted.num_replicas,
            sorted(subjects.kept),
        ):
            info = await jetstream.update_stream(wanted)
        return Stream(str(info.created), info.state.last_seq)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        since_s = loop.time()
        while True:
            try:
                async with self._connection() as client:
                    self.connected, since_s = True, loop.time()
                    self.num_connections += 1
                    log.info("%s: connected to NATS", self._name)
                    await _while_answering(client, self._serve(client))
            except Exception as error:  # noqa: BLE001 - whatever NATS or its library does, routing goes on
                if self.connected and loop.time() - since_s > STAYED_S:
                    self._complaint = ""
                self._complain(error)
            finally:
                self.connected = False
            await asyncio.sleep(RETRY_S * random.uniform(0.5, 1.5))

    def _complain(self, error: Exception) -> None:
        """Once for each thing that is said, until a connection has stayed."""
        while isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        complaint = str(error) or repr(error)
        if complaint != self._complaint:
            self._complaint = complaint
            log.warning("%s: NATS at %s: %s; trying again", self._name, ", ".join(self._config.urls), complaint)

    def _complain_forbidden(self, what: str) -> None:
        """Once for each kind of subject."""
        kind = ".".join(what.split(".")[:2])
        if kind not in self._forbidden:
            self._forbidden.add(kind)
            log.warning("%s: %s; docs/events.md says which subjects a client needs", self._name, what)

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[Client]:
        async def said(error: Exception) -> None:
            if "permissions violation" in str(error).lower():
                self._complain_forbidden(str(error))
                return
            expected = isinstance(error, nats.errors.Error | OSError)  # what else is raised in callbacks is a defect
            log.log(logging.DEBUG if expected else logging.ERROR, "%s: NATS: %r", self._name, error)

        client = Client()
        try:
            async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                await client.connect(
                    name=self._name,
                    allow_reconnect=False,
                    reconnect_time_wait=0,  # we wait
                    connect_timeout=CONNECT_TIMEOUT_S,  # type: ignore[arg-type]  # it takes fractions
                    ping_interval=3600,  # we probe
                    error_cb=said,
                    **options(self._config),
                )
            yield client
        finally:
            await _closed(client)


async def _closed(client: Client) -> None:
    with contextlib.suppress(Exception):
        async with asyncio.timeout(CLOSE_TIMEOUT_S):
            await client.close()
    # nats-py 2.16 sends what is unsent before it ends anything else: it waits if the server hangs, and gives up the
    # rest if the socket is broken.
    for subscription in list(client._subs.values()):
        subscription._stop_processing()
    if client._transport is not None:
        client._transport.close()  # type: ignore[no-untyped-call]


async def _while_answering(client: Client, work: Awaitable[None]) -> None:
    """Run it until it ends, or the server does not answer any more; raises why."""
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(_probe(client))]
    for task in tasks:
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # of both, only one is raised
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        await end(tasks)


async def end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel and wait, again while they go on: nats-py 2.16 takes a cancellation for a closed connection at times."""
    ending = list(tasks)
    while left := [task for task in ending if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*ending, return_exceptions=True)


async def _probe(client: Client) -> None:
    while True:
        async with asyncio.timeout(PROBE_TIMEOUT_S + 1.0):
            await client.flush(timeout=PROBE_TIMEOUT_S)  # type: ignore[arg-type]
        await asyncio.sleep(PROBE_EVERY_S)
