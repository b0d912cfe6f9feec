"""What is running now: one small file per `dynamo-ray up`, so that another terminal finds it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import psutil

from dynamo_ray.request.membership import WorkerStatus


class Running(msgspec.Struct, frozen=True):
    """One live `up`."""

    pid: int
    started_unix_s: float
    """The process's creation time: a pid alone may have been given to another."""
    url: str
    port: int
    config: str
    ray_address: str
    applications: tuple[str, ...]
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
    """Every `up` that is alive, oldest first; files of dead ones are removed."""
    found = []
    for file in folder().glob("*.json"):
        try:
            entry = msgspec.json.decode(file.read_bytes(), type=Running)
        except (OSError, msgspec.DecodeError, json.JSONDecodeError):
            continue
        if is_alive(entry):
            found.append(entry)
        else:
            file.unlink(missing_ok=True)
    return sorted(found, key=lambda entry: entry.started_unix_s)


def is_alive(entry: Running) -> bool:
    try:
        process = psutil.Process(entry.pid)
        return process.create_time() == entry.started_unix_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _file(pid: int) -> Path:
    return folder() / f"{pid}.json"
