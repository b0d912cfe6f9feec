"""Every process that one `dynamo-ray up` started, found by a variable that all of them inherit."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import psutil

from dynamo_ray.cluster.processes import carrying

VARIABLE = "DYNAMO_RAY_UP"
"""Its value names the `up`; a process that was orphaned or daemonised still carries it."""
TERMINATE_TIMEOUT_S = 5.0
KILL_TIMEOUT_S = 10.0


def started_by(mark: str) -> list[psutil.Process]:
    """The live processes of that `up`, but for this one."""
    return [process for process in (*carrying(VARIABLE, mark), *_agents(mark)) if process.pid != os.getpid()]


def _agents(mark: str) -> list[psutil.Process]:
    """Ray's two per node: their titles overwrite their environment (Ray 2.60), but they keep their logs open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if not process.environ() and any(file.path.startswith(f"{mark}/") for file in process.open_files()):
                found.append(process)
    return found


def end(mark: str, patience_s: float = TERMINATE_TIMEOUT_S) -> int:
    """Terminate, then kill, every process of that `up`; returns how many there were."""
    left = started_by(mark)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.terminate()
    _, alive = psutil.wait_procs(left, timeout=patience_s)
    while alive:
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(alive, timeout=KILL_TIMEOUT_S)
        alive = started_by(mark)
    return len(left)


def proportional_bytes(mark: str) -> int:
    """Memory of that `up` and of this process: each shared page counts once, split among those that map it (PSS)."""
    return sum(_pss_bytes(pid) for pid in (os.getpid(), *(process.pid for process in started_by(mark))))


def _pss_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return 0


class PeakMemory:
    """Samples the memory of an `up` until it is stopped."""

    def __init__(self, mark: str, every_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self._mark, self._every_s = mark, every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """The highest sum seen, in bytes."""
        self._stop.set()
        self._thread.join()
        return self.peak_bytes

    def _sample(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, proportional_bytes(self._mark))
            if self._stop.wait(self._every_s):
                return
