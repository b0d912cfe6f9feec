"""What another terminal finds of an `up`, alive or killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynamo_ray.cli import processes, state
from dynamo_ray.cli.state import Running


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))


def entry(pid: int, started_ticks: int | None, mark: str | None = None) -> Running:
    assert started_ticks is not None
    return Running(pid, started_ticks, "http://127.0.0.1:1", 1, "c.yaml", "", ("a",), mark)


def test_a_live_process_is_found_until_it_removes_itself() -> None:
    mine = entry(os.getpid(), state.started_ticks(os.getpid()))
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
    state.write(entry(os.getpid(), 0, str(scratch)))  # of an earlier process with this number
    assert state.running() == []
    assert left.poll() is not None
    assert not scratch.exists()
    assert list(state.folder().glob("*.json")) == []
