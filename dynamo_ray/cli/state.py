"""What is running now: one small file per `dynamo-ray up`, so that another terminal finds it, or what it left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import msgspec

from dynamo_ray.cli import processes
from dynamo_ray.request.membership import WorkerStatus

_TOKEN_FILE = "token"


class Running(msgspec.Struct, frozen=True):
    """One live `up`."""

    pid: int
    started_ticks: int
    """When the process began, since boot: a pid alone may have been given to another, and clocks are set."""
    url: str
    port: int
    config: str
    ray_address: str
    applications: tuple[str, ...]
    mark: str | None = None
    """The scratch folder of its private Ray, which all of its processes carry in their environment."""
    end_timeout_s: float = 0.0
    """How long its end may take."""
    ready: bool = False
    workers: tuple[WorkerStatus, ...] = ()


def folder() -> Path:
    """Of this user, on this machine; gone with a reboot."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime, "dynamo-ray") if runtime else Path(f"/tmp/dynamo-ray-{os.getuid()}")


def write(running: Running) -> None:
    """Replace this process's file at once: a reader sees the old one or the new one."""
    home = folder()
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = home / f".{running.pid}.tmp"
    scratch.write_bytes(msgspec.json.encode(running))
    scratch.rename(_file(running.pid))


def remove(pid: int) -> None:
    _file(pid).unlink(missing_ok=True)


def running() -> list[Running]:
    """Every `up` that is alive, oldest first; what a dead one left, processes and files, is ended and removed."""
    home, found = folder(), []
    if not home.is_dir() or home.stat().st_uid != os.getuid():
        return []  # what another user wrote there is not followed
    for file in home.glob("*.json"):
        try:
            entry = msgspec.json.decode(file.read_bytes(), type=Running)
        except (OSError, msgspec.DecodeError):
            continue
        if is_alive(entry):
            found.append(entry)
        else:
            discard(entry)
    return sorted(found, key=lambda entry: entry.started_ticks)


def discard(entry: Running) -> None:
    """End that `up`'s processes at once, and remove its files."""
    if entry.mark is not None:
        processes.end(entry.mark, patience_s=0.0)
        shutil.rmtree(entry.mark, ignore_errors=True)
    remove(entry.pid)


def keep_ray_token(mark: str, token: str) -> None:
    """For `ray_token`; the scratch folder of a private Ray is its user's alone, and goes with it."""
    Path(mark, _TOKEN_FILE).write_text(token)


def ray_token(entry: Running) -> str | None:
    """What that `up`'s private Ray asks of who joins it; None: nothing that this process has not."""
    try:
        return None if entry.mark is None else Path(entry.mark, _TOKEN_FILE).read_text()
    except FileNotFoundError:
        return None


def is_alive(entry: Running) -> bool:
    return started_ticks(entry.pid) == entry.started_ticks


def started_ticks(pid: int) -> int | None:
    """As proc(5) counts them; None for a process that has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[18])


def _file(pid: int) -> Path:
    return folder() / f"{pid}.json"
