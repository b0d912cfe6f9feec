"""What another terminal finds of an `up`, alive or killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dynamo_ray.cli import processes, state
from dynamo_ray.cli.state import Running


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


def entry(pid: int, started_s: float, mark: str | None = None) -> Running:
    return Running(pid, started_s, "http://127.0.0.1:1", 1, "c.yaml", "", ("a",), mark)


def test_a_clock_that_was_set_hides_no_live_process() -> None:
    mine = entry(os.getpid(), psutil.Process().create_time() + 1.0)
    state.write(mine)
    assert state.running() == [mine]
    state.remove(mine.pid)
    assert state.running() == []


def test_what_a_killed_one_left_running_is_ended_and_its_files_are_removed(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    left = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={**os.environ, processes.VARIABLE: str(scratch)},
    )
    state.write(entry(os.getpid(), 0.0, str(scratch)))  # of an earlier process with this number
    assert state.running() == []
    assert left.poll() is not None
    assert not scratch.exists()
    assert list(state.folder().glob("*.json")) == []
