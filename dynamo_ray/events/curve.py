"""ZeroMQ sockets between the ingress replicas of one deployment: only who has its secret can speak or listen.

CurveZMQ (ZeroMQ RFC 26) with keys derived from the secret, and ZAP (RFC 27) so that a client must prove its key too.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import weakref

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils import z85

DOMAIN = "dynamo_ray"
HANDSHAKE_MS = 3_000
HEARTBEAT_MS = 1_000
SILENCE_MS = 3_000
"""Of a connection on which not even heartbeats come."""
RECONNECT_MS = 50
MAX_RECONNECT_MS = 1_000


class SecureContext:
    """Makes sockets that speak only to those of another SecureContext of the same secret; on the running loop."""

    def __init__(self, secret: bytes) -> None:
        self._server = _key_pair(secret, b"dynamo_ray replica server")
        self._client = _key_pair(secret, b"dynamo_ray replica client")
        self._context = zmq.asyncio.Context()
        self._sockets: weakref.WeakSet[zmq.asyncio.Socket] = weakref.WeakSet()
        self._admission = AsyncioAuthenticator(self._context)
        self._admission.start()
        self._admission.configure_curve_callback(DOMAIN, self)

    def server(self, kind: int, host: str, max_message_bytes: int) -> tuple[zmq.asyncio.Socket, str]:
        """A socket bound to a free port, and its endpoint.

        Raises:
            OSError: Nothing can be bound on `host`.
        """
        socket = self._socket(kind, max_message_bytes)
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self._server
        socket.zap_domain = DOMAIN.encode()
        try:
            return socket, f"tcp://{host}:{socket.bind_to_random_port(f'tcp://{host}')}"
        except zmq.ZMQError as error:
            socket.close()
            raise OSError(error.errno, error.strerror) from error

    def client(self, kind: int, max_message_bytes: int) -> zmq.asyncio.Socket:
        """A socket to connect with."""
        socket = self._socket(kind, max_message_bytes)
        socket.curve_serverkey, _ = self._server
        socket.curve_publickey, socket.curve_secretkey = self._client
        return socket

    async def close(self) -> None:
        """End every socket; of one with a `linger`, what was sent last is given so long to leave."""
        self._admission.stop()
        for socket in self._sockets:
            socket.close()
        await asyncio.to_thread(self._context.term)

    def callback(self, domain: str, key: bytes) -> bool:
        """Whether a client with this public key, which it has proved to be its own, may connect.

        Without it whoever had learnt the server's public key could.
        """
        return hmac.compare_digest(key, self._client[0])

    def _socket(self, kind: int, max_message_bytes: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        self._sockets.add(socket)
        socket.linger = 0
        socket.maxmsgsize = max_message_bytes
        socket.handshake_ivl = HANDSHAKE_MS
        socket.heartbeat_ivl, socket.heartbeat_timeout, socket.heartbeat_ttl = HEARTBEAT_MS, SILENCE_MS, SILENCE_MS
        socket.reconnect_ivl, socket.reconnect_ivl_max = RECONNECT_MS, MAX_RECONNECT_MS
        return socket


def _key_pair(secret: bytes, label: bytes) -> tuple[bytes, bytes]:
    """Public and secret, in Z85. A Curve25519 secret key is any 32 bytes: here HMAC-SHA256 of a label."""
    private = z85.encode(hmac.digest(secret, label, hashlib.sha256))
    return zmq.curve_public(private), private
