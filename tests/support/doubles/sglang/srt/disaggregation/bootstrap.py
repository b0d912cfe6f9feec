"""What srt/disaggregation/common/conn.py does over HTTP: prefill ranks tell a server in their leader's process where
they are, and decode ranks ask it."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time

REGISTER_ATTEMPTS = 50

Address = tuple[str, int]


class BootstrapServer:
    """`close` frees its port."""

    def __init__(self, host: str, port: int) -> None:
        ranks: dict[int, str] = {}

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                ranks.update({int(rank): address for rank, address in json.loads(self.rfile.readline()).items()})
                self.wfile.write(json.dumps(ranks).encode() + b"\n")

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = True
            daemon_threads = True

        self._server = Server((host, port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), name="bootstrap", daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def register(server: Address, rank: int, address: str) -> None:
    """The server may come up after its first rank."""
    for attempt in range(REGISTER_ATTEMPTS):
        try:
            _exchange(server, {rank: address})
            return
        except ConnectionRefusedError:
            if attempt + 1 == REGISTER_ATTEMPTS:
                raise
            time.sleep(0.1)


def ask(server: Address) -> dict[int, str]:
    return _exchange(server, {})


def _exchange(server: Address, message: dict[int, str]) -> dict[int, str]:
    with socket.create_connection(server, timeout=5.0) as connection, connection.makefile("rwb") as stream:
        stream.write(json.dumps(message).encode() + b"\n")
        stream.flush()
        return {int(rank): address for rank, address in json.loads(stream.readline()).items()}
