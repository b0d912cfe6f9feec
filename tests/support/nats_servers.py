"""NATS servers as others run them: with accounts and credentials files, or several as a cluster."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import nkeys
from deployments import free_port
from kv_ranks import NATS_TOKEN

from dynamo_ray.events.nats.server import PrivateServer, only_with

UNLIMITED = ("subs", "data", "payload", "imports", "exports", "conn", "leaf")


def cluster(folder: Path, size: int) -> list[PrivateServer]:
    """That many that know of each other; started by the caller."""
    ports = [free_port() for _ in range(size)]
    routes = ", ".join(f"nats://127.0.0.1:{port}" for port in ports)
    return [
        PrivateServer(
            folder / f"server-{number}",
            f"server_name: server-{number}\n"
            f"cluster {{ name: tests, listen: 127.0.0.1:{port}, routes: [{routes}] }}\n" + only_with(NATS_TOKEN),
        )
        for number, port in enumerate(ports)
    ]


def with_accounts(folder: Path, publish: list[str], subscribe: list[str]) -> tuple[PrivateServer, Path]:
    """A server in operator mode, and the credentials file of a user who may say and hear only these subjects."""
    operator, system, account, user = (
        nkeys.from_seed(nkeys.encode_seed(os.urandom(32), kind))
        for kind in (
            nkeys.PREFIX_BYTE_OPERATOR,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_ACCOUNT,
            nkeys.PREFIX_BYTE_USER,
        )
    )
    limits = {**dict.fromkeys(UNLIMITED, -1), "wildcards": True}
    storage = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
    jwts = {
        _name(key): _jwt(operator, key, {"type": "account", "limits": given})
        for key, given in ((system, limits), (account, {**limits, **storage}))
    }
    grant = {"type": "user", "pub": {"allow": publish}, "sub": {"allow": subscribe}, **dict.fromkeys(UNLIMITED[:3], -1)}
    folder.mkdir(parents=True)
    file = folder / "user.creds"
    file.write_text(
        f"-----BEGIN NATS USER JWT-----\n{_jwt(account, user, grant)}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed.decode()}\n------END USER NKEY SEED------\n"
    )
    preloaded = "\n".join(f"{name}: {jwt}" for name, jwt in jwts.items())
    server = PrivateServer(
        folder / "server",
        f"operator: {_jwt(operator, operator, {'type': 'operator'})}\nsystem_account: {_name(system)}\n"
        f"resolver: MEMORY\nresolver_preload {{\n{preloaded}\n}}\n",
    )
    return server, file


def _name(key: Any) -> str:
    return str(key.public_key.decode())


def _jwt(issuer: Any, subject: Any, grant: dict[str, Any]) -> str:
    """As version 2 of github.com/nats-io/jwt encodes claims."""
    claims = {
        "iat": int(time.time()),
        "iss": _name(issuer),
        "name": grant["type"],
        "sub": _name(subject),
        "nats": {**grant, "version": 2},
    }
    claims["jti"] = base64.b32encode(hashlib.sha256(_json(claims)).digest()).decode().rstrip("=")
    signed = b".".join(map(_base64, (_json({"typ": "JWT", "alg": "ed25519-nkey"}), _json(claims))))
    return (signed + b"." + _base64(issuer.sign(signed))).decode()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
