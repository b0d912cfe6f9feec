"""The data plane's frames: what an ingress and a worker say to each other over one TCP connection.

A frame is a 4-byte big-endian length and one msgpack message. The connection opens with a mutual
challenge-response over a shared secret (HMAC-SHA256); nothing else is decoded from a peer that has not passed it.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator

import msgspec

from backends.engine import EngineInfo, GenerateRequest, RankLoad, Role, TokenChunk

PROTOCOL_VERSION = 1
MAX_FRAME_BYTES = 64 * 1024 * 1024
MAX_HELLO_BYTES = 4096
"""What a worker reads of a peer that has not proved the secret."""
MAX_WELCOME_BYTES = 1024 * 1024
"""What an ingress reads of one: a welcome describes every rank, about 150 bytes each, and every adapter."""
NONCE_BYTES = 32
HEARTBEAT_INTERVAL_S = 1.0


def endpoint_name(worker: str, node_rank: int) -> str:
    """What a node that takes requests is called: the first as its worker, the others after it."""
    return f"{worker}.{node_rank}" if node_rank else worker


def worker_of(endpoint: str) -> str:
    """The worker whose ranks that endpoint serves; the endpoints of one live and die together."""
    return endpoint.partition(".")[0]


class WorkerInfo(msgspec.Struct, frozen=True):
    """A ready worker, as the ingresses need to know it; of one whose nodes each take requests, one node.

    To an ingress every endpoint is a worker of its own, with the DP ranks that are served there.
    """

    worker: str
    """The endpoint's name."""
    epoch: int
    """Grows with every incarnation; what an older one says is dropped."""
    address: str
    """host:port of its data-plane server."""
    engine: EngineInfo

    @property
    def role(self) -> Role:
        return self.engine.role


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """Server -> client, first frame."""

    version: int
    nonce: bytes


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Client -> server: proves the secret over the server's nonce, and asks for the same."""

    nonce: bytes
    proof: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Server -> client: the server's proof, and who it is."""

    proof: bytes
    info: WorkerInfo


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    request: GenerateRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    request_id: str


class Release(msgspec.Struct, frozen=True, tag="release"):
    request_id: str


class Step(msgspec.Struct, frozen=True, tag="step"):
    """Everything one engine step made for this connection."""

    chunks: list[TokenChunk]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """A request that ended without a last chunk."""

    request_id: str
    message: str
    retryable: bool
    field: str | None = None
    overloaded: bool = False


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Each second, whatever else happens."""

    load: tuple[RankLoad, ...]
    draining: bool = False
    paused: str | None = None
    """Why it takes no requests until a command ends that, as a predicate of its name; those inside go on or wait."""
    flushes: int = 0
    """How often a command has emptied its caches."""


ToWorker = Hello | Submit | Abort | Release
ToIngress = Challenge | Welcome | Step | Failed | Heartbeat


def proof(secret: bytes, side: bytes, nonce: bytes) -> bytes:
    """HMAC over the side's name and the other side's nonce; the name keeps a proof from being mirrored."""
    return hmac.digest(secret, side + nonce, hashlib.sha256)


def check_proof(secret: bytes, side: bytes, nonce: bytes, given: bytes) -> bool:
    return hmac.compare_digest(proof(secret, side, nonce), given)


class FrameTooLarge(ValueError):
    """A peer announced a frame beyond the limit; the connection is of no more use."""


class FrameReader:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    def __init__(self, max_frame_bytes: int) -> None:
        self.max_frame_bytes = max_frame_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield every frame completed by `data`.

        Raises:
            FrameTooLarge: The next frame is larger than `max_frame_bytes`.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= 4:
                size = int.from_bytes(buffer[start : start + 4], "big")
                if size > self.max_frame_bytes:
                    raise FrameTooLarge(f"frame of {size} bytes; at most {self.max_frame_bytes} are taken")
                end = start + 4 + size
                if len(buffer) < end:
                    return
                frame = bytes(buffer[start + 4 : end])
                start = end
                yield frame
        finally:
            del buffer[:start]


_encoder = msgspec.msgpack.Encoder()


def encode(message: ToWorker | ToIngress) -> bytes:
    body = _encoder.encode(message)
    return len(body).to_bytes(4, "big") + body
